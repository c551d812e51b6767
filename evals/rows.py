"""The one table that every benchmark fills: one row per item and metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

COLUMNS = {
    "run": "str",
    "model": "str",
    "benchmark": "str",
    "item": "str",
    "item_hash": "str",
    "prompt_hash": "str",
    "cluster": "str",
    "metric": "str",
    "score": "float64",
    "n": "int64",
    "response": "str",
    "prompt": "str",
}
"""run: who measured, empty in a cached stage. model: "teacher" or a student's name. item: unique in its benchmark.
item_hash: of the item's content; prompt_hash: of what the model was given. cluster: shared by dependent items.
score: mean over the item's n tokens, or of the one answer (n = 1). response: what the model chose or said.
prompt: `excerpt` of what it was asked, on one row of an item whose response is text, empty on all others."""


FILLED_IN = {"run", "model"}
"""Columns that `table` fills in; a benchmark's records have all the others, `prompt` where there is one."""
PROMPT_CHARACTERS = 300
"""Of a prompt in a table: enough to know the question by, and a table of 14 000 items stays at a few megabytes."""


def table(records: Iterable[Mapping[str, Any]], model: str, run: str = "") -> pd.DataFrame:
    """Records of one model as a table with exactly COLUMNS. Raises ValueError if a record has other columns than those
    and if an item has a metric twice."""
    expected = COLUMNS.keys() - FILLED_IN
    records = [{"prompt": "", **record} for record in records]
    for number, record in enumerate(records):
        if record.keys() != expected:
            raise ValueError(
                f"record {number} ({record.get('benchmark')}, item {record.get('item')!r}): "
                f"missing {sorted(expected - record.keys())}, unknown {sorted(record.keys() - expected)}"
            )
    frame = pd.DataFrame([{"run": run, "model": model, **r} for r in records], columns=list(COLUMNS)).astype(COLUMNS)
    twice = frame[frame.duplicated(["benchmark", "item", "metric"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"{first.benchmark}: item {first['item']!r} has metric {first.metric!r} more than once")
    return frame


def excerpt(text: str, end: bool = False) -> str:
    """At most PROMPT_CHARACTERS of a text, its beginning or, where the question comes last, its end."""
    text = text.strip()
    if len(text) <= PROMPT_CHARACTERS:
        return text
    kept = PROMPT_CHARACTERS - 1
    return f"…{text[-kept:]}" if end else f"{text[:kept]}…"


def mean_scores(frame: pd.DataFrame, benchmark: str) -> dict[str, Any]:
    """{metric: mean over items, …, "n": items} of a benchmark whose items weigh the same."""
    part = frame[frame.benchmark == benchmark]
    means = {str(metric): float(group.score.mean()) for metric, group in part.groupby("metric", sort=True)}
    return means | {"n": int(part["item"].nunique())}
