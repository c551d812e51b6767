"""What "The Mamba in the Llama" (2408.15237) published for the benchmarks that it shares with this project.

`paper.json` has its tables as printed, other models than the ones measured here: they tell what to expect of the
method, and are no baseline.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from reports.text import MISSING

_FILE = Path(__file__).parent / "paper.json"


def beside(benchmark: str, metric: str) -> dict[str, str] | None:
    """The published figures of a benchmark's metric as a cell {"text", "note"}; None where the paper has none."""
    for table in (t for t in _published() if t["shown"]):
        for index, column in enumerate(table["columns"]):
            if benchmark not in _names(column) or metric != column["metric"]:
                continue
            values = {row["model"]: row["values"][index] for row in table["rows"]}
            figures = (values[model] for model in table["shown"])
            text = " → ".join(MISSING if figure is None else f"{figure:g}" for figure in figures)
            here = f"; {column['also'][benchmark]}" if benchmark in column.get("also", {}) else ""
            return {"text": text, "note": f"{table['reads']}, table {table['number']}{here}"}
    return None


def tables(measured: Collection[str]) -> list[Mapping[str, Any]]:
    """The paper's tables that have any of these benchmarks, whole."""
    return [t for t in _published() if any(_names(column) & set(measured) for column in t["columns"])]


def _names(column: Mapping[str, Any]) -> set[str]:
    """The benchmark of a column, and those that are a part of it."""
    return {column["benchmark"], *column.get("also", {})} if "benchmark" in column else set()


@cache
def _published() -> list[dict[str, Any]]:
    return json.loads(_FILE.read_text(encoding="utf-8"))["tables"]
