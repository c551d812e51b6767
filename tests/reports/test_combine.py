import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_build import Page, body_text

from evals.comparison import compare_runs
from evals.stats import wilson
from evals.tasks import TASKS
from reports.__main__ import main
from reports.build import render, write_report
from reports.combine import combine, load_finished
from reports.rows import ReportError, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "reports"
    folder.mkdir()
    return folder


def finish(inputs, home, run, edit=None):
    """The report of one run under its id. edit: changes its lineage before."""
    lineage = json.loads(inputs["lineage"].read_text()) | {"run": run}
    if edit:
        edit(lineage)
    inputs["lineage"].write_text(json.dumps(lineage))
    (home / run).mkdir()
    write_report(load(inputs), home / run, title="A title", samples=2, interval=wilson)
    return home / run


def pair(example, home, edit=None, **names):
    finish(example, home, "first")
    finish(example, home, "second", edit)
    return [load_finished(run, home) for run in ("first", "second")]


def change_rows(inputs, role, change):
    path = inputs[role] / "rows.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def other_teacher(lineage):
    next(s for s in lineage["stages"] if s["stage"] == "benchmark_teacher")["key"] = "ff" * 32


def combined(runs, baseline="teacher"):
    made = combine(runs, baseline, compare_runs, "Both")
    made.twin["files"] = {"twin": "a.json", "rows": "a.rows.csv", "flips": "a.flips.jsonl"}
    return made


def test_one_run_compared_again_says_what_its_own_report_said(example, home):
    finish(example, home, "first")
    run = load_finished("first", home)
    twin = combined([run]).twin
    assert [v["comparisons"] for v in twin["variants"]] == [v["comparisons"] for v in run.twin["variants"]]
    assert [v["flags"] for v in twin["variants"]] == [v["flags"] for v in run.twin["variants"]]
    assert twin["flips"] == run.twin["flips"]


def test_models_of_several_runs_carry_their_run_s_letter_and_share_one_teacher(example, home):
    made = combined(pair(example, home))
    assert [r["label"] for r in made.twin["runs"]] == ["A", "B"]
    assert [v["name"] for v in made.twin["variants"]] == ["A/half", "A/quarter", "B/half", "B/quarter"]
    assert set(made.rows["model"]) == {"teacher", "A/half", "A/quarter", "B/half", "B/quarter"}
    assert all(len(v["comparisons"]) == 6 for v in made.twin["variants"])
    assert made.twin["configuration_differences"] == [] and made.twin["not_comparable"] == []
    assert {r["model"] for r in made.twin["samples"][0]["responses"]} == set(made.rows["model"])
    html = render(made.twin)
    text = body_text(html)
    assert "2 runs side by side, every model compared with the teacher" in text
    assert {"runs", "comparison", "differences"} <= set(Page(html).ids)


def test_a_student_may_be_the_baseline(example, home):
    runs = pair(example, home)
    for wanted in ("B/half", "A/half"):
        twin = combined(runs, wanted).twin
        assert twin["baseline"] == {"name": wanted, "kind": "variant"}
        by_name = {v["name"]: v["comparisons"] for v in twin["variants"]}
        assert by_name[wanted] == []
        other = {c["benchmark"]: c for c in by_name["A/half" if wanted == "B/half" else "B/half"]}
        assert other["mmlu_dev"]["difference"] == 0 and other["mmlu_dev"]["p"] == 1
        text = body_text(render(twin))
        assert f"Student minus {wanted}, item by item." in text
        assert f"student − {wanted}" in text and "Paired differences, student − teacher" not in text


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("half", "'half' is one of A/half, B/half; allowed: teacher, A/half"),
        ("none", "'none' is none of the models; allowed: teacher, A/half, A/quarter, B/half, B/quarter"),
    ],
)
def test_a_baseline_that_is_not_one_model_is_refused_with_those_that_are(example, home, wanted, said):
    with pytest.raises(ReportError, match=said):
        combined(pair(example, home), wanted)


def test_another_measurement_of_a_teacher_is_a_model_of_its_own(example, home):
    made = combined(pair(example, home, other_teacher))
    bare = made.twin["variants"][-1]
    assert bare["name"] == "B/teacher" and bare["benchmark"]["fidelity"]
    assert {c["difference"] for c in bare["comparisons"]} == {0.0}
    assert "B/teacher" in body_text(render(made.twin))


