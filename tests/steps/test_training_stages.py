"""The stages that make students, one after the other, on a tiny teacher; their first losses recomputed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from corpora.packing import PackedBlocks
from corpora.preferences import PreferenceError
from corpora.shards import Shard
from hybrid import load_pretrained
from steps import align, dpo, init_from_attention, kl_distill, sft
from steps.config import AlignConfig, ConfigError, DPOConfig, InitStageConfig, KLConfig, SFTConfig
from steps.students import token_batches
from tests.corpora.tiny import write_jsonl
from tests.steps import tiny_stages

INIT = InitStageConfig(attention=[1], tokens=256, batch_size=2, seq_len=64)
STEPS = 8
COMMON: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "seq_len": 61, "checkpoint_every": 5}
ALIGN = AlignConfig(**COMMON, mixer_lr=5e-3)
KL = KLConfig(**COMMON, mixer_lr=3e-3, rest_lr=1e-3)
SFT = SFTConfig(**COMMON, mixer_lr=1e-3, rest_lr=1e-3)
DPO = DPOConfig(
    **COMMON, mixer_lr=3e-3, rest_lr=1e-3, pairs=8, max_reply_tokens=9, max_prompt_tokens=90, generation_batch=3
)
CHAIN = {
    "init": (init_from_attention, INIT, None),
    "align": (align, ALIGN, "init"),
    "kl": (kl_distill, KL, "align"),
    "sft": (sft, SFT, "kl"),
    "dpo": (dpo, DPO, "sft"),
}


@dataclass
class Chain:
    """What each stage left: its inputs, its folder and its summary."""

    inputs: dict[str, dict[str, Path]]
    out: dict[str, Path]
    summary: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> dict[str, Path]:
    return tiny_stages.upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def chain(upstream, tmp_path_factory) -> Chain:
    done = Chain({}, {}, {})
    for name, (stage, config, before) in CHAIN.items():
        done.inputs[name] = upstream | ({"student": done.out[before]} if before else {})
        done.out[name] = tmp_path_factory.mktemp(name)
        done.summary[name] = stage.run(config, done.inputs[name], done.out[name], tiny_stages.context(done.out[name]))
    return done


@pytest.fixture
def run(upstream, tmp_path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Run one stage in a folder of its own: (summary, folder)."""

    def runs(stage, config, student: Path | None = None, compute: str = "float32", **inputs: Path):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        given = {**upstream, **inputs} | ({"student": student} if student else {})
        return stage.run(config, given, out, tiny_stages.context(tmp_path, compute)), out

    return runs


def first_batch(inputs, config) -> Any:
    return PackedBlocks(Shard.load(inputs["corpus"] / "train.npz"), config.seq_len, 3).batch(0, config.batch_size)


