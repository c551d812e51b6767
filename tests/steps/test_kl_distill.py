"""Distilling another model than the one the student was made of."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import log_softmax

from corpora import sources
from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import load_pretrained
from steps import config, init_from_attention, kl_distill, pipeline
from steps.config import InitStageConfig, KLConfig
from steps.kl_distill import LargerTeacherError
from tests.corpora import tiny
from tests.steps import tiny_stages

KL = KLConfig(steps=2, batch_size=2, seq_len=61, mixer_lr=3e-3, rest_lr=1e-3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    found = tiny_stages.upstream(tmp_path_factory.mktemp("upstream"))
    out = tmp_path_factory.mktemp("student")
    settings = InitStageConfig(attention=[1], tokens=256, batch_size=2, seq_len=64, measure_paper=False)
    init_from_attention.run(settings, found, out, tiny_stages.context(out))
    return {**found, "student": out}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("larger"), num_hidden_layers=4, hidden_size=64)


def run(inputs, folder, **changes):
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    out.mkdir()
    return kl_distill.run(KL.model_copy(update=changes), inputs, out, tiny_stages.context(folder)), out


@pytest.mark.parametrize("cache", ["none", "top_k:320"])
def test_another_teacher_is_the_one_that_teaches(inputs, larger, tmp_path, cache):
    summary, out = run(inputs, tmp_path, teacher=f"file:{larger}", teacher_cache=cache)
    batch = PackedBlocks(Shard.load(inputs["corpus"] / "train.npz"), 61, 3).batch(0, 2)
    text, seq_idx, mask = (torch.from_numpy(a) for a in (batch.tokens, batch.seq_idx, batch.loss_mask))
    taught = load_pretrained(larger, dtype=torch.bfloat16).float()  # as the teacher stage keeps weights
    log_p, log_q = (
        log_softmax(model(text, seq_idx)[mask].double(), -1) for model in (taught, load_pretrained(inputs["student"]))
    )
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert summary["loss_first"] == pytest.approx(wanted, rel=2e-3)
    assert summary["teacher"]["source"] == f"file:{larger}"
    assert summary["teacher"]["fingerprint"] == sources.fingerprint(f"file:{larger}")
    assert summary["teacher"]["held_out"]["kl"] != pytest.approx(summary["held_out"]["kl"], rel=1e-2)
    own = (inputs["teacher"] / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == own


def test_another_vocabulary_is_refused_with_both_numbers(inputs, tmp_path):
    other = tiny.save_llama(tmp_path / "other", vocab_size=352)
    with pytest.raises(LargerTeacherError, match=r"kl_distill\.teacher file:.*has 352 tokens, the student's 320"):
        run(inputs, tmp_path, teacher=f"file:{other}")


def test_another_tokenizer_is_refused_with_both_numbers(inputs, tmp_path):
    other = tiny.save_llama(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|fin|>"))
    tokens = len(tiny.tokenizer().get_vocab())
    with pytest.raises(LargerTeacherError, match=rf"has {tokens + 1} tokens, the student's {tokens}, and {tokens - 1}"):
        run(inputs, tmp_path, teacher=f"file:{other}")


def test_the_other_teachers_bytes_are_part_of_the_key(tmp_path):
    (tmp_path / "teacher.gguf").write_bytes(b"one")
    own = config.parse_text(
        '[teacher]\nsource = "file:t"\n[corpus]\nsources = ["file:c"]\n[variants.half]\n'
        '[kl_distill]\nteacher = "file:teacher.gguf"\n'
    )
    refs = {name: {"key": name} for name in ("teacher", "corpus", "init_from_attention")}
    stage = pipeline.BY_NAME["kl_distill"]
    payloads = []
    for content in (b"one", b"two"):
        (tmp_path / "teacher.gguf").write_bytes(content)
        for name in pipeline.FIRST_PARTY:
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(sources.PROJECT_ROOT / name)
        payloads.append(pipeline.payload_of(stage, "half", own, refs, tmp_path))
    assert list(payloads[0]["data"]) == ["file:teacher.gguf"]
    assert payloads[0]["data"] != payloads[1]["data"]
    assert {**payloads[0], "data": None} == {**payloads[1], "data": None}