def test_only_settings_that_differ_are_shown(example, home):
    def edit(lineage):
        lineage["config"]["seed"] = 1
        lineage["git_commit"] = "c0ffee"

    twin = combined(pair(example, home, edit)).twin
    assert twin["configuration_differences"] == [{"leaf": "seed", "values": {"A": 0, "B": 1}}]
    assert "The runs are of different commits" in " ".join(f["text"] for f in twin["flags"])
    assert {d["leaf"] for d in twin["differences"]} == {"kl_distill.steps", "draft"}


def second(example, home, role, change):
    """Two runs whose second has other rows of one student, and so a teacher's benchmark of its own."""
    finish(example, home, "first")
    for each in ("benchmark_teacher", "half.benchmark", "quarter.benchmark") if role == "all" else (role,):
        change_rows(example, each, change)
    finish(example, home, "second", other_teacher)
    return [load_finished(run, home) for run in ("first", "second")]


def test_other_items_are_refused_and_leave_the_page(example, home):
    runs = second(example, home, "all", lambda rows: rows[~rows["item"].isin([f"mmlu_dev-{i}" for i in range(81)])])
    twin = combined(runs).twin
    half = next(v for v in twin["variants"] if v["name"] == "B/half")
    assert "mmlu_dev" not in {c["benchmark"] for c in half["comparisons"]} and len(half["comparisons"]) == 5
    assert "mmlu_dev" not in {t["task"] for t in half["benchmark"]["tasks"]}
    refused = [r for r in twin["not_comparable"] if r["model"] == "B/half"]
    assert [r["benchmark"] for r in refused] == ["mmlu_dev"] and "item sets differ" in refused[0]["reason"]
    flag = next(f for f in twin["flags"] if f["text"].startswith("Not comparable: "))
    assert flag["level"] == "serious"
    html = render(twin)
    assert "<td class=off>not comparable</td>" in html and "Not comparable" in body_text(html)


def test_another_judge_is_refused_even_where_the_teacher_has_no_rows(example, home):
    def change(rows):
        judged = rows["benchmark"].isin(["mt_bench", "pairwise"])
        rows.loc[judged, "prompt_hash"] = "judge-2" + rows["item"]
        return rows

    twin = combined(second(example, home, "all", change)).twin
    half = next(v for v in twin["variants"] if v["name"] == "B/half")
    refused = {r["benchmark"]: r["reason"] for r in twin["not_comparable"] if r["model"] == "B/half"}
    assert set(refused) == {"mt_bench", "pairwise"}
    assert refused["pairwise"] == "pairwise: prompts or judge differ on 8 of 8 items, first 'q0'"
    assert {c["benchmark"] for c in half["comparisons"]}.isdisjoint(refused)
    assert half["benchmark"]["judge"]["pairwise"] is None and half["benchmark"]["judge"]["mt_bench"] is None


def test_runs_with_nothing_in_common_are_refused_with_the_reason(example, home):
    def change(rows):
        return rows.assign(prompt_hash="other" + rows["prompt_hash"])

    with pytest.raises(ReportError, match="nothing of run B can be compared with teacher: .*prompt"):
        combined(second(example, home, "all", change))


def test_a_held_out_text_that_differs_takes_the_final_distance_with_it(example, home):
    def change(rows):
        rows.loc[rows["benchmark"] == "held_out", "item_hash"] = "other" + rows["item"]
        return rows

    twin = combined(second(example, home, "all", change)).twin
    kept, left = (next(v for v in twin["variants"] if v["name"] == name) for name in ("A/half", "B/half"))
    assert "held_out" in kept["benchmark"]["fidelity"] and "held_out" not in left["benchmark"]["fidelity"]
    assert kept["quality"][-1]["kl"] is not None and left["quality"][-1]["kl"] is None