def tensors(*arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


# Every stage


@pytest.mark.parametrize("name", CHAIN)
def test_leaves_a_student_that_loads(chain, name):
    student = load_pretrained(chain.out[name])
    assert student.config.mamba_layers == (0, 2)
    assert (chain.out[name] / "tokenizer.json").is_file()
    json.dumps(chain.summary[name], allow_nan=False)
    assert chain.summary[name]["held_out"]["kl"] > 0
    assert 0 <= chain.summary[name]["held_out"]["top1"] <= 1


@pytest.mark.parametrize("name", ["align", "kl", "sft"])
def test_lowers_its_loss(chain, run, name):
    """Of its first batch, which a run that starts where it ended sees again."""
    stage, config, _ = CHAIN[name]
    again, _ = run(stage, config.model_copy(update={"steps": 1}), chain.out[name])
    assert chain.summary[name]["steps"] == STEPS
    assert again["loss_first"] < chain.summary[name]["loss_first"]


@pytest.mark.parametrize("name", ["align", "kl", "sft", "dpo"])
def test_trains_what_its_rates_say(chain, name):
    before, after = (
        dict(load_pretrained(folder).named_parameters()) for folder in (chain.inputs[name]["student"], chain.out[name])
    )
    for weight, p in after.items():
        frozen = name == "align" and ".mamba." not in weight
        assert torch.equal(p, before[weight]) == frozen, weight


def test_distance_from_the_teacher_falls(chain):
    held_out = {name: chain.summary[name]["held_out"]["kl"] for name in ("init", "align", "kl")}
    assert held_out["kl"] < held_out["init"]
    assert held_out["align"] < chain.summary["init"]["start"]["paper"]["kl"]


# init_from_attention


def test_init_reports_every_start(chain):
    summary = chain.summary["init"]
    assert summary["attention_layers"] == [1]
    assert summary["replaced_layers"] == [0, 2]
    assert set(summary["start"]) == {"copy", "calibrated", "paper"}
    assert summary["held_out"] == summary["start"]["calibrated"]
    assert summary["start"]["calibrated"]["kl"] < summary["start"]["copy"]["kl"]
    assert [row["layer"] for row in summary["layers"]] == [0, 2]
    assert all(0 < row["relative_error"] < 1 for row in summary["layers"])


@pytest.mark.parametrize(
    ("attention", "kept"), [("0", []), ("1/2", [1]), ([0, 2], [0, 2]), ("1", [0, 1, 2])], ids=["0", "1/2", "list", "1"]
)
def test_init_keeps_the_wanted_layers(run, attention, kept):
    summary, out = run(init_from_attention, INIT.model_copy(update={"attention": attention, "measure_paper": False}))
    assert summary["attention_layers"] == kept
    assert load_pretrained(out).config.attention_layers == tuple(kept)
    assert "paper" not in summary["start"]
    if attention == "1":
        assert summary["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
        assert summary["held_out"]["top1"] == 1.0


@pytest.mark.parametrize("method", ["paper", "copy"])
def test_init_by_another_method(run, method):
    summary, out = run(init_from_attention, INIT.model_copy(update={"method": method, "measure_paper": False}))
    assert set(summary["start"]) == {method}
    assert summary["layers"] == []
    assert load_pretrained(out).config.conv_silu == (method == "paper")


def test_init_with_rotary_mixers(run):
    """The calibration sees the rotation; the published start that it is compared with has none."""
    plain, rotary = (run(init_from_attention, INIT.model_copy(update={"rope": rope})) for rope in (False, True))
    assert [load_pretrained(out).config.mixer_rope for _, out in (plain, rotary)] == [False, True]
    assert rotary[0]["start"]["paper"] == plain[0]["start"]["paper"]
    assert rotary[0]["start"]["copy"] != plain[0]["start"]["copy"]
    for ours, theirs in zip(rotary[0]["layers"], plain[0]["layers"], strict=True):
        assert 0 < ours["relative_error"] < 1 and ours["relative_error"] != theirs["relative_error"]


def test_near_identity_starts_from_mixers_that_say_little(chain, run):
    summary, out = run(init_from_attention, INIT.model_copy(update={"method": "near_identity"}))
    assert set(summary["start"]) == {"copy", "near_identity", "paper"}
    assert summary["held_out"] == summary["start"]["near_identity"] != summary["start"]["copy"]
    teacher, student = load_pretrained(chain.inputs["kl"]["teacher"]), load_pretrained(out)
    for layer in (0, 2):
        expected = teacher.blocks[layer].self_attn.o_proj.weight.float() * 0.01
        torch.testing.assert_close(student.blocks[layer].mamba.out_proj.weight, expected)
    config = INIT.model_copy(update={"method": "near_identity", "attention": "0"})
    _, continued = run(init_from_attention, config, previous=out)
    for layer in (0, 2):  # what was scaled before is carried over as it is
        expected = student.blocks[layer].mamba.out_proj.weight
        assert torch.equal(load_pretrained(continued).blocks[layer].mamba.out_proj.weight, expected)


def test_init_continues_from_a_student(chain, run):
    config = INIT.model_copy(update={"attention": "0"})
    summary, out = run(init_from_attention, config, previous=chain.out["kl"])
    assert (summary["replaced_layers"], summary["carried_over"]) == ([0, 1, 2], [0, 2])
    assert [row["layer"] for row in summary["layers"]] == [1]
    assert 0 < summary["layers"][0]["relative_error"] < 1
    assert set(summary["start"]) == {"copy", "calibrated"}
    before, after = (dict(load_pretrained(folder).named_parameters()) for folder in (chain.out["kl"], out))
    assert {name.split("mamba")[0] for name in after.keys() - before.keys()} == {"model.layers.1."}
    for name in after.keys() & before.keys():
        assert torch.equal(after[name], before[name]), name
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(after[embeddings], load_pretrained(chain.inputs["kl"]["teacher"]).model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention": [0, 1]}, r"layers \[0\] is to be kept, but they have none; choose among layers \[1\]"),
        ({"attention": [], "method": "paper"}, "need one init_from_attention.method"),
        ({"attention": [], "rope": True}, "need one init_from_attention.method.* rope"),
    ],
)
def test_init_refuses_what_a_student_cannot_give(chain, run, change, said):
    with pytest.raises(ConfigError, match=said):
        run(init_from_attention, INIT.model_copy(update=change), previous=chain.out["kl"])


# First losses, by hand


def test_align_loss_by_hand(chain):
    batch = first_batch(chain.inputs["align"], ALIGN)
    text, seq_idx = tensors(batch.tokens, batch.seq_idx)
    teacher, student = (load_pretrained(chain.inputs["align"][role]) for role in ("teacher", "student"))
    errors = []
    with torch.no_grad():
        for layer, (given, wanted) in teacher.mixing(text, seq_idx, (0, 2)).items():
            off = student.model.layers[layer].mamba(given, seq_idx).double() - wanted
            errors.append((off.pow(2).sum() / wanted.double().pow(2).sum()).item())
    assert chain.summary["align"]["loss_first"] == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_align_of_a_student_that_continues_fits_the_new_mixers_to_the_attention_they_replace(chain, run):
    previous = chain.out["kl"]
    _, start = run(init_from_attention, INIT.model_copy(update={"attention": []}), previous=previous)
    summary, out = run(align, ALIGN, start, previous=previous)
    before, after = (dict(load_pretrained(folder).named_parameters()) for folder in (start, out))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in moved} == {"1"} and all(".mamba." in name for name in moved)

    batch = first_batch(chain.inputs["align"], ALIGN)
    text, seq_idx = tensors(batch.tokens, batch.seq_idx)
    with torch.no_grad():
        given, wanted = load_pretrained(previous).mixing(text, seq_idx, (1,))[1]
        off = load_pretrained(start).blocks[1].mamba(given, seq_idx).double() - wanted
    assert summary["loss_first"] == pytest.approx((off.pow(2).sum() / wanted.double().pow(2).sum()).item(), rel=1e-4)


