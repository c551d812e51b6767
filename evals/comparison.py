"""Which figure of every benchmark two models are compared by, and the comparison of all that both have."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from evals.stats import NotComparable, compare, holm, mean_of_tasks
from evals.tasks import TASKS

logger = logging.getLogger(__name__)

Unit = Literal["share", "nats", "points"]


@dataclass(frozen=True)
class Primary:
    """The one metric of a benchmark that enters the comparison; others would count the same answers twice.

    unit: of the metric and of its δ. "share": of right, found or won; "nats": negative log-likelihood of a token, where
          less is better; "points": of a judge's scale from 1 to 10.
    even: score of a draw, where the benchmark sets a model's answers against its teacher's. Such a teacher has answers
          but no score of its own; the model is then compared with a draw.
    """

    metric: str
    unit: Unit
    even: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.unit != "nats"


PRIMARY = {
    "held_out": Primary("nll", "nats"),
    "held_out_text": Primary("nll", "nats"),
    "natural": Primary("nll", "nats"),
    **{name: Primary(task.metrics[0], "share") for name, task in TASKS.items()},
    "length": Primary("nll", "nats"),
    "needle": Primary("found", "share"),
    "mt_bench": Primary("score", "points"),
    "pairwise": Primary("win", "share", even=0.5),
    "alpaca": Primary("preference", "share", even=0.5),
}


FAMILIES = {
    "offline": tuple(name for name, task in TASKS.items() if not task.needs_hub),
    "paper": tuple(name for name, task in TASKS.items() if task.paper == "table 3"),
    "leaderboard": tuple(name for name, task in TASKS.items() if task.paper == "table 4" and task.kind == "choice"),
}
"""Tasks whose mean says how much was kept in all: those that need no hub, the ten zero-shot ones of the paper and the
five of the Open LLM Leaderboard that it has. No two tasks of a family have documents in common."""


@dataclass(frozen=True)
class Compared:
    """What two models' rows say of each other.

    comparisons: lines of comparison.json, as `stats.compare` gives them, with the unit, and p_holm over all of them as
    one family. means: lines of means.json, as `stats.mean_of_tasks` gives them, of each of FAMILIES with at least two
    tasks that can be compared; `family` names it, `missing` its tasks that are not in the mean. refused: {"benchmark",
    "metric", "reason"} of what must not be compared.
    """

    comparisons: list[dict[str, Any]]
    means: list[dict[str, Any]]
    refused: list[dict[str, str]]


def compare_runs(
    baseline: pd.DataFrame,
    rows: pd.DataFrame,
    deltas: Mapping[Unit, float],
    sides: tuple[str, str] = ("the teacher", "the student"),
) -> Compared:
    """Compare one model's rows with another's on every benchmark of PRIMARY that `rows` has.

    baseline, rows: rows of one model each, in the schema of `evals.rows`. deltas: δ of non-inferiority by unit.
    sides: what a refusal calls the two. A line's "teacher" is the baseline's score, its "student" that of `rows`.
    """
    compared = Compared([], [], [])
    for benchmark, primary in PRIMARY.items():
        measured, against = _of(rows, benchmark, primary.metric), baseline
        if measured.empty:
            continue
        answered = (baseline["metric"] == "answer_tokens").any()
        if primary.even is not None and answered and _of(baseline, benchmark, primary.metric).empty:
            against = measured.assign(score=primary.even)
        try:
            line = compare(
                against,
                rows,
                benchmark,
                primary.metric,
                deltas[primary.unit],
                higher_is_better=primary.higher_is_better,
                sides=sides,
            )
        except NotComparable as refusal:
            logger.warning("not compared: %s", refusal)
            compared.refused.append({"benchmark": benchmark, "metric": primary.metric, "reason": str(refusal)})
        else:
            compared.comparisons.append({**line, "unit": primary.unit})
    adjusted = holm([line["p"] for line in compared.comparisons])
    compared.comparisons[:] = [{**line, "p_holm": p} for line, p in zip(compared.comparisons, adjusted, strict=True)]
    comparable = {line["benchmark"]: line["metric"] for line in compared.comparisons}
    for family, names in FAMILIES.items():
        metrics = {name: comparable[name] for name in names if name in comparable}
        if len(metrics) > 1:
            mean = mean_of_tasks(baseline, rows, metrics, deltas["share"], sides=sides)
            missing = [name for name in names if name not in metrics]
            compared.means.append({"family": family, "missing": missing, **mean, "unit": "share"})
    return compared


def _of(rows: pd.DataFrame, benchmark: str, metric: str) -> pd.DataFrame:
    return rows[(rows["benchmark"] == benchmark) & (rows["metric"] == metric)]
