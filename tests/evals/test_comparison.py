"""Which rows of two models are compared, by what, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from evals.comparison import FAMILIES, PRIMARY, compare_runs
from evals.rows import table

DELTAS = {"share": 0.02, "nats": 0.03, "points": 0.25}


def rows(model, **scores):
    return table(
        [
            {
                "benchmark": benchmark,
                "item": f"i{k}",
                "item_hash": f"h{k}",
                "prompt_hash": f"p{k}",
                "cluster": f"i{k}",
                "metric": PRIMARY[benchmark].metric,
                "score": score,
                "n": 1,
                "response": "",
            }
            for benchmark, values in scores.items()
            for k, score in enumerate(values)
        ],
        model,
    )


def test_every_benchmark_has_its_direction_and_its_margin():
    noise = np.random.default_rng(0).normal(size=40) / 100
    teacher = rows("teacher", natural=2 + noise, needle=[0, 1] * 20, mt_bench=[5.0, 6.0] * 20)
    student = rows("half", natural=2.01 - noise, needle=[0, 1] * 20, mt_bench=[4.0, 5.0] * 20)
    found = compare_runs(teacher, student, DELTAS)
    assert found.refused == []
    lines = {line["benchmark"]: line for line in found.comparisons}
    assert list(lines) == ["natural", "needle", "mt_bench"]
    assert {name: (line["unit"], line["delta"]) for name, line in lines.items()} == {
        "natural": ("nats", 0.03),
        "needle": ("share", 0.02),
        "mt_bench": ("points", 0.25),
    }
    assert not lines["natural"]["higher_is_better"]
    assert lines["natural"]["verdict"] == "non-inferior within 0.03"
    assert lines["mt_bench"]["verdict"] == "worse"
    assert all(line["p"] <= line["p_holm"] <= 1 for line in found.comparisons)
    assert lines["mt_bench"]["p_holm"] == pytest.approx(3 * lines["mt_bench"]["p"])


def test_what_only_the_baseline_has_is_no_matter_of_comparison():
    teacher = rows("teacher", needle=[0, 1, 1], mmlu_dev=[0, 1, 1])
    assert [c["benchmark"] for c in compare_runs(teacher, rows("half", needle=[1, 1, 0]), DELTAS).comparisons] == [
        "needle"
    ]


def test_what_must_not_be_compared_is_refused_and_the_rest_is_compared():
    teacher = rows("teacher", needle=[0, 1, 1], mt_bench=[5, 6, 7], mmlu_dev=[0, 1, 0])
    student = rows("half", needle=[0, 1, 1], mt_bench=[5, 6, 7], mmlu_dev=[0, 1, 0, 1], natural=[1.0, 2.0])
    other_judge = student.benchmark == "mt_bench"
    student.loc[other_judge, "prompt_hash"] = "of another judge"
    found = compare_runs(teacher, student, DELTAS, ("run 1", "run 2"))
    assert [c["benchmark"] for c in found.comparisons] == ["needle"]
    assert found.comparisons[0]["p_holm"] == found.comparisons[0]["p"]
    reasons = {(r["benchmark"], r["metric"]): r["reason"] for r in found.refused}
    assert reasons.keys() == {("natural", "nll"), ("mmlu_dev", "acc"), ("mt_bench", "score")}
    assert "run 1 has no rows" in reasons["natural", "nll"]
    assert "item sets differ (run 1 3, run 2 4, not in both 1, first 'i3')" in reasons["mmlu_dev", "acc"]
    assert "prompt_hash differs on 3 of 3 items, first 'i0'" in reasons["mt_bench", "score"]


def test_a_duel_with_the_teacher_is_compared_with_a_draw():
    student = rows("half", pairwise=[1.0] * 30 + [0.0] * 10 + [0.5] * 20)
    answers = rows("teacher", mt_bench=[90.0]).assign(metric="answer_tokens")
    line = compare_runs(answers, student, DELTAS).comparisons[0]
    assert (line["teacher"], line["difference"]) == (0.5, pytest.approx(10 / 60))
    assert line["ci_low"] > 0
    without_answers = compare_runs(rows("teacher", needle=[1, 0]), student, DELTAS)
    assert "the teacher has no rows" in without_answers.refused[0]["reason"]


def test_a_reference_of_somebody_else_makes_both_scores_comparable():
    teacher = pd.concat(
        [rows("teacher", alpaca=[0.25, 0.75] * 9), rows("teacher", alpaca=[9.0]).assign(metric="answer_tokens")]
    )
    line = compare_runs(teacher, rows("half", alpaca=[0.5, 0.75] * 9), DELTAS).comparisons[0]
    assert line["teacher"] == 0.5 and line["difference"] == pytest.approx(0.125)


def test_no_rows_give_no_comparisons():
    found = compare_runs(rows("teacher"), rows("half"), DELTAS)
    assert (found.comparisons, found.means, found.refused) == ([], [], [])


def test_the_families_are_those_of_the_paper_and_what_needs_no_hub():
    assert {name: len(tasks) for name, tasks in FAMILIES.items()} == {"offline": 6, "paper": 10, "leaderboard": 5}
    assert {"pubmedqa", "race", "mmlu"} <= set(FAMILIES["paper"])
    assert "gsm8k" not in FAMILIES["leaderboard"]


def test_the_mean_of_a_family_is_of_the_tasks_that_can_be_compared():
    scores = {"mmlu_dev": [0, 1, 1, 0] * 10, "squad": [0.5, 1.0] * 20, "logiqa": [0, 1] * 20, "piqa": [0, 1] * 20}
    teacher = rows("teacher", **scores, needle=[0, 1] * 20)
    student = rows("half", **scores | {"squad": [0.5, 0.8] * 20}, needle=[0, 0] * 20)
    student.loc[student.benchmark == "logiqa", "prompt_hash"] = "other"
    found = compare_runs(teacher, student, DELTAS)
    assert len(found.means) == 1  # one task of the paper's is no family
    mean = found.means[0]
    assert (mean["family"], mean["tasks"], mean["unit"], mean["delta"]) == (
        "offline", ["mmlu_dev", "squad"], "share", 0.02
    )  # fmt: skip
    assert mean["missing"] == ["hellaswag_100", "truthfulqa_mc1_100", "logiqa", "ifeval"]
    assert (mean["teacher"], mean["student"]) == (pytest.approx(0.625), pytest.approx(0.575))
    assert [r["benchmark"] for r in found.refused] == ["logiqa"]
