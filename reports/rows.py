"""Reads what the stages left behind: JSON, JSONL and Parquet in, plain Python out. What was not run is None."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from reports.text import printable

TEACHER = "teacher"
TEACHER_ROLE = "benchmark_teacher"


class ReportError(ValueError):
    """Inputs of which no report can be made; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Benchmark:
    """Folder of a benchmark stage. comparisons, means and samples may be empty; rows is None where the file is
    missing."""

    summary: dict[str, Any]
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    means: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rows: pd.DataFrame | None = None


@dataclass(frozen=True)
class RunData:
    """Everything a report is made of. benchmarks and speculation: model name → content, only of what ran."""

    lineage: dict[str, Any]
    variants: list[str]
    benchmarks: dict[str, Benchmark]
    speculation: dict[str, dict[str, Any]]


def load(inputs: Mapping[str, Path]) -> RunData:
    """Roles as the report stage gets them: "lineage", "benchmark_teacher", "<variant>.benchmark" and
    "<variant>.speculative_profile"; others are passed over.

    Only the lineage is required. Raises ReportError on a file that is there and cannot be read.
    """
    if "lineage" not in inputs:
        raise ReportError(f"report: role 'lineage' is missing; given: {', '.join(sorted(inputs)) or 'nothing'}")
    lineage = read_json(Path(inputs["lineage"]))
    if not isinstance(lineage, dict):
        raise ReportError(f"{inputs['lineage']}: expected a JSON object, found {type(lineage).__name__}")
    benchmarks, speculation = {}, {}
    for role, folder in inputs.items():
        variant, _, stage = role.rpartition(".")
        if role == TEACHER_ROLE or stage == "benchmark":
            found = _benchmark(Path(folder))
            if found:
                benchmarks[variant or TEACHER] = found
        elif stage == "speculative_profile" and (path := Path(folder) / "profile.json").exists():
            speculation[variant] = read_json(path)
    return RunData(lineage, _variants(lineage, inputs), benchmarks, speculation)


def all_rows(data: RunData) -> pd.DataFrame:
    """The rows of every model in one table, under this run's names and not those of the run that computed them."""
    order = [name for name in [TEACHER, *data.variants] if name in data.benchmarks]
    tables = [
        rows.assign(run=str(data.lineage.get("run", "")), model=name)
        for name in order
        if (rows := data.benchmarks[name].rows) is not None
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run", "model"])


def read_json(path: Path) -> Any:
    try:
        return clean(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not valid JSON: {error}") from None


def clean(value: Any) -> Any:
    """The same value as JSON and a page can show it: NaN and infinities as None, unprintable characters replaced."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {printable(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Texts quoted throughout: an answer may hold line breaks of any kind."""
    rows.to_csv(path, index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def read_rows(path: Path) -> pd.DataFrame:
    """What `write_rows` wrote; an empty text stays a text."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not a readable table of rows: {error}") from None
    lacking = [name for name in ("run", "model") if name not in rows]
    if lacking:
        raise ReportError(f"{path}: columns missing: {', '.join(lacking)}")
    if "score" in rows:
        rows["score"], rows["n"] = rows["score"].map(_score), rows["n"].astype("int64")
    return rows


def _score(text: str) -> float:
    return float(text) if text else math.nan


def _benchmark(folder: Path) -> Benchmark | None:
    """None where the stage left no summary: then it did not run."""
    if not (folder / "summary.json").exists():
        return None
    comparison, means = folder / "comparison.json", folder / "means.json"
    samples, rows = folder / "samples.jsonl", folder / "rows.parquet"
    return Benchmark(
        read_json(folder / "summary.json"),
        read_json(comparison) if comparison.exists() else [],
        read_json(means) if means.exists() else [],
        _read_lines(samples) if samples.exists() else [],
        _read_rows(rows) if rows.exists() else None,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = clean(json.loads(text))
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {line}: not valid JSON: {error}") from None
        if not isinstance(record, dict) or not {"prompt", "response"} <= record.keys():
            raise ReportError(f"{path}, line {line}: expected an object with prompt and response")
        records.append(record)
    return records


def _read_rows(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not a readable Parquet file: {error}") from None


def _variants(lineage: Mapping[str, Any], inputs: Mapping[str, Path]) -> list[str]:
    """Names in the configuration's order, then whatever only the stages or the roles know."""
    configured = list(lineage.get("config", {}).get("variants") or {})
    staged = [s["variant"] for s in lineage.get("stages", []) if s.get("variant")]
    roles = sorted(role.partition(".")[0] for role in inputs if "." in role)
    return list(dict.fromkeys([*configured, *staged, *roles]))
