"""The whole flow with its real stages on a Llama of four small layers: no fake between teacher and report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.corpora import tiny
from tests.test_repository import needs_a_run, shell_lines

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("flows", "steps", "hybrid", "kernels_ext", "corpora", "evals", "stage_store", "reports", "configs")

CONFIG = """
device = "cpu"
compute = "float32"

[teacher]
source = "file:{here}/teacher"

[corpus]
sources = ["file:{here}/talk.jsonl"]
held_out_conversations = 12

[variants.half]
attention = [1, 3]

[layer_scores]
method = "restore"
sequences = 4

[init_from_attention]
window = 4
tokens = 512
batch_size = 4
seq_len = 32

[align]
steps = 6
decay_lr_factor = 5.0
seq_len = 32
mixer_lr = 1e-4

[kl_distill]
steps = 160
seq_len = 32
mixer_lr = 1e-3
rest_lr = 1e-4
checkpoint_every = 20

[sft]
steps = 3
seq_len = 32

[dpo]
steps = 2
batch_size = 2
pairs = 6
max_reply_tokens = 6

[benchmark]
held_out_conversations = 6
seq_len = 64
skip_positions = 4
samples = 2
sample_tokens = 6

[benchmark.efficiency]
batches = [1]
tokens = 4
repeats = 2

[draft]
kind = "layers:[0, 3]"
conversations = 20
max_tokens = 12
generation_batch = 8
steps = 20
seq_len = 32
checkpoint_every = 5

[speculative_profile]
max_k = 2
batches = [1, 2]
prompts = 3
new_tokens = 12
"""

SECOND_VARIANT = """
[variants.none]
attention = "1/8"  # of four layers; which they are is left to the ranking
from = "half"
set = { "kl_distill.steps" = 6, "dpo.reference" = "policy" }
"""


@dataclass
class Project:
    """A copy of the project in a folder with a space in its name, and a store of its own."""

    root: Path
    store: Path
    config: str = "both.toml"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.root / "flows/distill_flow.py"), "--config", "config", self.config, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("METAFLOW", "PYTHON", "MAMBALLAMA"))}
        return kept | {"USER": "root", "MAMBALLAMA_STORE": str(self.store), "MAMBALLAMA_LIVE_CARDS": "0"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.start("run", *arguments)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return said

    def digest(self, stage: str) -> set[str]:
        manifests = (self.store / stage).glob("*/MANIFEST.json")
        return {json.loads(path.read_text())["digest"] for path in manifests}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("real stages")
    for part in PARTS:
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("out", "__pycache__", "*.jsonl.gz"))
    tiny.save_llama(root / "teacher", num_hidden_layers=4)
    tiny.write_jsonl(root / "talk.jsonl", [tiny.conversation(i, turns=2) for i in range(60)])
    (root / "half.toml").write_text(CONFIG.format(here=root))
    (root / "both.toml").write_text(CONFIG.format(here=root) + SECOND_VARIANT)
    return Project(root, root / "store")


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    return project.run()


def test_a_run_ends_in_a_report_of_teacher_and_both_variants(project: Project, first: str) -> None:
    page = Path(first.split("report: ")[-1].splitlines()[0])
    twin = json.loads(page.with_suffix(".json").read_text())
    assert page.parent.parent == project.root / "reports" / "out"
    assert [v["name"] for v in twin["variants"]] == ["half", "none"]
    assert [(v["layer_choice"], v["attention_layers"]) for v in twin["variants"]] == [(None, [1, 3]), ("restore", [])]
    assert sorted(s["layer"] for s in twin["layer_scores"]["layers"]) == [0, 1, 2, 3]
    for variant in twin["variants"]:
        assert all(stage["ran"] for stage in variant["quality"])
        assert variant["benchmark"]["fidelity"]["held_out"]["documents"] == 6
        groups = variant["speculation"]["groups"]
        assert {(g["batch"], g["draft"]) for g in groups} == {
            (b, d) for b in (1, 2) for d in ("ngram", "layers:[0, 3]")
        }
        assert all(row["identical_to_greedy"] for group in groups for row in group["rows"])
        assert variant["speculation"]["draft"]["held_out"]["tokens"] > 0
    assert "<svg" in page.read_text()


def test_the_readmes_commands_that_need_a_run_are_understood(project: Project, first: str) -> None:
    lines = [line for line in shell_lines() if needs_a_run(line)]
    assert len(lines) == 2
    for line in lines:
        words = [sys.executable, *line.split()[1:], "--help"]
        done = subprocess.run(words, cwd=project.root, env=project.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_identical_run_executes_no_stage(project: Project, first: str) -> None:
    said = project.run()
    assert "plan: 0 of 20 stages to run" in said
    assert "running on" not in said


def test_a_run_killed_while_it_trains_continues_to_the_same_weights(project: Project, first: str) -> None:
    """One of the two variants, from its initialised student on: what comes before it trains nothing."""
    disturbed = Project(project.root, project.root / "store of the disturbed", "half.toml")
    for stage in ("teacher", "corpus", "layer_scores", "benchmark_teacher", "init_from_attention"):
        shutil.copytree(project.store / stage, disturbed.store / stage)
    process = disturbed.start("run")
    deadline = time.monotonic() + 300
    while not list((disturbed.store / "kl_distill").glob("*/ckpt/step-*/meta.json")):
        assert process.poll() is None and time.monotonic() < deadline, "ended before its first checkpoint"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not disturbed.digest("kl_distill"), "it was finished before the kill: the test shows nothing"
    assert "continuing from step" in disturbed.run()
    for stage in ("align", "kl_distill", "sft", "dpo", "draft"):
        (digest,) = disturbed.digest(stage)
        assert digest in project.digest(stage)
