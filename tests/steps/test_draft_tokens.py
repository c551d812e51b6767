"""The profile proposes among the tokens that a draft's folder names."""

from __future__ import annotations

import json

from hybrid import load_pretrained, save_pretrained
from hybrid.drafts import ModelDraft, save_tokens
from hybrid.init_map import from_attention
from steps import speculative_profile
from steps.config import SpeculativeStageConfig
from tests.steps import tiny_stages


def test_the_profile_reads_them(tmp_path, monkeypatch):
    """The student as its own draft: of what it says, that is accepted which is among the tokens."""
    made = tiny_stages.upstream(tmp_path)
    student = from_attention(load_pretrained(made["teacher"]), (1,))
    given = {"corpus": made["corpus"], "student": tmp_path / "student", "draft": tmp_path / "draft"}
    for role in ("student", "draft"):
        save_pretrained(student, given[role])
    config = SpeculativeStageConfig(max_k=2, prompts=3, new_tokens=12, draft="layers:[0, 1, 2]")
    proposed: set[int] = set()
    propose = ModelDraft.propose

    def noted(draft, engine):
        q = propose(draft, engine)
        proposed.update(engine.tokens[engine.slots >= 0, 1:].flatten().tolist())
        return q

    monkeypatch.setattr(ModelDraft, "propose", noted)

    def profiled() -> dict:
        proposed.clear()
        speculative_profile.run(config, given, tmp_path, tiny_stages.context(tmp_path))
        group = json.loads((tmp_path / "profile.json").read_text())["groups"][0]
        assert group["draft"] == config.draft and all(row["identical_to_greedy"] for row in group["rows"])
        return group["rows"][2]

    assert profiled()["acceptance"] == 1.0
    said = sorted(proposed)
    assert len(said) > 3
    save_tokens(tmp_path / "draft", said)
    assert profiled()["acceptance"] == 1.0
    save_tokens(tmp_path / "draft", said[::2])
    assert profiled()["acceptance"] < 1.0
    assert proposed <= set(said[::2])
