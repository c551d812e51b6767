from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.bench.timed import RefusedError
from hybrid.bench.trace import Kernel
from hybrid.shapes import shape
from steps.bench import __main__, cases, naive, rows
from steps.bench.cases import LOADS, Bench, Settings
from steps.bench.clock import StepClock, StepProfile
from steps.bench.rows import NAIVE, OURS, Row
from steps.bench.trial import DOCUMENT_TOKENS, TRAINED, Trial, random_pairs, random_shard
from steps.stage import StageContext

TINY = LOADS["tiny-llama"].batches[0]


def run(*arguments: str) -> int:
    return __main__.main(["--device", "cpu", "--steps", "2", *arguments])


def result(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def trial(stage: str, scratch: Path, steps: int = 1) -> Trial:
    return Trial(stage, "tiny-llama", *TINY, steps, StageContext("cpu", "float32", 0, scratch), scratch)


def test_all_rows_run_on_a_cpu(tmp_path: Path, capsys: Any) -> None:
    assert run("--json", str(tmp_path / "bench.json"), "--profile") == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert {"hardware", "versions", "commit", "peak_flops", "utilisation", "seconds"} <= report.keys()
    found = [(row["stage"], row["form"]) for row in report["rows"]]
    assert found == [(stage, form) for stage in cases.NAMES for form in (OURS, NAIVE)]
    for row in report["rows"]:
        assert row["note"] == "" and row["targets"] == []  # targets are for a GPU
        assert row["ms"] > 0 and row["iqr_ms"] >= 0 and row["tokens_per_second"] > 0 and row["flops_per_token"] > 0
        assert row["utilisation"] is None and row["peak_memory_bytes"] is None
        assert (row["ratio"] is not None) == (row["form"] == NAIVE)
        assert (row["loss"] is not None) == (row["stage"] in TRAINED)
    profiled = [row["stage"] for row in report["rows"] if row["profile"]]
    assert profiled == list(cases.PROFILED)
    assert "kernels of one step of kl tiny-llama:" in text and "ours is" in text and "FLOP per token = 6·N" in text
    packed = next(row for row in report["rows"] if row["stage"] == "kl" and row["form"] == OURS)
    assert packed["steps"] == 2 and (packed["rows"], packed["length"]) == TINY
    assert packed["tokens_per_second"] == pytest.approx(math.prod(TINY) / packed["ms"] * 1e3, rel=0.5)


@pytest.mark.parametrize("stage", TRAINED)
def test_the_naive_form_computes_the_same(stage: str, tmp_path: Path) -> None:
    ours = trial(stage, tmp_path)
    form = naive.NaiveForm(stage, ours.teacher, ours.student, ours.config)
    first = form.fit(ours.batches, 2, ours.context)
    assert first == pytest.approx(ours.fit()["loss_first"], rel=1e-5)
    with torch.no_grad():
        assert form.loss(ours.batches(0).data).item() < first  # it learns


def test_work_per_token_by_hand(tmp_path: Path) -> None:
    config = shape("tiny-llama")
    mlp = 3 * 64 * 96
    attention = 64 * (64 + 32 + 32) + 64 * 64
    entering, leaving = 64 * (2 * 64 + 2 * 32 + 4), 64 * 64  # z, C, x, B and dt; layer 0 is the mixer
    head = 256 * 64
    teacher, student = 2 * (attention + mlp) + head, attention + entering + leaving + 2 * mlp + head
    assert config.n_layers == 2
    expected = {
        "align": 2 * (attention + mlp) + 4 * entering + 6 * leaving,
        "kl": 2 * teacher + 6 * student,
        "sft": 6 * student,
        "dpo": 6 * student,
    }
    assert {stage: trial(stage, tmp_path).fit()["flops_per_token"] for stage in TRAINED} == expected
    chat = Row("self-chat", "tiny-llama", OURS)
    Bench(Settings("cpu", "float32", ("tiny-llama",), chat_repeats=1), tmp_path)._chat(chat)
    assert chat.flops_per_token == 2 * teacher


def test_utilisation_is_work_over_what_the_gpu_could_do() -> None:
    row = Row("kl", "1b", OURS, flops_per_token=8_000_000_000)
    row.time(cases.Spread(100.0, 1.0, 10), 50_000.0, peak_flops=1e15)
    assert row.utilisation == pytest.approx(0.4)
    rows.judge(row)
    assert row.targets == [{"target": "≥ 40 % of the bf16 peak", "met": True, "missed_by": 0.0}]


def test_another_loss_than_the_naive_forms_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = naive.NaiveForm._kl
    monkeypatch.setattr(naive.NaiveForm, "_kl", lambda self, batch: right(self, batch) * 1.01)
    assert run("--only", "kl", "align", "--no-naive") == 1
    wrong, other = result(capsys)["rows"]
    assert wrong["note"].startswith("wrong: the first loss is") and wrong["ms"] is wrong["tokens_per_second"] is None
    assert other["stage"] == "align" and other["note"] == "" and other["ms"] > 0


def test_another_model_than_the_naive_forms_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def leaking(*args: Any, **_: Any) -> Any:
        return causal_conv(*args[:3], None)  # as if the documents of a row were one

    causal_conv = naive.causal_conv
    monkeypatch.setattr(naive, "causal_conv", leaking)
    monkeypatch.setattr(cases, "LOADS", {"tiny-llama": replace(LOADS["tiny-llama"], batches=((2, 512),))})
    assert run("--only", "sft", "--no-naive") == 1
    (row,) = result(capsys)["rows"]
    assert row["note"].startswith("wrong: hidden states differ") and row["ms"] is None


def test_a_row_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(Bench, "_chat", fails)
    assert run("--only", "self-chat") == 1
    ours, theirs = result(capsys)["rows"]
    assert ours["note"] == "failed: RuntimeError: out of something" and ours["ms"] is None
    assert theirs["ms"] > 0 and theirs["ratio"] is None


def test_what_does_not_fit_is_tried_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fit(row: Row, number: int, length: int) -> None:
        row.rows, row.length = number, length
        if number > limit:
            raise torch.OutOfMemoryError("no memory")

    bench, row, limit = Bench(Settings("cpu"), tmp_path), Row("kl", "1b", OURS), 16
    monkeypatch.setattr(cases, "LOADS", {"1b": replace(LOADS["1b"], batches=((32, 512), (16, 512), (8, 512)))})
    bench._in_largest_batch(row, fit)
    assert (row.rows, row.length, row.note) == (16, 512, "32×512 does not fit in memory")
    limit = 0
    with pytest.raises(RefusedError, match="no memory for 32×512, 16×512, 8×512"):
        bench._in_largest_batch(row, fit)


def test_what_begins_too_late_is_skipped(capsys: Any) -> None:
    assert run("--budget", "0") == 0
    assert all("skipped" in row["note"] and row["ms"] is None for row in result(capsys)["rows"])


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "needs an NVIDIA GPU" in said.err


def test_targets_are_for_our_form_at_its_shape() -> None:
    row = Row("kl", "smollm2", OURS, tokens_per_second=208e3, held_memory_bytes=15_000_000_000)
    rows.judge(row)
    speed, memory = row.targets
    assert speed == {"target": "≥ 260 k tokens/s", "met": False, "missed_by": pytest.approx(0.2)}
    assert memory == {"target": "≤ 12 GB", "met": False, "missed_by": pytest.approx(0.25)}
    assert "target ≥ 260 k tokens/s: MISSED by 20%" in rows.line(row)
    row.held_memory_bytes = None
    rows.judge(row)
    assert row.targets[1] == {"target": "≤ 12 GB", "met": None}
    for other in (Row("kl", "smollm2", NAIVE), Row("kl", "tiny-llama", OURS), Row("sft", "smollm2", OURS)):
        rows.judge(other)
        assert other.targets == []


def test_the_clock_times_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 30.0, 31.0, 33.0, 34.0, 35.0])  # the start; the first step as it ended; four marks
    monkeypatch.setattr("steps.bench.clock.time.perf_counter", lambda: next(seconds))
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    clock = StepClock("cpu", warm_up=2, steps=2)
    with clock:
        for _ in range(clock.steps):
            optimizer.step()
    optimizer.step()  # no longer its business
    assert clock.steps == 4 and clock.first_step_s == 30.0
    assert clock.milliseconds == [1000.0, 1000.0]


def test_a_step_whose_kernels_leave_gaps_is_launch_bound() -> None:
    kernels = [Kernel(f"k{i}", 1.0, 100.0) for i in range(40)]
    idle = StepProfile(kernels, 10.0, 4.0, host_ms=9.5, launches=40.0, waits=2.0, wait_ms=0.5)
    assert idle.launch_bound and "the device waits for the host" in idle.text("kl")
    assert not replace(idle, step_ms=4.2).launch_bound
    assert len(idle.to_dict()["kernels"]) == 25 and "all 40 kinds" in idle.text("kl")


def test_random_text_looks_like_a_corpus() -> None:
    shard = random_shard(256, 50_000)
    lengths = np.diff(shard.starts)
    assert lengths.min() >= DOCUMENT_TOKENS[0] and lengths.max() <= DOCUMENT_TOKENS[1]
    assert 190 < lengths.mean() < 210 and len(shard.tokens) >= 50_000
    assert 0.49 < shard.assistant.mean() < 0.52 and not shard.assistant[shard.starts[:-1]].any()
    pairs = random_pairs(256, 20, 64)
    assert all(pair.informative for pair in pairs)
    assert all(len(pair.prompt_tokens) + len(pair.chosen_tokens) <= 64 for pair in pairs)
