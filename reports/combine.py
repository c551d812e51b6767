"""Several finished runs as one twin: the same page, every model compared with one baseline, item by item.

Nothing is measured again: figures come from the runs' own twins, comparisons from their rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

import pandas as pd

from reports.flips import flips, shown
from reports.rows import TEACHER, ReportError, clean, read_json, read_rows
from reports.sections import against, named
from reports.twin import COMPARISON, CURVE_POINTS, MEAN, SCHEMA, TRAINING, differences, finish, leaf_differences, thin

LEAST_POINTS = 30
"""Of a training curve, however many there are on the page."""
SECTIONS = {"length": ("length",), "needle": ("needle",), "mt_bench": ("judge", "mt_bench")}
SECTIONS |= {"pairwise": ("judge", "pairwise"), "alpaca": ("judge", "alpaca")}
"""Where the twin has the figures of a benchmark that is neither a text nor a task."""


class Compared(Protocol):
    """comparisons, means: lines as in comparison.json and means.json. refused: {"benchmark", "metric", "reason"}."""

    @property
    def comparisons(self) -> list[dict[str, Any]]: ...

    @property
    def means(self) -> list[dict[str, Any]]: ...

    @property
    def refused(self) -> list[dict[str, str]]: ...


Compare = Callable[[pd.DataFrame, pd.DataFrame, Mapping[Any, float], tuple[str, str]], Compared]
"""(baseline's rows, a model's rows, δ by unit, names of the two) → what can be compared, and what cannot."""


@dataclass(frozen=True)
class Finished:
    """A run as its report left it."""

    folder: Path
    twin: dict[str, Any]
    rows: pd.DataFrame


@dataclass(frozen=True)
class Combined:
    twin: dict[str, Any]
    rows: pd.DataFrame
    flips: list[dict[str, Any]]


def load_finished(run: str, home: Path) -> Finished:
    """run: a report's folder, or the id of a run whose report is in `home`. Raises ReportError if there is none, or one
    of another version."""
    folder = next((f for f in (Path(run), home / run) if (f / "report.json").is_file()), None)
    if folder is None:
        known = sorted(f.parent.name for f in home.glob("*/report.json"))
        raise ReportError(f"{run!r}: neither a folder with a report.json nor a run; runs: {', '.join(known) or 'none'}")
    twin = read_json(folder / "report.json")
    found = twin.get("schema") if isinstance(twin, dict) else None
    if found != SCHEMA:
        raise ReportError(
            f"{folder / 'report.json'}: schema {found}, expected {SCHEMA}; made by another version: run it again, "
            "stages that have not changed are reused"
        )
    if len(twin["runs"]) != 1:
        raise ReportError(f"{folder / 'report.json'}: is itself a comparison of {len(twin['runs'])} runs; name those")
    return Finished(folder, twin, read_rows(folder / "rows.csv"))


def combine(runs: Sequence[Finished], baseline: str, compare: Compare, title: str) -> Combined:
    """One twin, table and list of flips of all runs' models, each compared with the baseline.

    baseline: "teacher", the first run's, or a student: its name on the page ("B/half"), or without the letter where
    that names only one. Of several runs the models are called by the run's letter. A teacher whose benchmark another
    run has under the same key is shown once. What a run measured on other items, prompts or by another judge than the
    baseline's run leaves the page.
    Raises ReportError where the baseline has no rows, and where nothing of a run compares with it.
    """
    if len(runs) > len(ascii_uppercase):
        raise ReportError(f"{len(runs)} runs; at most {len(ascii_uppercase)} can be told apart on one page")
    labels = list(ascii_uppercase[: len(runs)]) if len(runs) > 1 else [""]
    twins = [_labelled(run.twin, label) for run, label in zip(runs, labels, strict=True)]
    first, measured = twins[0], twins[0]["teacher"]["benchmark"]
    teachers = {label: _teacher_model(twin, twins) for label, twin in zip(labels, twins, strict=True)}
    tables = _tables(runs, labels, teachers)
    variants = [v for twin in twins for v in twin["variants"]]
    variants += [
        _bare(teachers[label], label, twin["teacher"]["benchmark"], measured)
        for label, twin in zip(labels, twins, strict=True)
        if teachers[label] not in (TEACHER, *(v["name"] for v in variants))
    ]
    for v in variants:
        for stage in (t for t in v["training"] if t["ran"]):
            stage["curve"] = thin(stage["curve"], max(LEAST_POINTS, 2 * CURVE_POINTS // len(variants)))
    name = _baseline(baseline, variants, tables)
    refused = _compare_all(name, labels[0], variants, tables, compare, _margins(first))
    _require_something_in_common(name, labels, variants, refused)

    found = [
        flip
        for v in variants
        if v["name"] in tables
        for flip in flips(tables[name], tables[v["name"]], v["comparisons"], v["name"])
    ]
    twin = first | {
        "title": title,
        "runs": [run for twin in twins for run in twin["runs"]],
        "baseline": {"name": name, "kind": TEACHER if name in teachers.values() else "variant"},
        "layer_scores": first["layer_scores"]
        if all(t["layer_scores"] == first["layer_scores"] for t in twins)
        else None,
        "variants": variants,
        "not_comparable": refused,
        "samples": _samples(twins, teachers),
        "lineage": [s for twin in twins for s in twin["lineage"]],
        "configuration_differences": leaf_differences(
            {label: twin["configuration"] for label, twin in zip(labels, twins, strict=True)}
        ),
        "differences": differences(variants),
        "flips": shown(found),
    }
    finish(twin)
    return Combined(clean(twin), pd.concat(tables.values(), ignore_index=True), found)


def _labelled(twin: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A copy whose models, stages and run say which run they are of."""
    made = copy.deepcopy(dict(twin))
    made["runs"][0]["label"] = label
    for stage in made["lineage"]:
        stage["run"] = label
    for v in made["variants"]:
        v["run"] = label
        v["name"] = _named(label, v["own_name"])
        if v["continues"]:
            v["continues"]["variant"] = _named(label, v["continues"]["variant"])
    for sample in made["samples"]:
        for response in sample["responses"]:
            if response["model"] != TEACHER:
                response["model"] = _named(label, response["model"])
    return made


