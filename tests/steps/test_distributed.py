"""Two and four processes against one: the same losses, the same weights, each other's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steps import distributed
from steps.config import ConfigError
from steps.students import token_batches
from tests.steps import processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Scenario → student and summary, on this process alone."""
    folder = tmp_path_factory.mktemp("one")
    runs = {name: run for name, run in processes.SCENARIOS.items() if name != "continued"}
    return {name: run(folder) for name, run in runs.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of what two processes made; in its folder `stopped` is a checkpoint of a run that one process stopped."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "stopped").mkdir()
    processes.run_stopped(folder / "stopped")
    launch(2, folder)
    return folder


@pytest.fixture(scope="module")
def four(two, tmp_path_factory) -> Path:
    """Folder of what four processes made, one row of a micro-batch each; `continued` from where two had stopped."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "0", folder / "stopped")
    launch(4, folder, "kl", "continued")
    return folder


def launch(count: int, folder: Path, *names: str) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", processes.__file__]
    done = subprocess.run(
        [sys.executable, *command, str(folder), *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def assert_same_run(summary, weights, wanted) -> None:
    model, expected = wanted
    assert [loss for _, loss in summary["curve"]] == pytest.approx([loss for _, loss in expected["curve"]], rel=1e-4)
    for counted in ("tokens", "positions", "flops_per_token", "trained_parameters"):
        assert summary[counted] == expected[counted]
    start = dict(processes.student().named_parameters())
    for name, p in model.named_parameters():
        moved = (p - start[name]).norm()
        # Adam turns rounding of tiny gradients into full steps.
        assert (weights[name] - p).norm() <= 1e-2 * moved, name


@pytest.mark.parametrize("name", ["align", "kl", "kl in two", "kl cached", "sft"])
def test_two_processes_train_as_one_does(one, two, name):
    summary = json.loads((two / f"{name}.json").read_text())
    assert summary["processes"] == 2
    assert_same_run(summary, load_file(two / f"{name}.safetensors"), one[name])


def test_accumulation_is_a_mean_over_all_tokens_of_the_step(one):
    model, summary = one["kl in two"]
    assert_same_run(summary, dict(model.named_parameters()), one["kl"])


def test_processes_share_tokens_that_count_unequally(two, monkeypatch):
    """What makes the comparisons above worth something; one of them has none at all in some micro-batch."""
    shares = {"loss_mask": [], "assistant_loss": []}
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for mask, found in shares.items():
            batch = token_batches(processes.shard(two), processes.KL, processes.context(two), mask)
            found.append([batch(number).share for number in range(6)])
            assert all(batch(number).data.mask.any() for number in range(6))
    for first, second in shares.values():
        assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx([1.0] * 6)
        assert any(abs(a - 0.5) > 0.01 for a in first)
    assert 0.0 in (*shares["assistant_loss"][0], *shares["assistant_loss"][1])


@pytest.mark.parametrize("name", ["kl", "continued"])
def test_four_processes_train_as_one_does(one, four, name):
    """`continued` on from a checkpoint that two of them wrote, which is whole."""
    summary = json.loads((four / f"{name}.json").read_text())
    assert summary["processes"] == 4
    assert_same_run(summary, load_file(four / f"{name}.safetensors"), one["kl"])


def test_stopped_on_two_goes_on_on_one(one, two, tmp_path):
    kept = processes.checkpoints(two / "0")
    assert kept.latest()[0] == 4
    model, summary = processes.run_kl(tmp_path, kept=kept)
    assert_same_run(summary, dict(model.named_parameters()), one["kl"])


def test_stopped_on_one_goes_on_on_two(one, two):
    assert_same_run(
        json.loads((two / "continued.json").read_text()), load_file(two / "continued.safetensors"), one["kl"]
    )


def test_rows_are_shared_equally_or_not_at_all(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 2)
    assert distributed.own_rows(8) == slice(4, 6)
    for rows in (6, 2):
        with pytest.raises(ConfigError, match=f"accumulation is {rows}, which 4 processes cannot share.*multiple of 4"):
            distributed.own_rows(rows)


def test_one_process_is_its_own_group():
    model = processes.student()
    assert distributed.gathered(model) is model
    assert (distributed.rank(), distributed.world_size(), distributed.agreed("a")) == (0, 1, "a")
    assert distributed.mean(torch.tensor(3.0)) == 3.0
    assert distributed.own_rows(5) == slice(0, 5)
