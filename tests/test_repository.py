"""What the repository says of itself: configurations parse, the README's commands and names are real."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stage_store import Store
from steps import config, pipeline

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell_lines() -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_every_configuration_parses_and_can_be_planned(path: Path) -> None:
    settings = config.load(path)
    sections = {name: part for name, part in tomllib.loads(path.read_text()).items() if isinstance(part, dict)}
    off = {name for name, part in sections.items() if part.get("enabled") is False}
    off |= {"draft"} if settings.draft.kind == "ngram" else set()
    off |= {"layer_scores"} if settings.layer_scores.method == "interleaved" else set()
    assert {stage.name for stage in pipeline.STAGES if not stage.enabled(settings)} == off


def test_the_readmes_example_configurations_parse_on_top_of_the_default() -> None:
    raw = tomllib.loads((ROOT / "configs/smollm2_cpu.toml").read_text())
    for example in blocks("toml"):
        for section, values in tomllib.loads(example).items():
            raw[section] = {**raw.get(section, {}), **values}
    assert set(config.parse(raw).variants) == {"half", "quarter"}


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    assert targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def needs_a_run(line: str) -> bool:
    """Metaflow looks for an earlier run even for their help; tests/flows/test_real_stages.py has one."""
    return "distill_flow.py resume" in line or "distill_flow.py card" in line


@pytest.mark.parametrize(
    "line", [line for line in shell_lines() if line.startswith("python ") and not needs_a_run(line)]
)
def test_every_python_command_of_the_readme_is_understood(line: str, tmp_path: Path) -> None:
    """Commands that would run the pipeline, or want a run or a model of the reader's, are given an argument that stops
    them once all else was understood."""
    words = line.split()[1:]
    if ("distill_flow.py" in line and "run" in words) or re.search(r"\b(RUN_A|MODEL|FOLDER)\b", line):
        words.append("--help")
    if "stage_store" in line:
        Store(str(tmp_path / "store"))
        words = [*words[:2], "--store", str(tmp_path / "store"), *words[2:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tree_and_the_files_to_read_exist() -> None:
    folders = re.findall(r"^    ([a-z_/]+)/ ", README, re.MULTILINE)
    assert len(folders) >= 10
    named = re.search(r"Read first: (.*)\.\n", README)
    assert named
    files = re.findall(r"`([^`]+)`", named[1])
    assert len(files) == 5
    assert [name for name in [*folders, *files] if not (ROOT / name).exists()] == []


def test_the_embedded_corpus_is_what_its_manifest_says() -> None:
    import json

    from corpora.sources import sha256_of

    manifest = json.loads((ROOT / "corpora/smollm2_selfchat.manifest.json").read_text())
    file = ROOT / "corpora" / manifest["file"]
    assert sha256_of(file) == manifest["sha256"]
    assert file.stat().st_size <= 8 * 2**20


def test_the_readmes_python_is_valid_and_imports_what_exists() -> None:
    (example,) = blocks("python")
    imports = [line for line in example.splitlines() if line.startswith(("import ", "from "))]
    compile(example, "README.md", "exec")
    exec("\n".join(imports), {})