def test_the_command_line_writes_the_page_and_what_is_beside_it(example, home, tmp_path, capsys):
    pair(example, home)
    page = tmp_path / "made" / "both.html"
    assert main(["compare", "first", str(home / "second"), "--runs", str(home), "-o", str(page)]) == 0
    beside = sorted(path.name for path in page.parent.iterdir())
    assert beside == ["both.flips.jsonl", "both.html", "both.json", "both.rows.csv"]
    twin = json.loads((page.parent / "both.json").read_text())
    assert twin["schema"] == 4 and twin["title"] == "2 runs compared"
    printed = capsys.readouterr().out
    assert "A/half: " in printed and f"report: {page}" in printed
    assert "both.flips.jsonl" in page.read_text()
    flips = [json.loads(line) for line in (page.parent / "both.flips.jsonl").read_text().splitlines()]
    assert {f["model"] for f in flips} == {"A/half", "A/quarter", "B/half", "B/quarter"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["third"], "'third': neither a folder with a report.json nor a run; runs: first, second"),
        (["first", "--baseline", "x"], "--baseline: 'x' is none of the models; allowed: teacher, half, quarter"),
        (["old"], "schema 1, expected 4"),
        (["both"], "is itself a comparison of 2 runs; name those"),
    ],
)
def test_the_command_line_says_why_not(example, home, tmp_path, capsys, arguments, said):
    runs = pair(example, home)
    if "old" in arguments or "both" in arguments:
        (home / arguments[0]).mkdir()
        twin = {"schema": 1} if "old" in arguments else combine(runs, "teacher", compare_runs, "t").twin
        (home / arguments[0] / "report.json").write_text(json.dumps(twin))
    assert main(["compare", *arguments, "--runs", str(home), "-o", str(tmp_path / "x.html")]) == 1
    assert said in capsys.readouterr().err


def with_every_task(inputs):
    """The inputs as a run of all benchmarks leaves them."""
    for role in ("benchmark_teacher", "half.benchmark", "quarter.benchmark"):
        path = inputs[role] / "summary.json"
        raw = json.loads(path.read_text())
        for task in TASKS.values():
            found = raw["tasks"].setdefault(task.name, dict.fromkeys(task.metrics, 0.4) | {"n": 281, "chance": 0.25})
            if task.calibrated:
                bins = [{"low": i / 15, "high": (i + 1) / 15, "confidence": i / 15, "accuracy": 0.5} for i in range(15)]
                found["calibration"] = {"ece": 0.05, "brier": 0.2, "n": 281, "bins": [b | {"n": 19} for b in bins]}
        lengths, depths = [256 * 2**i for i in range(8)], [0.0, 0.25, 0.5, 0.75, 1.0]
        cells = [{"length": length, "depth": depth, "k": 4, "n": 5} for length in lengths for depth in depths]
        raw["needle"] |= {"lengths": lengths, "depths": depths, "cells": cells}
        point = {"nll": 3.0, "se": 0.05, "n": 4096, "documents": 30}
        raw["length"]["curve"] = [point | {"from": 2**i, "to": 2 ** (i + 1)} for i in range(14)]
        for kind in ("decode", "prefill"):
            cell = raw["efficiency"][kind][0]
            grid = [(b, c) for b in (1, 8, 64) for c in (512, 2048, 8192)]
            raw["efficiency"][kind] = [cell | {"batch": b, "context": c} for b, c in grid]
        path.write_text(json.dumps(raw))

        def every(rows):
            dev = rows[rows["benchmark"] == "mmlu_dev"]
            known = set(rows["benchmark"])
            more = [dev.assign(benchmark=t.name, metric=t.metrics[0]) for t in TASKS.values() if t.name not in known]
            return pd.concat([rows, *more])

        change_rows(inputs, role, every)
    return inputs


def test_four_runs_of_two_students_and_all_tasks_stay_below_a_megabyte(example, home):
    inputs = with_every_task(example)
    for run in range(4):
        finish(inputs, home, f"17954493017114{run:02}")
    made = combined([load_finished(folder.name, home) for folder in sorted(home.iterdir())])
    assert len(made.twin["variants"]) == 8
    assert all(len(v["comparisons"]) >= len(TASKS) for v in made.twin["variants"])
    assert len(render(made.twin).encode()) < 1_000_000


def test_comparing_needs_neither_torch_nor_transformers():
    code = "import sys, reports.__main__; print({'torch', 'transformers', 'metaflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
