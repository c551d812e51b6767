"""`--to hf`: the folder that transformers reads, and its card."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid import load_pretrained, save_pretrained
from hybrid.export.__main__ import main
from hybrid.hf.card import Lineage, lineage, model_card
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens


def manifest(stage, key, upstream, **summary):
    meta = {"summary": summary, "git_commit": "0123abcd"}
    payload = {"stage": stage, "upstream": upstream}
    made = {"stage": stage, "key": key, "attempt": "a-1", "created": "2026-11-23T15:31:08+00:00"}
    return made | {"meta": meta, "payload": payload}


@pytest.fixture
def store(tmp_path):
    """A store in which a student was distilled and measured."""
    root = tmp_path / "store"
    row = {"benchmark": "held_out", "metric": "nll", "n": 16, "teacher": 2.4, "student": 2.9, "difference": 0.5}
    row |= {"ci_low": 0.45, "ci_high": 0.65, "verdict": "worse"}
    held_out = {"kl": 0.48694, "top1": 0.65}
    for each in (
        manifest("teacher", "t" * 64, {}, source="hf:org/name@rev"),
        manifest("corpus", "c" * 64, {"teacher": "t" * 64}),
        manifest("init_from_attention", "i" * 64, {"teacher": "t" * 64}, held_out={"kl": 0.6, "top1": 0.6}),
        manifest(
            "kl_distill",
            "k" * 64,
            {"corpus": "c" * 64, "student": "i" * 64, "teacher": "t" * 64},
            held_out=held_out,
            tokens=20435,
        ),
        manifest("benchmark", "b" * 64, {"student": "k" * 64, "teacher": "t" * 64}),
        manifest("benchmark", "d" * 64, {"student": "i" * 64, "teacher": "t" * 64}),
    ):
        folder = root / each["stage"] / each["key"] / "a-1"
        folder.mkdir(parents=True)
        (folder.parent / "MANIFEST.json").write_text(json.dumps(each))
        verdict = {"verdict": "worse" if each["key"][0] == "b" else "of another student"}
        (folder / "comparison.json").write_text(json.dumps([row | verdict]))
    return root


def test_card_tells_what_the_store_knows(store, tmp_path):
    folder = store / "kl_distill" / ("k" * 64) / "a-1"
    (folder / "comparison.json").unlink()
    model = tiny_hybrid.model()
    save_pretrained(model, folder)
    (folder / "chat_template.jinja").write_text("hi")
    assert main([str(folder), "--to", "hf", "-o", str(tmp_path / "tiny")]) == 0
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# tiny\n" in card
    stages = [line.split(" | ")[0].lstrip("| ") for line in card.splitlines() if "| `" in line]
    assert stages == ["teacher", "corpus", "init_from_attention", "kl_distill"]
    assert "| kl_distill | `kkkkkkkkkkkk` | 2026-11-23 | 20435 | 0.4869 | 0.65 |" in card
    assert "Teacher: `hf:org/name@rev`. Code: commit `0123abcd`." in card
    assert "| held_out | nll | 16 | 2.4 | 2.9 | 0.5 [0.45, 0.65] | worse |" in card
    assert "another student" not in card
    assert "4 layers, 2 of which mix tokens by Mamba-2" in card and "| layers with attention | 1, 3 |" in card
    assert (tmp_path / "tiny" / "chat_template.jinja").read_text() == "hi"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(theirs(tokens(1, 9)).logits, model(tokens(1, 9)), atol=1e-4, rtol=0)
    assert load_pretrained(tmp_path / "tiny").config == model.config


def test_card_of_a_folder_without_a_history(tmp_path):
    save_pretrained(tiny_hybrid.model(), tmp_path / "student")
    assert lineage(tmp_path / "student") == Lineage()
    card = model_card(tiny_hybrid.config(), "name", Lineage())
    assert "Lineage" not in card and "No benchmark of this student was found" in card


def test_types(tmp_path):
    model = tiny_hybrid.model()
    for name, p in model.named_parameters():
        if ".mamba." not in name:
            p.data = p.data.bfloat16()
    save_pretrained(model, tmp_path / "student")
    leaves = ("A_log", "dt_bias", ".D")
    for options, wanted in ((["--dtype", "bfloat16"], torch.bfloat16), ([], torch.float32)):
        out = tmp_path / str(wanted)
        assert main([str(tmp_path / "student"), "--to", "hf", "-o", str(out), *options]) == 0
        parameters = load_pretrained(out).named_parameters()
        assert {p.dtype for name, p in parameters if not name.endswith(leaves)} == {wanted}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
