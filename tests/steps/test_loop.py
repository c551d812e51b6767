from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steps.config import TrainConfig
from steps.loop import MicroBatch, TrainingFailed, rate_factor, select_parameters, train
from tests.steps import training
from tests.steps.training import batches, context, loss_function, student

ROOT = Path(__file__).parents[2]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class FolderCheckpoints:
    """What the loop asks of a store, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, []

    def save(self, step, write) -> None:
        (self.folder / str(step)).mkdir(parents=True)
        write(self.folder / str(step))
        self.steps.append(step)

    def latest(self):
        return (self.steps[-1], self.folder / str(self.steps[-1])) if self.steps else None


# What trains, and how fast


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ("mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("norms", {"input_layernorm", "post_attention_layernorm", "model.norm"}),
        ("embeddings", {"model.embed_tokens", "lm_head"}),
    ],
)
def test_a_frozen_part_is_left_out_whatever_the_rate(frozen, kept):
    model = student(tie_word_embeddings=False)
    _, (_, rest) = select_parameters(model, TrainConfig(mixer_lr=1e-3, rest_lr=1e-3, frozen=[frozen]))
    left_out = {name.removesuffix(".weight") for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".", 3)[-1] if ".layers." in name else name for name in left_out} == kept
    assert rest.keys() == {n for n, p in model.named_parameters() if p.requires_grad and ".mamba." not in n}


@pytest.mark.parametrize(("mixer_lr", "rest_lr"), [(1e-3, 0.0), (0.0, 1e-4), (1e-3, 1e-4)])
def test_selected_parameters_train_in_float32_and_the_others_stay(mixer_lr, rest_lr):
    model = student().bfloat16()
    before = weights(model)
    config = TrainConfig(mixer_lr=mixer_lr, rest_lr=rest_lr)
    groups = select_parameters(model, config)
    assert [rate for rate, _ in groups] == [mixer_lr, rest_lr]
    selected = {name for _, group in groups for name in group}
    assert selected == {name for name in before if (mixer_lr if ".mamba." in name else rest_lr) > 0}
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in selected)
        assert p.dtype == (torch.float32 if name in selected else torch.bfloat16)
        assert torch.equal(p.bfloat16(), before[name])
        if name in selected:
            assert groups[".mamba." not in name][1][name] is p


def test_steps_and_decays_may_have_a_rate_of_their_own():
    model = student()
    config = TrainConfig(mixer_lr=1e-3, rest_lr=1e-4, decay_lr_factor=20.0)
    mixers, rest, (rate, decays) = select_parameters(model, config)
    assert rate == pytest.approx(2e-2)
    assert {name.rsplit(".", 1)[1] for name in decays} == {"A_log", "dt_bias", "D"}
    assert len(decays) == 3 * len(model.config.mamba_layers)
    (_, plain), (_, same) = select_parameters(student(), config.model_copy(update={"decay_lr_factor": 1.0}))
    assert plain.keys() == mixers[1].keys() | decays.keys() and same.keys() == rest[1].keys()


@pytest.mark.parametrize(
    ("rates", "attention"), [({"mixer_lr": 0.0}, (1,)), ({"mixer_lr": 1e-3}, (0, 1))], ids=["no rate", "no mixer"]
)
def test_nothing_to_train_is_an_error(rates, attention):
    model = training.tiny_hybrid.model(n_layers=2, attention_layers=attention)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, batches, loss_function, TrainConfig(rest_lr=0.0, **rates), context())


def test_rates():
    config = TrainConfig(steps=100, warmup=0.1, min_lr=0.2)
    assert [rate_factor(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate_factor(10, config) == 1.0
    assert rate_factor(55, config) == pytest.approx(0.6), "half of the cosine"
    assert rate_factor(32, config) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    assert rate_factor(100, config) == rate_factor(1000, config) == pytest.approx(0.2)
    values = [rate_factor(step, config) for step in range(101)]
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert rate_factor(0, TrainConfig(steps=3, warmup=0.0)) == 1.0


def test_the_two_groups_have_their_own_rates():
    """Adam's first step is its rate in the direction of the gradient's sign."""
    model = student()
    before = weights(model)
    config = TrainConfig(steps=1, batch_size=2, warmup=0.0, mixer_lr=1e-2, rest_lr=1e-4, grad_clip=1e9)
    train(model, batches, loss_function, config, context())
    for name, p in model.named_parameters():
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(1e-2 if ".mamba." in name else 1e-4, rel=0.01)


def test_is_plain_adamw():
    """Two steps by hand: clipping, schedule, decay of matrices alone."""
    config = TrainConfig(
        steps=2,
        batch_size=2,
        warmup=0.5,
        mixer_lr=1e-2,
        rest_lr=1e-3,
        weight_decay=0.1,
        grad_clip=0.5,
        betas=(0.8, 0.9),
    )
    ours, other = student(), student().requires_grad_().train()  # one form of every sum
    summary = train(ours, batches, loss_function, config, context())
    named = dict(other.named_parameters())
    kinds = [(True, True), (True, False), (False, True), (False, False)]  # (is a mixer's, is a matrix)
    groups = [
        {
            "params": [p for n, p in named.items() if (".mamba." in n, p.ndim > 1) == kind],
            "weight_decay": 0.1 if kind[1] else 0.0,
        }
        for kind in kinds
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    losses = []
    for step in range(2):
        loss, _ = loss_function(other, batches(step).data)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        assert norm > 0.5
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-2, 1e-3, 1e-3), strict=True):
            group["lr"] = rate * rate_factor(step, config)
        optimizer.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-6)
    assert [loss for _, loss in summary["curve"]] == pytest.approx(losses, rel=1e-5)


def test_accumulation_is_a_larger_batch():
    def whole(number: int) -> MicroBatch:
        parts = [batches(3 * number + i) for i in range(3)]
        return MicroBatch(torch.cat([p.data for p in parts]), sum(p.tokens for p in parts), ())

    rates = {"steps": 3, "batch_size": 6, "mixer_lr": 1e-3, "rest_lr": 1e-3, "warmup": 0.0, "grad_clip": 0.5}
    large, small = student(), student()
    first = train(large, whole, loss_function, TrainConfig(**rates), context())
    second = train(small, batches, loss_function, TrainConfig(**rates, accumulation=3), context())
    assert first["tokens"] == second["tokens"] == 3 * 6 * 12
    assert second["loss_last"] == pytest.approx(first["loss_last"], rel=1e-5)
    start = weights(student())
    for (name, a), b in zip(weights(large).items(), weights(small).values(), strict=True):
        moved = (a - start[name]).norm()
        assert moved > 0
        assert (a - b).norm() < 1e-2 * moved  # Adam turns rounding of tiny gradients into full steps


def test_frozen_parameters_keep_type_and_value():
    model = student()
    for name, p in model.named_parameters():
        if ".mamba." not in name:
            p.data = p.data.bfloat16()
    before = weights(model)
    config = TrainConfig(steps=2, batch_size=2, mixer_lr=1e-2, rest_lr=0.0)
    summary = train(model, batches, loss_function, config, context(compute="bfloat16"))
    for name, p in model.named_parameters():
        changed = not torch.equal(p, before[name])
        assert changed == (".mamba." in name)
        assert p.dtype == (torch.float32 if ".mamba." in name else torch.bfloat16)
        assert not p.requires_grad
    assert not model.training
    assert summary["trained_parameters"] == sum(p.numel() for n, p in before.items() if ".mamba." in n)


def test_compute_types_may_follow_each_other_in_one_process():
    """float32 after bfloat16 after float32: nothing of a run before may stay behind."""
    config = TrainConfig(steps=2, batch_size=2, mixer_lr=1e-3)
    losses = [
        train(student(), batches, loss_function, config, context(compute=compute))["loss_last"]
        for compute in ("float32", "bfloat16", "float32")
    ]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_model_computes_afterwards_as_before():
    """No autocast is left on it: a float32 model gives float32 products."""
    model = student()
    train(model, batches, loss_function, TrainConfig(steps=1, batch_size=2), context(compute="bfloat16"))
    text = training.tiny_hybrid.tokens(1, 5)
    hidden = model.hidden(text)
    torch.testing.assert_close(model(text), hidden @ model.lm_head_weight.T, rtol=0, atol=1e-5)


def test_no_steps_change_nothing():
    model = student()
    before = weights(model)
    summary = train(model, batches, loss_function, TrainConfig(steps=0), context())
    assert (summary["steps"], summary["tokens"], summary["loss_first"], summary["curve"]) == (0, 0, None, [])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_summary():
    _, summary = training.run(None)
    assert (summary["steps"], summary["tokens"]) == (9, 9 * 2 * 24)
    assert [step for step, _ in summary["curve"]] == list(range(1, 10))
    assert summary["loss_first"] == summary["curve"][0][1]
    assert summary["loss_last"] == pytest.approx(sum(loss for _, loss in summary["curve"]) / 9)
    assert summary["train_seconds"] > 0
    assert (summary["processes"], summary["utilisation"], summary["peak_memory_bytes"]) == (1, None, None), "a CPU"


def test_progress_is_told(monkeypatch):
    monkeypatch.setattr("steps.loop.REPORT_SECONDS", 0.0)
    told = []
    stage = context()
    stage = type(stage)(**{**vars(stage), "progress": told.append})
    train(
        student(), batches, lambda m, d: (loss_function(m, d)[0], {"worst": torch.tensor(7.0)}), training.CONFIG, stage
    )
    assert [p.done for p in told] == list(range(1, 10))
    assert {p.total for p in told} == {9}
    assert set(told[0].figures) == {"loss", "tokens/s", "worst"}
    assert told[0].figures["worst"] == 7.0
    assert told[0].rate > 0


def test_utilisation_is_told_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr("steps.loop.peak_flops", lambda device: 1e9)
    model = student()
    summary = train(model, batches, loss_function, training.CONFIG, context(), forward_flops=1000)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "A_log" not in n)
    assert summary["flops_per_token"] == 6 * weights + 1000, "the head is the embedding, so the look-up is not counted"
    assert summary["utilisation"] == pytest.approx(
        summary["flops_per_token"] * summary["tokens_per_second"] / 1e9, rel=0.01
    )


def test_rates_count_all_positions_and_leave_out_the_time_of_compilation(monkeypatch):
    clock = iter([0.0, *(n / 2 for n in range(1, 100))])
    monkeypatch.setattr("steps.loop.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("steps.loop.CHECK_EVERY", 1)
    wide = lambda number: dataclasses.replace(batches(number), positions=100)  # noqa: E731
    summary = train(student(), wide, loss_function, TrainConfig(steps=5, batch_size=2), context())
    assert (summary["tokens"], summary["positions"]) == (5 * 24, 500)
    assert summary["tokens_per_second"] == pytest.approx(400 / (summary["train_seconds"] - 1.0), rel=0.01)


# Work beside the training


def working_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("batches", "checkpoint"))}


class FailingCheckpoints(FolderCheckpoints):
    def save(self, step, write) -> None:
        raise OSError("no space left")


def raises_at(number: int):
    def batch(asked: int) -> MicroBatch:
        if asked == number:
            raise RuntimeError("bad shard")
        return batches(asked)

    return batch


@pytest.mark.parametrize("end", ["done", "batches", "loss", "checkpoint"])
def test_no_thread_is_left(tmp_path, end):
    source = raises_at(5) if end == "batches" else batches
    loss = (lambda model, data: 1 / 0) if end == "loss" else loss_function
    checkpoints = FailingCheckpoints(tmp_path) if end == "checkpoint" else FolderCheckpoints(tmp_path)
    expected = {"batches": RuntimeError, "loss": ZeroDivisionError, "checkpoint": OSError}.get(end)
    with pytest.raises(expected) if expected else nullcontext():
        train(student(), source, loss, training.CONFIG, context(checkpoints))
    assert working_threads() == set()


def test_the_next_batches_are_packed_during_a_pass():
    asked: list[int] = []
    seen = threading.Event()

    def source(number: int) -> MicroBatch:
        asked.append(number)
        if number == 2:
            seen.set()
        return batches(number)

    def loss(model, data):
        assert seen.wait(20), "the third is not packed while the first one is trained on"
        return loss_function(model, data)

    train(student(), source, loss, TrainConfig(steps=4, batch_size=2), context())
    assert asked == [0, 1, 2, 3]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """What is written is the state of its step all the same."""
    passed = threading.Event()

    class Slow(FolderCheckpoints):
        def save(self, step, write) -> None:
            assert passed.wait(20), "nothing is trained on while the checkpoint of step 2 is written"
            super().save(step, write)

    def loss(model, data):
        passes.append(data)
        if len(passes) > 2 * 2 + 1:
            passed.set()
        return loss_function(model, data)

    passes: list[torch.Tensor] = []
    slow, plain = Slow(tmp_path / "slow"), FolderCheckpoints(tmp_path / "plain")
    train(student(), batches, loss, training.CONFIG.model_copy(update={"steps": 4}), context(slow))
    train(student(), batches, loss_function, training.CONFIG.model_copy(update={"steps": 4}), context(plain))
    for file in ("trained.safetensors", "state.safetensors"):
        ours, theirs = (load_file(kept.folder / "2" / file) for kept in (slow, plain))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Failing


def failing(values: dict[int, float]):
    """A loss of 1, or what `values` says of the micro-batch."""
    return lambda model, number: (next(model.parameters()).sum() * 0 + values.get(number, 1.0), {})


def numbered(number: int) -> MicroBatch:
    return MicroBatch(number, 1, tuple(f"d{number}.{i}" for i in range(5)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_step_documents_and_checkpoint(tmp_path, value):
    config = TrainConfig(steps=8, batch_size=2, accumulation=2, rest_lr=1e-3, checkpoint_every=2)
    with pytest.raises(TrainingFailed) as failed:
        train(student(), numbered, failing({9: value}), config, context(FolderCheckpoints(tmp_path)))
    message = str(failed.value)
    assert f"loss is {value} at step 5 of 8" in message
    assert "documents: d8.0, d8.1, d8.2, d8.3, d8.4, d9.0, d9.1, d9.2 and 2 more" in message
    assert "last good checkpoint: step 4" in message


def test_a_bad_state_is_never_saved(tmp_path):
    checkpoints = FolderCheckpoints(tmp_path)
    config = TrainConfig(steps=8, batch_size=2, rest_lr=1e-3, checkpoint_every=4)
    with pytest.raises(TrainingFailed, match="at step 4 of 8.*last good checkpoint: none"):
        train(student(), numbered, failing({3: math.nan}), config, context(checkpoints))
    assert checkpoints.steps == []


def test_divergence_is_noticed():
    config = TrainConfig(steps=60, batch_size=2, rest_lr=1e-3)
    with pytest.raises(TrainingFailed, match=r"diverges \(smoothed 3\.\d+, lowest 1\) at step 29 of 60"):
        train(student(), numbered, failing(dict.fromkeys(range(20, 60), 4.5)), config, context())


def test_a_short_peak_and_a_high_plateau_are_no_divergence():
    config = TrainConfig(steps=40, batch_size=2, rest_lr=1e-3)
    train(student(), numbered, failing({20: 15.0}), config, context())
    high = {n: 10.0 for n in range(40)} | {n: 2.0 for n in range(10, 30)}
    train(student(), numbered, failing(high), config, context())


# Going on after a crash


@pytest.fixture(scope="module")
def undisturbed():
    model, summary = training.run(None)
    return weights(model), summary


def assert_same_end(model, summary, undisturbed) -> None:
    wanted, wanted_summary = undisturbed
    for name, p in model.named_parameters():
        assert torch.equal(p, wanted[name]), name
    assert summary["curve"] == wanted_summary["curve"]
    assert summary["tokens"] == wanted_summary["tokens"]


def test_killed_and_continued_is_undisturbed(tmp_path, undisturbed):
    """kill −9 in step 7, with the checkpoint of step 6 on the disk; the rest runs here."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, str(Path(training.__file__)), str(tmp_path), "15"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "waiting\n"
    checkpoints = training.store_checkpoints(tmp_path)
    while checkpoints.latest() is None or checkpoints.latest()[0] < 6:  # it is written behind the training
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()

    assert checkpoints.latest()[0] == 6
    asked = []
    model, summary = training.run(checkpoints, lambda number: asked.append(number) or batches(number))
    assert asked == list(range(12, 18)), "the data goes on where the checkpoint was"
    assert_same_end(model, summary, undisturbed)


def test_a_broken_checkpoint_is_passed_over(tmp_path, undisturbed):
    def stops(number: int) -> MicroBatch:
        if number == 11:
            raise KeyboardInterrupt
        return batches(number)

    checkpoints = training.store_checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        training.run(checkpoints, stops)
    step, folder = checkpoints.latest()
    assert step == 4
    file = folder / "trained.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    model, summary = training.run(checkpoints)
    assert_same_end(model, summary, undisturbed)


def test_checkpoints_are_taken_as_configured(tmp_path, undisturbed):
    checkpoints = FolderCheckpoints(tmp_path)
    model, summary = training.run(checkpoints)
    assert checkpoints.steps == [2, 4, 6, 8], "none at the very end: the stage's output is that"
    assert_same_end(model, summary, undisturbed)