def test_align_leaves_a_student_without_new_mixers_as_it_is(chain, run):
    previous = chain.out["kl"]
    _, start = run(init_from_attention, INIT, previous=previous)
    summary, out = run(align, ALIGN, start, previous=previous)
    assert summary["steps"] == 0 and summary["held_out"]["kl"] > 0
    before, after = (dict(load_pretrained(folder).named_parameters()) for folder in (previous, out))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_kl_by_hand(chain, run):
    batch = first_batch(chain.inputs["kl"], KL)
    text, seq_idx, mask, targets = tensors(batch.tokens, batch.seq_idx, batch.loss_mask, batch.targets)
    assert 0 < (~mask).sum() < mask.sum()
    log_p, log_q = (
        log_softmax(load_pretrained(chain.inputs["kl"][role])(text, seq_idx)[mask].double(), -1)
        for role in ("teacher", "student")
    )
    forward = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert chain.summary["kl"]["loss_first"] == pytest.approx(forward, rel=1e-4)
    assert chain.summary["kl"]["tokens"] == sum(
        PackedBlocks(Shard.load(chain.inputs["kl"]["corpus"] / "train.npz"), 61, 3).batch(step, 2).loss_mask.sum()
        for step in range(STEPS)
    )
    nll = -log_q.gather(1, targets[mask][:, None]).mean().item()
    soft_p, soft_q = (log_softmax(t / 2, -1) for t in (log_p, log_q))
    reverse = 4 * (soft_q.exp() * (soft_q - soft_p)).sum(-1).mean().item()
    other = KL.model_copy(update={"steps": 1, "loss": "reverse", "temperature": 2.0, "ce_weight": 0.5})
    summary, _ = run(kl_distill, other, chain.out["align"])
    assert summary["loss_first"] == pytest.approx(reverse + 0.5 * nll, rel=1e-4)
    weighed = KL.model_copy(update={"steps": 1, "kl_weight": 0.1, "ce_weight": 1.0})
    summary, _ = run(kl_distill, weighed, chain.out["align"])
    assert summary["loss_first"] == pytest.approx(0.1 * forward + nll, rel=1e-4)


def test_sft_scores_replies_only_or_all(chain, run):
    batch = first_batch(chain.inputs["sft"], SFT)
    text, seq_idx, targets = tensors(batch.tokens, batch.seq_idx, batch.targets)
    made = token_batches(
        chain.inputs["sft"]["corpus"] / "train.npz", SFT, tiny_stages.context(Path()), "assistant_loss"
    )(0)
    scored = made.data.mask
    assert made.tokens == scored.sum()
    read = ""
    for at, token in enumerate(
        batch.tokens[0]
    ):  # the first row begins with a document; who speaks is read off the text
        read += tiny_stages.tiny.tokenizer().decode([int(token)])
        in_reply = read.rfind("<|im_start|>assistant\n") > read.rfind("<|im_end|>")
        assert scored[0, at] == in_reply, repr(read[-40:])
    assert 0.2 < scored.float().mean() < 0.8
    student = load_pretrained(chain.inputs["sft"]["student"])
    nll = -log_softmax(student(text, seq_idx).double(), -1).gather(2, targets[..., None])[..., 0]
    assert chain.summary["sft"]["loss_first"] == pytest.approx(nll[scored].mean().item(), rel=1e-4)
    whole = nll[torch.from_numpy(batch.loss_mask)].mean().item()
    assert whole != pytest.approx(nll[scored].mean().item(), rel=1e-2)
    summary, _ = run(sft, SFT.model_copy(update={"steps": 1, "tokens": "all"}), chain.out["kl"])
    assert summary["loss_first"] == pytest.approx(whole, rel=1e-4)


