import json

import pytest

from reports.rows import ReportError, all_rows, clean, load, read_rows, write_rows

ROWS = 3 * (481 + 64 + 32) + 2 * 8
"""Tasks, texts, MT-Bench with its answers, and the students' pairs."""


def test_loads_what_ran_and_names_every_variant_in_order(example):
    data = load(example)
    assert data.variants == ["half", "quarter"]
    assert list(data.benchmarks) == ["teacher", "half", "quarter"]
    assert len(data.benchmarks["half"].comparisons) == 6
    assert data.speculation["quarter"]["best"]["best_k"] == 2


def test_rows_carry_the_names_of_this_run(example):
    rows = all_rows(load(example))
    assert set(rows["model"]) == {"teacher", "half", "quarter"}
    assert set(rows["run"]) == {"1794823010"}
    assert len(rows) == ROWS


def test_a_folder_without_summary_counts_as_not_run(example):
    (example["half.benchmark"] / "summary.json").unlink()
    (example["half.speculative_profile"] / "profile.json").unlink()
    data = load(example)
    assert "half" not in data.benchmarks
    assert "half" not in data.speculation
    assert "half" in data.variants


def test_only_the_lineage_is_required(example):
    data = load({"lineage": example["lineage"]})
    assert data.variants == ["half", "quarter"]
    assert data.benchmarks == {}
    assert all_rows(data).empty
    with pytest.raises(ReportError, match="role 'lineage' is missing; given: half.benchmark"):
        load({"half.benchmark": example["half.benchmark"]})


def test_damage_is_named(example):
    folder = example["half.benchmark"]
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(samples + "{broken\n")
    with pytest.raises(ReportError, match="samples.jsonl, line 4: not valid JSON"):
        load(example)
    (folder / "samples.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ReportError, match="line 1: expected an object with prompt and response"):
        load(example)
    (folder / "samples.jsonl").write_text(samples)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReportError, match="rows.parquet: not a readable Parquet file"):
        load(example)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ReportError, match="summary.json: not valid JSON"):
        load(example)


def test_lineage_must_be_an_object(tmp_path):
    path = tmp_path / "lineage.json"
    path.write_text(json.dumps([1]))
    with pytest.raises(ReportError, match="expected a JSON object, found list"):
        load({"lineage": path})
    with pytest.raises(ReportError, match="absent.json: cannot be read"):
        load({"lineage": tmp_path / "absent.json"})


def test_what_json_cannot_say_becomes_none():
    assert clean({"a": [float("nan"), 1.0], "b": (float("inf"), 2)}) == {"a": [None, 1.0], "b": [None, 2]}


def test_rows_come_back_as_they_were_written(example, tmp_path, hostile):
    rows = all_rows(load(example))
    rows.loc[:4, "response"] = [f'a "quote", {hostile}', "lone \r return", "two\r\nlines\n", "NA", ""]
    rows.loc[0, "score"] = 1 / 3
    write_rows(rows, tmp_path / "rows.csv")
    back = read_rows(tmp_path / "rows.csv")
    assert back.to_dict("records") == rows.to_dict("records")


def test_a_table_that_is_none_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ReportError, match="rows.csv: columns missing: run, model"):
        read_rows(path)
    with pytest.raises(ReportError, match="other.csv: not a readable table of rows"):
        read_rows(tmp_path / "other.csv")
