"""Processes of a training stage: started, heard, and gone with the stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stage_store import Store
from steps import config, gang, pipeline
from steps.stage import Progress
from tests.steps import gang_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Store(tmp_path / "store")
    return tmp_path


def test_a_stage_runs_on_two_processes_and_tells_of_process_0(scratch):
    told: list[Progress] = []
    summary, memory = gang.run(gang_stage.job(scratch), 2, told.append)
    assert summary == {
        "seats": [{"rank": 0, "checkpoints": True}, {"rank": 1, "checkpoints": False}],
        "mean": 0.5,
        "steps": 0,
        "inputs": ["corpus"],
    }
    assert memory["peak_rss_bytes"] > 0
    assert told == [Progress(1, 1, "steps", 2.0, {"loss": 0.0})]


def test_what_one_process_refuses_is_the_stages_one_line(scratch):
    with pytest.raises(gang.GangFailed, match="^ConfigError: batch_size 3 cannot be shared$") as failed:
        gang.run(gang_stage.job(scratch, seed=1), 2, lambda _: None)
    assert pipeline.foreseen(failed.value)


def test_an_end_without_a_word_is_no_one_line(scratch, monkeypatch):
    monkeypatch.setattr(gang.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="align: its 2 processes ended with code 1") as failed:
        gang.run(gang_stage.job(scratch), 2, lambda _: None)
    assert not pipeline.foreseen(failed.value)


def test_nothing_is_left_of_a_stage_that_is_killed(scratch):
    stage = subprocess.Popen([sys.executable, gang_stage.__file__, str(scratch)], cwd=ROOT, env=os.environ)
    files = [scratch / f"{gang_stage.WAITING}{rank}" for rank in (0, 1)]
    while not all(file.is_file() and file.read_text() for file in files):
        assert stage.poll() is None
        time.sleep(0.05)
    left = {int(pid) for file in files for pid in file.read_text().split()}
    assert len(left) == 3, "two processes and torchrun"
    stage.kill()
    stage.wait()
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if _alive(pid)}
        time.sleep(0.05)
    assert not left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_only_training_stages_take_several_gpus_and_a_cpu_only_if_told():
    leaves = ["resources.align.gpu=4", "resources.sft.gpu=2", "resources.sft.processes=3", "resources.benchmark.gpu=2"]
    chosen = config.override(config.load(ROOT / "configs" / "smollm2_cpu.toml"), leaves)

    def processes(name: str, kind: str) -> int:
        return pipeline.BY_NAME[name].processes(chosen, kind)

    assert (processes("align", "cuda"), processes("align", "cpu")) == (4, 1)
    assert (processes("sft", "cuda"), processes("sft", "cpu")) == (3, 3)
    assert (processes("dpo", "cuda"), processes("benchmark", "cuda"), processes("corpus", "cuda")) == (1, 1, 1)
