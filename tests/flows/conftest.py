"""A project in a folder with spaces: its flow is the real one, its stages are fakes, so a run takes seconds."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).parent / "fake_stages"
sys.path.insert(0, str(ROOT))

from steps.pipeline import FIRST_PARTY, STAGES  # noqa: E402


@dataclass
class Project:
    """root: the project. home: current folder of its runs, somewhere else."""

    root: Path
    home: Path

    @property
    def environment(self):
        """Nothing of the caller's Metaflow or Python settings; the user is root, as in a container."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("METAFLOW", "PYTHON", "MAMBALLAMA"))}
        own = {"USER": "root", "HOME": self.home, "TMPDIR": self.home, "FAKE_LOG": self.log}
        return kept | {name: str(value) for name, value in own.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def flow(self):
        return self.root / "flows" / "distill_flow.py"

    @property
    def log(self):
        return self.home / "fake.log"

    def command(self, *arguments):
        return [sys.executable, str(self.flow), *arguments]

    def call(self, *arguments, **environment):
        """Run the flow's command line; its exit code and all that it said."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.home,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def executed(self):
        """Names of the stages that really ran, in order."""
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def copy(self, folder):
        """The same project, its store included, at another place."""
        shutil.copytree(self.root, folder / "a project")
        (folder / "home").mkdir()
        return Project(folder / "a project", folder / "home")


def make_project(folder):
    root = folder / "a project"
    for package in ("flows", *FIRST_PARTY):
        ignored = shutil.ignore_patterns("__pycache__", "*.jsonl.gz", "out")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    for module in {stage.module for stage in STAGES}:
        shutil.copy(FAKES / "stage.py", root / f"{module.replace('.', '/')}.py")
    for name in ("fake_work.py", "report.py"):
        shutil.copy(FAKES / name, root / "steps" / name)
    (root / "configs").mkdir()
    for name in ("smollm2_cpu.toml", "smollm2_gpu.toml"):
        shutil.copy(FAKES / "config.toml", root / "configs" / name)
    (root / "teacher.txt").write_text("a teacher\n")
    (root / "talk.jsonl").write_text("{}\n")
    home = folder / "home"
    (home / ".metaflow").mkdir(parents=True)  # a stray one, which would capture the run
    return Project(root, home)


@pytest.fixture
def project(tmp_path):
    """A project without a store."""
    return make_project(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project after its first run, and what that said. Not to be changed: tests take a copy."""
    project = make_project(tmp_path_factory.mktemp("finished"))
    code, said = project.call("run")
    assert code == 0, said
    return project, said


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished project, stages and all, with nothing in its log."""
    return finished[0].copy(tmp_path)
