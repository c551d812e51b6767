import math
from pathlib import Path

import pytest
from store_helpers import payload

from stage_store import StoreError, code_hash, code_modules, fingerprint_file, stage_key
from stage_store.fingerprint import DATA_FILES

PACKAGES = ("steps", "kernels_ext", "evals", "reports")
TREE = {
    "steps/__init__.py": "",
    "steps/align.py": "from .losses import kl\nimport kernels_ext.scan as scan\nimport math\n"
    "def run():\n    from steps import data\n    return kl(data.load())\n",
    "steps/losses.py": "RATE: float = 1.0\ndef kl(x):\n    return x * RATE\n",
    "steps/data.py": "import importlib\ndef load():\n    return importlib.import_module('steps.shards').load()\n",
    "steps/shards.py": "def load(): return 1\n",
    "steps/dpo.py": "from evals import stats\n",
    "kernels_ext/__init__.py": "",
    "kernels_ext/scan.py": "",
    "kernels_ext/csrc/scan.cu": "// one\n",
    "kernels_ext/csrc/notes.md": "notes\n",
    "evals/__init__.py": "",
    "evals/stats.py": "",
    "evals/margins.json": "{}",
    "evals/tasks/__init__.py": "",
    "evals/tasks/mmlu.yaml": "task: mmlu\n",
    "evals/tasks/prompts/mmlu.json": "{}",
    "evals/tasks/scores.py": "",
    "evals/judge/__init__.py": "from . import ask\n",
    "evals/judge/ask.py": "",
    "evals/judge/anchors.json": "[]",
    "steps/benchmark.py": "from evals import tasks\n",
    "steps/score.py": "from evals.tasks.scores import mean\n",
    "steps/ask.py": "def run():\n    from evals import judge\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def hashes(tree: Path) -> dict[str, str]:
    return code_modules("steps.align", tree, PACKAGES)


def test_closure_follows_relative_lazy_and_named_imports_and_no_others(tree):
    assert set(hashes(tree)) == {
        "steps",
        "steps.align",
        "steps.losses",
        "steps.data",
        "steps.shards",
        "kernels_ext",
        "kernels_ext.scan",
        "kernels_ext/csrc/scan.cu",
    }


TASK_FILES = {"evals/tasks/mmlu.yaml", "evals/tasks/prompts/mmlu.json"}


@pytest.mark.parametrize(
    ("stage", "reached"),
    [
        ("steps.dpo", {"evals/margins.json"}),
        ("steps.benchmark", {"evals/margins.json", *TASK_FILES}),
        ("steps.score", {"evals/margins.json", *TASK_FILES}),
        ("steps.ask", {"evals/margins.json", "evals/judge/anchors.json"}),
        ("steps.losses", set()),
    ],
    ids=["a module beside them", "their package", "a module of their package", "another package", "none"],
)
def test_data_files_count_where_a_module_of_their_folder_is_reached(tree, stage, reached):
    assert {name for name in code_modules(stage, tree, PACKAGES) if "/" in name} == reached


def test_every_data_file_of_this_project_counts_for_a_stage_and_none_for_a_training_stage():
    root = Path(__file__).resolve().parents[2]
    packages = ("steps", "evals", "hybrid", "corpora", "reports", "stage_store", "kernels_ext")
    counting = {
        stage: {name for name in code_modules(f"steps.{stage}", root, packages) if "/" in name}
        for stage in ("benchmark", "report", "kl_distill")
    }
    there = {
        path.relative_to(root).as_posix()
        for package, endings in DATA_FILES.items()
        for path in (root / package).rglob("*")
        if path.name.endswith(endings) and "out" not in path.parts
    }
    assert counting["benchmark"] | counting["report"] == there
    assert "reports/paper.json" in counting["report"] and "evals/tasks/squad.yaml" in counting["benchmark"]
    assert not counting["kl_distill"]


def test_a_task_s_file_changes_the_key_of_stages_that_read_it_and_of_no_others(tree):
    def keys():
        return {stage: code_hash(f"steps.{stage}", tree, PACKAGES) for stage in ("dpo", "benchmark", "score", "ask")}

    before = keys()
    (tree / "evals/tasks/mmlu.yaml").write_text("task: other\n")
    after = keys()
    assert {stage for stage in before if before[stage] != after[stage]} == {"benchmark", "score"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "steps/losses.py",
            "# note\nRATE: float = 1.0\n'unit: nats'\ndef kl(x):\n    '''KL.'''\n    return  (x * RATE)\n",
        ),
        ("steps/dpo.py", "x = 2\n"),
        ("kernels_ext/csrc/notes.md", "other\n"),
        ("kernels_ext/build/scan.cu", "// generated\n"),
    ],
    ids=["comments and docstrings", "module not imported", "not a source", "generated"],
)
def test_code_hash_ignores(tree, name, text):
    before = code_hash("steps.align", tree, PACKAGES)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text(text)
    assert code_hash("steps.align", tree, PACKAGES) == before


@pytest.mark.parametrize(
    ("name", "text", "changed"),
    [
        ("steps/losses.py", "RATE: float = 1\ndef kl(x):\n    return x * RATE\n", "steps.losses"),
        ("steps/shards.py", "def load(): return 2\n", "steps.shards"),
        ("steps/__init__.py", "import os\n", "steps"),
        ("kernels_ext/csrc/scan.cu", "// two\n", "kernels_ext/csrc/scan.cu"),
    ],
    ids=["1.0 to 1", "lazy import", "package", "kernel source"],
)
def test_code_hash_sees(tree, name, text, changed):
    before, whole = hashes(tree), code_hash("steps.align", tree, PACKAGES)
    (tree / name).write_text(text)
    after = hashes(tree)
    assert {module for module in before if before[module] != after[module]} == {changed}
    assert code_hash("steps.align", tree, PACKAGES) != whole


def test_code_hash_of_unknown_module_names_it(tree):
    with pytest.raises(StoreError, match=r"steps\.nothing: no such module"):
        code_hash("steps.nothing", tree, PACKAGES)


def test_key_is_canonical():
    assert stage_key({"a": 1, "b": [1, 2]}) == stage_key({"b": (1, 2), "a": 1})
    assert stage_key(payload(steps=40)) != stage_key(payload(steps=41))
    assert stage_key(payload(version=1)) != stage_key(payload(version=2))


@pytest.mark.parametrize("value", [math.nan, object(), {1, 2}], ids=["nan", "object", "set"])
def test_key_refuses_what_is_not_json(value):
    with pytest.raises(StoreError, match="JSON values only"):
        stage_key({"config": value})


def test_fingerprint_is_of_bytes_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"1")
    assert fingerprint_file(tmp_path / "a" / "x") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert fingerprint_file(tmp_path / "a") == fingerprint_file(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert fingerprint_file(tmp_path / "a") != fingerprint_file(tmp_path / "b")
    with pytest.raises(StoreError, match="No such file"):
        fingerprint_file(tmp_path / "absent")
