from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import subject_of, tiny

from corpora.shards import Shard
from evals import efficiency
from steps.config import EfficiencyConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    Shard.of([np.arange(3, 40, dtype=np.uint32), np.arange(5, 23, dtype=np.uint32)], ["a", "b"]).save(
        folder / "held_out.npz"
    )
    return folder


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the engine, whose calls take `warm_up` twice, then 1, 2, 4, 3, … seconds to decode and twice as
    long to read; what it was given. `fail` may raise for a shape (batch, max_length)."""
    seen = SimpleNamespace(options=[], prompts=[], tokens=[], warm_up=0.5, fail=lambda batch, max_length: None)

    class Engine:
        def __init__(self, model, **options):
            seen.options.append(options)
            seen.fail(options["batch"], options["max_length"])
            self.seconds = iter([seen.warm_up, seen.warm_up, 1.0, 2.0, 4.0, 3.0, 8.0])

        def generate(self, prompts, max_new_tokens):
            seen.prompts.append(prompts)
            seen.tokens.append(max_new_tokens)
            seconds = next(self.seconds)
            return SimpleNamespace(decode_seconds=seconds, prefill_seconds=2 * seconds)

    monkeypatch.setattr(efficiency, "DecodeEngine", Engine)
    return seen


def measured(model, corpus: Path, config: EfficiencyConfig, teacher=None, progress: Callable = lambda *_: None) -> dict:
    found = efficiency.measure(subject_of(model, teacher, corpus, progress), config)
    assert found.records == []
    return found.summary


def test_reading_and_writing_are_apart_with_median_and_quartiles(teacher, corpus, engine):
    config = EfficiencyConfig(batches=[2], contexts=[61], tokens=12, repeats=5)
    summary = measured(teacher, corpus, config)
    assert summary["decode"] == [  # 24 tokens in 1, 2, 4, 3 and 8 seconds
        {"batch": 2, "context": 61, "tokens_per_second": 8.0, "low": 6.0, "high": 12.0, "repeats": 5, "oom": False}
    ]
    assert summary["prefill"] == [  # 120 tokens in twice the time: the prompts' last ones are read by decoding
        {"batch": 2, "context": 61, "tokens_per_second": 20.0, "low": 15.0, "high": 30.0, "repeats": 5, "oom": False}
    ]
    assert summary["dtype"] == "float32"


def test_every_batch_meets_every_context_and_no_reply_ends_early(teacher, corpus, engine):
    said: list[tuple[float, str]] = []
    config = EfficiencyConfig(batches=[4, 1], contexts=[70, 8], tokens=12, repeats=2)
    summary = measured(teacher, corpus, config, progress=lambda *call: said.append(call))
    grid = [(1, 8), (1, 70), (4, 8), (4, 70)]
    assert [(c["batch"], c["context"]) for c in summary["decode"]] == grid
    assert [(c["batch"], c["context"]) for c in summary["prefill"]] == grid
    assert engine.options == [{"batch": b, "max_length": c + 12, "eos_token_ids": ()} for b, c in grid]
    assert engine.tokens == [1, efficiency.WARM_UP_TOKENS, 12, 12] * 4
    assert [(len(p), len(p[0])) for p in engine.prompts[::4]] == grid
    assert engine.prompts[0][0].tolist() == list(range(3, 11))  # the corpus' own tokens
    assert [share for share, _ in said] == [0.25, 0.5, 0.75, 1.0]
    assert said[0][1] == "batch 1, context 8: 9 tokens/s"


def test_what_does_not_fit_is_marked_and_nothing_larger_is_tried(teacher, corpus, engine):
    def fail(batch, max_length):
        if batch * max_length > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    engine.fail = fail
    config = EfficiencyConfig(batches=[1, 2, 4], contexts=[4, 8, 16], tokens=4, repeats=2)
    summary = measured(teacher, corpus, config)
    for part in ("prefill", "decode"):
        assert [c["oom"] for c in summary[part]] == [False] * 3 + [False, True, True] + [True] * 3
    assert summary["decode"][4] == {
        "batch": 2, "context": 8, "tokens_per_second": None, "low": None, "high": None, "repeats": 0, "oom": True,
    }  # fmt: skip
    tried = [(o["batch"], o["max_length"] - 4) for o in engine.options]
    assert tried == [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 4)]


def test_memory_that_ran_out_behind_another_error_is_seen_and_other_errors_pass(teacher, corpus, engine):
    def hidden(batch, max_length):
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capture failed")

    engine.fail = hidden
    config = EfficiencyConfig(batches=[1], contexts=[4], tokens=4)
    assert measured(teacher, corpus, config)["decode"][0]["oom"]

    def broken(batch, max_length):
        raise RuntimeError("size mismatch")

    engine.fail = broken
    with pytest.raises(RuntimeError, match="size mismatch"):
        measured(teacher, corpus, config)


@pytest.mark.parametrize(("clock", "repeats"), [([0, 3, 9], 3), ([0, 6], 2), ([0, 1, 2, 3], 5)])
def test_a_cell_that_took_its_time_is_repeated_no_more_but_at_least_twice(
    teacher, corpus, engine, monkeypatch, clock, repeats
):
    times = iter(clock)  # at the beginning and before each repeat from the third on
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(monotonic=lambda: next(times)))
    config = EfficiencyConfig(batches=[1], contexts=[4], tokens=4, repeats=5, seconds_per_cell=5.0)
    assert measured(teacher, corpus, config)["decode"][0]["repeats"] == repeats


@pytest.mark.parametrize(("warm_up", "tokens"), [(0.5, 20), (1.0, 20), (2.5, 8), (40.0, 4)])
def test_replies_are_as_long_as_the_time_suffices_for(teacher, corpus, engine, warm_up, tokens):
    engine.warm_up = warm_up  # of 4 tokens
    config = EfficiencyConfig(batches=[1], contexts=[4], tokens=20, repeats=2, seconds_per_cell=10.0)
    found = measured(teacher, corpus, config)["decode"][0]
    assert engine.tokens == [1, 4, tokens, tokens]
    assert (found["low"], found["high"]) == (tokens * 0.625, tokens * 0.875)  # in 1 and in 2 seconds


def test_speeds_are_measured_for_real(teacher, student, corpus):
    config = EfficiencyConfig(batches=[1, 3], contexts=[9], tokens=3, repeats=2)
    summary = measured(student, corpus, config, teacher)
    for cell in summary["prefill"] + summary["decode"]:
        assert 0 < cell["low"] <= cell["tokens_per_second"] <= cell["high"]
        assert (cell["repeats"], cell["oom"]) == (2, False)


def test_without_batches_only_bytes_are_counted(teacher, student, corpus):
    summary = measured(student, corpus, EfficiencyConfig(batches=[]), teacher)
    assert summary["prefill"] == summary["decode"] == []
    assert [s["context"] for s in summary["state"]] == [512, 2048, 8192, 32768]
    assert summary["crossover"] > 0
    assert measured(teacher, corpus, EfficiencyConfig(batches=[]))["crossover"] is None


def test_state_bytes_grow_with_context_for_keys_and_values_only(teacher, student):
    found = efficiency.state_bytes(student, (512, 1024))
    assert [f["context"] for f in found] == [512, 1024]
    assert found[1]["kv"] == 2 * found[0]["kv"] > 0
    assert found[1]["ssm"] == found[0]["ssm"] > 0
    assert found[1]["conv"] == found[0]["conv"] > 0
    only_attention = efficiency.state_bytes(teacher, (512,))[0]
    assert only_attention["kv"] == 2 * 2 * 512 * 8 * 4  # layers · (k, v) · context · head_dim · bytes
    assert only_attention["ssm"] == only_attention["conv"] == 0


def test_what_is_allocated_is_what_was_computed(teacher, student):
    for model in (teacher, student, tiny(0, ())):
        for entry in efficiency.state_bytes(model, (1, 100)):
            assert entry["measured"] == entry["kv"] + entry["ssm"] + entry["conv"]


def test_bytes_that_do_not_fit_are_computed_and_not_measured(monkeypatch, student):
    def full(batch, context):
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = efficiency.state_bytes(student, (512,))[0]
    monkeypatch.setattr(student, "new_cache", full)
    assert efficiency.state_bytes(student, (512,)) == [expected | {"measured": None}]


@pytest.mark.parametrize("attention", [(), (0,), (1,)])
def test_crossover_is_the_first_context_with_fewer_bytes(teacher, attention):
    student = tiny(1, attention)
    found = efficiency.crossover(student, teacher)

    def total(model, context):
        return sum(model.cache_bytes(1, context).values())

    assert found is not None and found > 1
    assert total(student, found) < total(teacher, found)
    assert total(student, found - 1) >= total(teacher, found - 1)


def test_no_crossover_where_no_token_is_saved(teacher):
    assert efficiency.crossover(tiny(1, (0, 1)), teacher) is None


@pytest.mark.gpu
def test_cuda_memory_that_runs_out_is_caught_and_given_back(corpus):
    model = tiny(1, (1,)).to("cuda", torch.bfloat16)
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**27) / total)
    try:
        config = EfficiencyConfig(batches=[1, 4], contexts=[64, 2**22], tokens=8, repeats=2)
        summary = measured(model, corpus, config)
        for part in ("prefill", "decode"):  # what comes after the cell that does not fit is measured
            cells = {(c["batch"], c["context"]): c for c in summary[part]}
            assert [shape for shape, cell in cells.items() if cell["oom"]] == [(1, 2**22), (4, 2**22)]
            assert all(cell["tokens_per_second"] > 0 for cell in cells.values() if not cell["oom"])
            assert cells[1, 2**22]["tokens_per_second"] is None
        assert torch.cuda.memory_reserved() < 2**27
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_cuda_memory_of_a_cache_is_near_its_closed_form():
    model = tiny(1, (1,)).to("cuda", torch.bfloat16)
    for entry in efficiency.state_bytes(model, (4096, 2**20)):
        computed = entry["kv"] + entry["ssm"] + entry["conv"]
        assert computed <= entry["measured"] <= 1.1 * computed + 16 * 512  # the allocator rounds up