def test_sft_leaves_out_what_holds_no_reply(chain, tmp_path):
    """A batch of a long plain document would hold no token that counts."""
    shard = Shard.load(chain.inputs["sft"]["corpus"] / "train.npz")
    plain = np.arange(2000, dtype=np.uint32) % 300
    documents = [*(shard.document(i) for i in range(len(shard))), plain]
    masks = [*np.split(shard.assistant, shard.starts[1:-1]), np.zeros(len(plain), bool)]
    Shard.of(documents, [*shard.ids, "plain"], masks).save(tmp_path / "train.npz")
    context = tiny_stages.context(tmp_path)
    mixed, own = (
        token_batches(folder / "train.npz", SFT, context, "assistant_loss")
        for folder in (tmp_path, chain.inputs["sft"]["corpus"])
    )
    assert all(torch.equal(mixed(number).data.tokens, own(number).data.tokens) for number in range(30))
    names = {
        name for number in range(30) for name in token_batches(tmp_path / "train.npz", SFT, context)(number).documents
    }
    assert "plain" in names


# Preferences


def test_dpo_with_pairs_of_its_own(chain):
    summary = chain.summary["dpo"]
    assert 2 <= summary["pairs"] <= 8
    assert summary["loss_first"] != pytest.approx(math.log(2), abs=1e-3), "the reference is the teacher"
    assert summary["accuracy_last"] >= summary["accuracy_first"]


def test_dpo_against_the_policy_starts_at_ln_2(chain, run):
    config = DPO.model_copy(update={"reference": "policy", "steps": 6, "accumulation": 2, "mixer_lr": 1e-2})
    summary, _ = run(dpo, config, chain.out["sft"])
    assert summary["loss_first"] == pytest.approx(math.log(2), rel=1e-5)
    assert summary["accuracy_first"] == 0.0
    assert summary["accuracy_last"] > 0.5


@pytest.fixture
def with_preferences(upstream, tmp_path) -> Callable[[list[dict[str, Any]]], Path]:
    def writes(records):
        corpus = tmp_path / "with_preferences"
        corpus.mkdir()
        for name in ("train.npz", "held_out.npz"):
            (corpus / name).symlink_to(upstream["corpus"] / name)
        write_jsonl(corpus / "preferences.jsonl", records)
        return corpus

    return writes


def test_dpo_with_given_preferences(chain, run, with_preferences):
    corpus = with_preferences([tiny_stages.preference(n) for n in range(5)])
    summary, _ = run(dpo, DPO.model_copy(update={"pairs": 4, "steps": 10}), chain.out["sft"], corpus=corpus)
    assert summary["pairs"] == 4
    assert summary["loss_last"] < summary["loss_first"]


def test_dpo_needs_pairs_that_differ(chain, run, with_preferences):
    same = tiny_stages.preference(0)
    corpus = with_preferences([{**same, "rejected": same["chosen"]}, tiny_stages.preference(1)])
    with pytest.raises(PreferenceError, match=r"1 of 2 preference pairs.*dpo.batch_size is 2"):
        run(dpo, DPO, chain.out["sft"], corpus=corpus)


# Half precision


def test_bfloat16_products_keep_trained_weights_in_float32(run):
    """The whole way in the default data type, in the process that ran float32 before."""
    _, student = run(init_from_attention, INIT, compute="bfloat16")
    kinds = {(".mamba." in n, p.dtype) for n, p in load_pretrained(student).named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    _, student = run(align, ALIGN.model_copy(update={"steps": 2}), student, "bfloat16")
    kinds = {(".mamba." in n, p.dtype) for n, p in load_pretrained(student).named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    for stage, config in ((kl_distill, KL), (sft, SFT), (dpo, DPO)):
        summary, student = run(stage, config.model_copy(update={"steps": 2}), student, "bfloat16")
        assert {p.dtype for p in load_pretrained(student).parameters()} == {torch.float32}
        assert math.isfinite(summary["loss_last"])


def test_training_a_student_without_mixers_is_an_error(run):
    _, student = run(init_from_attention, INIT.model_copy(update={"attention": "1"}))
    with pytest.raises(ValueError, match="nothing to train"):
        run(kl_distill, KL.model_copy(update={"rest_lr": 0.0}), student)
