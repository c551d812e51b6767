import ast
import hashlib
import json

import pytest
from datasets import Dataset

from evals import data
from evals.head import EvaluationError
from evals.tasks import TASKS
from steps import prefetch

CONFIG = """
[teacher]
source = "file:teacher"
[corpus]
sources = ["file:conversations.jsonl"]
[variants.half]
[benchmark]
tasks = {tasks}
[benchmark.data]
squad = "file:{own}"
"""
ROW = {"goal": "Dry it.", "sol1": "Wait.", "sol2": "Wet it.", "label": 0}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has piqa alone; what was asked of it."""
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        if name != "baber/piqa":
            raise ConnectionError("no route to the hub")
        return Dataset.from_list([ROW])

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    return asked


def config_file(tmp_path, tasks: list[str]):
    own = tmp_path / "squad.jsonl"
    own.write_text('{"id": "1"}\n')
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.format(tasks=json.dumps(tasks), own=own))
    return path, own


def test_all_that_a_configuration_reads_is_fetched_once_and_said(hub, tmp_path, capsys):
    path, own = config_file(tmp_path, ["piqa", "squad", "mmlu_dev"])
    assert prefetch.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = tmp_path / "cache" / "hub" / "baber--piqa" / TASKS["piqa"].source.split("@")[1] / "default"
    parquet = (kept / "validation.parquet").read_bytes()
    assert [line.split(maxsplit=3) for line in lines] == [
        [f"{len(parquet):,}", "bytes", hashlib.sha256(parquet).hexdigest(), f"{TASKS['piqa'].source} validation"],
        ["12", "bytes", hashlib.sha256(own.read_bytes()).hexdigest(), f"file:{own}"],
        ["218,396", "bytes", TASKS["mmlu_dev"].source.partition("sha256=")[2], TASKS["mmlu_dev"].source],
    ]
    assert prefetch.main([str(path)]) == 0
    assert len(hub) == 1
    assert data.load(TASKS["piqa"]) == {"validation": [ROW]}


def test_a_file_of_the_hub_is_read_at_its_commit_and_made_what_the_harness_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    problems = [{"question": "Who says so?", "answer": "D", "options": ["I", "you", "we", "they"]}]
    (tmp_path / "race.jsonl").write_text(json.dumps({"article": "Once it rained.", "problems": problems}) + "\n")
    load_dataset, asked = data.datasets.load_dataset, []

    def from_disk(kind, data_files, split):
        asked.append(data_files)
        return load_dataset(
            kind, data_files={split: str(tmp_path / "race.jsonl")}, split=split, cache_dir=str(tmp_path / "datasets")
        )

    monkeypatch.setattr(data.datasets, "load_dataset", from_disk)
    (row,) = data.load(TASKS["race"])["test"]
    assert ast.literal_eval(row["problems"]) == problems
    revision = "e30efe648089df42c548e93faa9c5f1816e2c44f"
    assert asked == [{"test": f"hf://datasets/EleutherAI/race@{revision}/race_high_test.jsonl"}]
    assert data.load(TASKS["race"])["test"] == [row]
    assert len(asked) == 1


def test_what_cannot_be_had_is_named_and_the_rest_fetched(hub, tmp_path, capsys):
    path, _ = config_file(tmp_path, ["squad"])
    assert prefetch.main([str(path), "--set", 'benchmark.tasks=["hellaswag_10", "piqa"]']) == 1
    said = capsys.readouterr()
    assert "piqa" in said.out
    assert said.err.count("no route to the hub") == 2
    assert [split for name, _, split, _ in hub if name == "Rowan/hellaswag"] == ["validation", "train"]
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_faulty_configuration_is_said_in_one_line(tmp_path, capsys):
    path, _ = config_file(tmp_path, ["piqua"])
    with pytest.raises(SystemExit) as stop:
        prefetch.main([str(path)])
    assert stop.value.code == 2
    assert "benchmark.tasks.0: given 'piqua'" in capsys.readouterr().err


def test_files_of_one_s_own_may_be_one_or_a_folder(tmp_path):
    (tmp_path / "validation.jsonl").write_text(json.dumps(ROW) + "\n")
    for text in (f"file:{tmp_path}", f"file:{tmp_path}/validation.jsonl"):
        assert data.load(TASKS["piqa"], text) == {"validation": [ROW]}
    with pytest.raises(EvaluationError, match="arc_easy: .* holds no test with an ending of .parquet, .jsonl"):
        data.load(TASKS["arc_easy"], f"file:{tmp_path}")
    (tmp_path / "items.csv").write_text("goal,sol1\n")
    with pytest.raises(EvaluationError, match="its name must end in .parquet, .jsonl"):
        data.load(TASKS["piqa"], f"file:{tmp_path}/items.csv")
    with pytest.raises(EvaluationError, match="piqa: file:gone: there is no file or folder .*benchmark.data.piqa"):
        data.load(TASKS["piqa"], "file:gone")