def _named(label: str, name: str) -> str:
    return f"{label}/{name}" if label else name


def _teacher_model(twin: Mapping[str, Any], twins: Sequence[Mapping[str, Any]]) -> str:
    """What the teacher of a run is called: as in the first run that has the same benchmark of it."""
    key = _teacher_key(twin)
    same = next(t for t in twins if t is twin or (key is not None and _teacher_key(t) == key))
    return TEACHER if same is twins[0] else _named(same["runs"][0]["label"], TEACHER)


def _teacher_key(twin: Mapping[str, Any]) -> str | None:
    return next((s["key"] for s in twin["lineage"] if s["stage"] == "benchmark_teacher"), None)


def _tables(runs: Sequence[Finished], labels: Sequence[str], teachers: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """Model → its rows, each model once."""
    tables: dict[str, pd.DataFrame] = {}
    for run, label in zip(runs, labels, strict=True):
        for model, rows in run.rows.groupby("model", sort=False):
            name = teachers[label] if model == TEACHER else _named(label, str(model))
            tables.setdefault(name, rows.assign(model=name))
    return tables


def _bare(
    name: str, label: str, measured: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A teacher among the students: only measured, nothing in it was made."""
    return {
        "name": name,
        "own_name": TEACHER,
        "run": label,
        "attention_layers": [],
        "replaced_layers": [],
        "mixer": "",
        "layers": 0,
        "continues": None,
        "method": None,
        "layer_choice": None,
        "starts": [],
        "layer_errors": [],
        "quality": [
            {"stage": stage, "ran": False, "kl": None, "top1": None, "kl_se": None}
            for stage in ("init", *TRAINING, "benchmark")
        ],
        "training": [{"stage": stage, "ran": False} for stage in TRAINING],
        "draft": {"stage": "draft", "ran": False},
        "benchmark": measured,
        "comparisons": [],
        "means": [],
        "speculation": None,
        "against_teacher": against(measured, teacher),
        "settings": {},
    }


def _baseline(wanted: str, variants: Sequence[Mapping[str, Any]], tables: Mapping[str, pd.DataFrame]) -> str:
    names = [TEACHER, *(v["name"] for v in variants)]
    alike = [n for n in names if n == wanted] or [v["name"] for v in variants if v["own_name"] == wanted]
    if len(alike) != 1:
        what = f"is one of {', '.join(alike)}" if alike else "is none of the models"
        raise ReportError(f"--baseline: {wanted!r} {what}; allowed: {', '.join(names)}")
    if alike[0] not in tables:
        raise ReportError(
            f"--baseline: {alike[0]} has no rows, its benchmark was not run; models with rows: {', '.join(tables)}"
        )
    return alike[0]


def _margins(twin: Mapping[str, Any]) -> dict[str, float]:
    """δ by unit, as the run was configured."""
    leaves = {"share": "non_inferiority", "nats": "non_inferiority_nats", "points": "non_inferiority_points"}
    return {unit: twin["configuration"][f"benchmark.{leaf}"] for unit, leaf in leaves.items()}


def _compare_all(
    baseline: str,
    first: str,
    variants: Sequence[dict[str, Any]],
    tables: Mapping[str, pd.DataFrame],
    compare: Compare,
    margins: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Fills every variant's `comparisons` and `means`; returns what was refused. first: label of "teacher"'s run."""
    run = next((v["run"] for v in variants if v["name"] == baseline), first)
    own = [v["name"] for v in variants if v["run"] == run and v["name"] in tables]
    reference = pd.concat([tables[name] for name in dict.fromkeys([baseline, *own])])
    refused: list[dict[str, Any]] = []
    for v in variants:
        v["comparisons"], v["means"] = [], []
        if v["name"] not in tables:
            continue
        unlike = {} if v["run"] == run else _unlike(reference, tables[v["name"]])
        for benchmark in unlike:
            _leave_out(v, benchmark)
        if v["name"] == baseline:
            continue
        compared = compare(tables[baseline], tables[v["name"]], margins, (baseline, v["name"]))
        v["comparisons"] = [named(c, COMPARISON) for c in compared.comparisons if c["benchmark"] not in unlike]
        v["means"] = [named(m, MEAN) for m in compared.means if not set(m["tasks"]) & set(unlike)]
        reasons = [named(r, ("benchmark", "metric", "reason")) for r in compared.refused]
        said = {r["benchmark"] for r in reasons}
        reasons += [{"benchmark": b, "metric": None, "reason": why} for b, why in unlike.items() if b not in said]
        refused += [reason | {"model": v["name"]} for reason in reasons]
    return refused


def _unlike(reference: pd.DataFrame, rows: pd.DataFrame) -> dict[str, str]:
    """Benchmark → why its figures must not stand beside the reference's; a judge is part of the prompts' hashes."""
    found = {}
    for benchmark, own in rows.drop_duplicates(["benchmark", "item"]).groupby("benchmark", sort=False):
        known = reference[reference["benchmark"] == benchmark].drop_duplicates("item").set_index("item")
        if known.empty:
            continue
        own = own.set_index("item")
        shared = known.index.intersection(own.index)
        if len(shared) < max(len(known), len(own)):
            found[str(benchmark)] = (
                f"{benchmark}: item sets differ ({len(known)} and {len(own)}, {len(shared)} in both)"
            )
            continue
        for column, what in (("item_hash", "contents"), ("prompt_hash", "prompts or judge")):
            different = shared[(known.loc[shared, column] != own.loc[shared, column]).to_numpy()]
            if len(different):
                found[str(benchmark)] = (
                    f"{benchmark}: {what} differ on {len(different)} of {len(shared)} items, first {different[0]!r}"
                )
                break
    return found


def _leave_out(variant: Mapping[str, Any], benchmark: str) -> None:
    """Takes a benchmark's figures off the page; tables then say "not comparable"."""
    measured = variant["benchmark"]
    if measured is None:
        return
    measured["refused"].append(benchmark)
    measured["fidelity"].pop(benchmark, None)
    for part in ("tasks", "calibration"):
        measured[part] = [entry for entry in measured[part] if entry["task"] != benchmark]
    *folders, last = SECTIONS.get(benchmark, ("",))
    inner = measured
    for folder in folders:
        inner = inner[folder] or {}
    if last in inner:
        inner[last] = None
    if benchmark == "held_out":
        for q in variant["quality"]:
            q |= {"kl": None, "top1": None, "kl_se": None} if q["stage"] == "benchmark" else {}


def _require_something_in_common(
    baseline: str, labels: Sequence[str], variants: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]
) -> None:
    for label in labels:
        others = [v for v in variants if v["run"] == label and v["name"] != baseline]
        names = {v["name"] for v in others}
        reasons = list(dict.fromkeys(r["reason"] for r in refused if r["model"] in names))
        if reasons and not any(v["comparisons"] for v in others):
            which = f"run {label}" if label else "the run"
            raise ReportError(f"nothing of {which} can be compared with {baseline}: {'; '.join(reasons)}")


def _samples(twins: Sequence[Mapping[str, Any]], teachers: Mapping[str, str]) -> list[dict[str, Any]]:
    """The first run's prompts with the answers of every run that has them."""
    shown = []
    for sample in twins[0]["samples"]:
        answers: dict[str, Any] = {}
        for twin in twins:
            for other in twin["samples"]:
                for response in other["responses"] if other["prompt"] == sample["prompt"] else ():
                    model = teachers[twin["runs"][0]["label"]] if response["model"] == TEACHER else response["model"]
                    answers.setdefault(model, response | {"model": model})
        shown.append({"prompt": sample["prompt"], "responses": list(answers.values())})
    return shown
