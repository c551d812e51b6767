from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid import load_pretrained, save_pretrained
from hybrid.init_map import from_attention
from hybrid.speculative import SpeculationStats
from steps import speculative_profile
from steps.config import SpeculativeConfig
from steps.speculative_profile import ProfileError
from tests.steps import tiny_stages

CONFIG = SpeculativeConfig(max_k=3, ngram=2, prompts=3, new_tokens=12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upstream")
    made = tiny_stages.upstream(root)
    student = from_attention(load_pretrained(made["teacher"]), (1,))
    save_pretrained(student.bfloat16(), root / "student")
    return {**made, "student": root / "student"}


def profile(inputs, out, config=CONFIG):
    told = []
    summary = speculative_profile.run(config, inputs, out, tiny_stages.context(out, progress=told.append))
    return summary, json.loads((out / "profile.json").read_text()), told


def test_profile(inputs, tmp_path):
    summary, written, told = profile(inputs, tmp_path)
    assert (written["draft"], written["ngram"], written["prompts"], written["dtype"]) == ("ngram", 2, 3, "float32")
    rows = written["rows"]
    assert [row["k"] for row in rows] == [0, 1, 2, 3]
    assert all(row["identical_to_greedy"] for row in rows)
    plain = rows[0]
    assert (plain["acceptance"], plain["proposed"], plain["tokens_per_verification"]) == (None, 0, 1.0)
    assert plain["speedup"] == 1.0
    emitted = {round(row["tokens_per_verification"] * row["verifications"]) for row in rows}
    assert len(emitted) == 1, "every K gives the same tokens"
    for row in rows:
        assert 1.0 <= row["ci_low"] <= row["tokens_per_verification"] <= row["ci_high"] <= row["k"] + 1
        assert len(row["acceptance_by_position"]) == row["k"]
        assert row["tokens_per_second"] > 0
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / plain["tokens_per_second"])
    best = max(rows, key=lambda row: row["tokens_per_second"])
    assert summary == {"best_k": best["k"], "speedup": best["speedup"], "identical": True}
    assert written["best_k"] == best["k"]
    assert [p.done for p in told] == [1, 2, 3, 4]


def test_figures_by_hand():
    stats = [SpeculationStats([4, 2], [3, 1], [2, 2, 2, 1], 0.5), SpeculationStats([1, 1], [1, 1], [3], 0.25)]
    row = speculative_profile._figures(2, stats, True)
    assert row["acceptance"] == pytest.approx(6 / 8)
    assert row["acceptance_by_position"] == pytest.approx([4 / 5, 2 / 3])
    assert row["tokens_per_verification"] == pytest.approx(10 / 5)
    assert row["tokens_per_second"] == pytest.approx(10 / 0.75)
    assert row["ci_low"] == pytest.approx(7 / 4)
    assert row["ci_high"] == pytest.approx(3.0)


def test_another_output_is_told(inputs, tmp_path, monkeypatch):
    """A profile that could not fail would prove nothing."""
    real = speculative_profile.generate_speculative

    def wrong(model, prompts, count, drafts, k):
        replies, stats = real(model, prompts, count, drafts, k)
        return ([reply[:-1] for reply in replies] if k == 2 else replies), stats

    monkeypatch.setattr(speculative_profile, "generate_speculative", wrong)
    summary, written, _ = profile(inputs, tmp_path)
    assert [row["identical_to_greedy"] for row in written["rows"]] == [True, True, False, True]
    assert not summary["identical"]
    assert summary["best_k"] != 2


@pytest.mark.parametrize("changes", [{"new_tokens": 1}, {"prompts": 0}])
def test_nothing_to_measure_is_an_error(inputs, tmp_path, changes):
    with pytest.raises(ProfileError, match="no reply .* has a second token"):
        profile(inputs, tmp_path, CONFIG.model_copy(update=changes))


def test_replies_that_end_at_once_do_not_count():
    ended, other = SpeculationStats([0], [0], [], 0.5), SpeculationStats([3], [2], [2, 2, 1], 0.5)
    row = speculative_profile._figures(1, [ended, ended, ended, other], True)
    assert row["tokens_per_verification"] == row["ci_low"] == row["ci_high"] == pytest.approx(5 / 3)
    assert row["tokens_per_second"] == pytest.approx(10)
