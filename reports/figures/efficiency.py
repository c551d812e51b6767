"""Speed, memory, and what quality they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from markupsafe import Markup

from reports.figures.models import Model, models, rules
from reports.svg import Absent, Axis, Point, Series, line_chart
from reports.text import MISSING, count, number, percent, size, tick

KINDS = {"prefill": "Reading the prompt (prefill)", "decode": "Decoding"}


def throughput(twin: Mapping[str, Any]) -> list[Markup]:
    """Prefill and decode, each by batch at the longest context and by context at the largest batch."""
    charts = []
    for kind, title in KINDS.items():
        cells = [(m, m.benchmark["efficiency"][kind]) for m in _measured(twin)]
        contexts = sorted({c["context"] for _, own in cells for c in own})
        batches = sorted({c["batch"] for _, own in cells for c in own})
        if len(batches) > 1:
            fixed = f"{title}, context {count(contexts[-1])}"
            charts.append(_speed(fixed, cells, "batch", "context", contexts[-1], "sequences at once"))
        if len(contexts) > 1:
            fixed = f"{title}, batch {count(batches[-1])}"
            charts.append(_speed(fixed, cells, "context", "batch", batches[-1], "context, tokens"))
    return [chart for chart in charts if chart]


def _speed(
    title: str,
    cells: Sequence[tuple[Model, Sequence[Mapping[str, Any]]]],
    along: str,
    fixed: str,
    value: int,
    label: str,
) -> Markup | None:
    series, absent = [], []
    for m, own in cells:
        row = [c for c in own if c[fixed] == value]
        where = {c[along]: f"{m.name}, batch {count(c['batch'])}, context {count(c['context'])}" for c in row}
        series.append(
            Series(
                m.name,
                m.slot,
                [
                    Point(
                        c[along],
                        c["tokens_per_second"],
                        c["low"],
                        c["high"],
                        f"{where[c[along]]}: {number(c['tokens_per_second'])} tokens/s",
                    )
                    for c in row
                    if c["tokens_per_second"] is not None
                ],
            )
        )
        absent += [Absent(c[along], m.slot, "OOM", f"{where[c[along]]}: out of memory") for c in row if c["oom"]]
    if not absent and not any(s.points for s in series):
        return None
    ticks = sorted({c[along] for _, own in cells for c in own})
    x = Axis(label, log=True, ticks=[(t, tick(t)) for t in ticks])
    return line_chart(title, series, x, Axis("tokens per second", log=True), absent=absent)


def against(twin: Mapping[str, Any]) -> dict[str, dict[str, dict[Any, float]]]:
    """student → phase → (batch, context) → speed, and → "state" → context → bytes, as multiples of the teacher's."""
    return {
        v["name"]: {
            **{kind: {(c["batch"], c["context"]): c["ratio"] for c in v["against_teacher"][kind]} for kind in KINDS},
            "state": {e["context"]: e["ratio"] for e in v["against_teacher"]["state"]},
        }
        for v in twin["variants"]
    }


def state(twin: Mapping[str, Any]) -> Markup | None:
    """Bytes of one sequence against context, computed as lines and measured as hollow markers."""
    series = []
    for m in _measured(twin):
        entries = m.benchmark["efficiency"]["state"]
        computed = [
            Point(
                e["context"], e["total"] / 2**20, note=f"{m.name}: {size(e['total'])} at {count(e['context'])} tokens"
            )
            for e in entries
        ]
        measured = [
            Point(
                e["context"],
                e["measured"] / 2**20,
                note=f"{m.name}, measured: {size(e['measured'])} at {count(e['context'])} tokens",
            )
            for e in entries
            if e["measured"]
        ]
        series.append(Series(m.name, m.slot, computed))
        series.append(Series(f"{m.name}, measured", m.slot, measured, joined=False, hollow=True))
    students = [(m.name, m.benchmark["efficiency"]["crossover"]) for m in _measured(twin) if m.slot]
    crossings = rules(students, lambda who, context: f"{who}: fewer bytes from {context}")
    if not any(s.points for s in series):
        return None
    contexts = sorted({p.x for s in series for p in s.points} | {r.value for r in crossings})
    x = Axis("context, tokens", log=True, ticks=[(c, tick(c)) for c in contexts])
    title = "State of one sequence against context"
    y = Axis("state, MiB", log=True)
    return line_chart(title, series, x, y, uprights=crossings)


@dataclass(frozen=True)
class Measure:
    """One axis of the frontier. values: model → value; half: model → half-width of its 95 % interval, where known."""

    title: str
    label: str
    values: Mapping[str, float]
    show: Callable[[float], str]
    half: Mapping[str, float] = field(default_factory=dict)
    unit: float = 1.0
    cheaper: bool = False
    """Whether less is better."""


def frontier(twin: Mapping[str, Any]) -> list[Markup]:
    """Quality against decode speed and against state bytes, a dot a model; the line joins what nothing beats."""
    pairs = [(quality, cost) for quality in qualities(twin) for cost in costs(twin)]
    return [chart for quality, cost in pairs if (chart := _frontier(models(twin), quality, cost))]


def frontier_table(twin: Mapping[str, Any]) -> dict[str, Any]:
    """{"columns", "rows": [(model, cells)], "tasks": [(task, metric)]} of what `frontier` draws."""
    measures = [*qualities(twin), *costs(twin)]
    rows = [(m, [_cell(measure, m.name) for measure in measures]) for m in models(twin)]
    return {"columns": [m.label for m in measures], "rows": rows, "tasks": shared_tasks(twin)}


def _cell(measure: Measure, name: str) -> str:
    if name not in measure.values:
        return MISSING
    half = measure.half.get(name)
    shown = measure.show(measure.values[name])
    return shown if half is None else f"{shown} ± {measure.show(half)}"


def qualities(twin: Mapping[str, Any]) -> list[Measure]:
    """Mean of the tasks that all models have, and agreement with the teacher on held-out conversations."""
    tasks = shared_tasks(twin)
    own = {m.name: [t for t in m.benchmark["tasks"] if (t["task"], t["metric"]) in tasks] for m in models(twin)}
    own = {name: scores for name, scores in own.items() if scores}
    means = Measure(
        "Task scores",
        f"mean of {len(tasks)} tasks",
        {name: sum(t["score"] for t in scores) / len(scores) for name, scores in own.items()},
        percent,
        # tasks are independent samples: the variance of their mean is the sum of theirs over their number squared
        {
            name: sqrt(sum(((t["ci_high"] - t["ci_low"]) / 2) ** 2 for t in scores)) / len(scores)
            for name, scores in own.items()
        },
    )
    shares = {m.name: (m.benchmark["fidelity"].get("held_out") or {}).get("top1") for m in models(twin)}
    agreement = {name: share for name, share in shares.items() if share is not None}
    if agreement and twin["teacher"]["benchmark"]:
        agreement["teacher"] = 1.0  # with itself
    return [means, Measure("Agreement", "top-1 agreement, held-out", agreement, percent)]


def shared_tasks(twin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(task, metric) of the tasks whose score every model has: the metric that is compared, else the task's first."""
    compared = {(c["benchmark"], c["metric"]) for v in twin["variants"] for c in v["comparisons"]}
    own = [
        [(t["task"], t["metric"]) for t in m.benchmark["tasks"] if t["ci_low"] is not None]
        for m in models(twin)
        if m.benchmark["tasks"]
    ]
    everywhere = [pair for pair in (own[0] if own else []) if all(pair in scores for scores in own)]
    chosen: dict[str, str] = {}
    for task, metric in sorted(everywhere, key=lambda pair: pair not in compared):
        chosen.setdefault(task, metric)
    return list(chosen.items())


def costs(twin: Mapping[str, Any]) -> list[Measure]:
    """Decode speed at the largest batch, then the longest context, and state bytes at the longest context, at which all
    models were measured."""
    measured = _measured(twin)
    speeds = {
        m.name: {
            (c["batch"], c["context"]): c["tokens_per_second"]
            for c in m.benchmark["efficiency"]["decode"]
            if c["tokens_per_second"] is not None
        }
        for m in measured
    }
    totals = {m.name: {e["context"]: e["total"] for e in m.benchmark["efficiency"]["state"]} for m in measured}
    found = []
    if at := _last_common(speeds):
        label = f"decode tokens/s, batch {count(at[0])}, context {count(at[1])}"
        found.append(Measure("speed", label, {name: own[at] for name, own in speeds.items()}, number))
    if context := _last_common(totals):
        values = {name: own[context] for name, own in totals.items()}
        label = f"state of one sequence at {count(context)} tokens, MiB"
        found.append(Measure("memory", label, values, size, unit=2**20, cheaper=True))
    return found


def _last_common(tables: Mapping[str, Mapping[Any, float]]) -> Any:
    """The largest key that all tables have; None without one."""
    return max(set.intersection(*(set(own) for own in tables.values())), default=None) if tables else None


def _frontier(found: Sequence[Model], quality: Measure, cost: Measure) -> Markup | None:
    both = [m for m in found if m.name in quality.values and m.name in cost.values]
    if len(both) < 2:
        return None
    placed = {m.name: (cost.values[m.name] / cost.unit, quality.values[m.name]) for m in both}
    dots = []
    for m in both:
        (x, y), half = placed[m.name], quality.half.get(m.name)
        low, high = (None, None) if half is None else (y - half, y + half)
        note = f"{m.name}: {_cell(quality, m.name)}, {cost.show(cost.values[m.name])}"
        dots.append(Series(m.name, m.slot, [Point(x, y, low, high, note)], joined=False))
    corners = [Point(x, y) for x, y in steps(list(placed.values()), cost.cheaper)]
    line = Series("", 0, corners, markers=False, dashed=True)
    y_axis = Axis(quality.label, show=lambda share: f"{100 * share:.3g} %")
    return line_chart(f"{quality.title} against {cost.title}", [line, *dots], Axis(cost.label, log=True), y_axis)


def steps(pairs: Sequence[tuple[float, float]], cheaper: bool) -> list[tuple[float, float]]:
    """Corners of the step line through the (cost, quality) pairs that no other beats in both.

    cheaper: a lower cost is the better one (bytes), else a higher (speed). Between two of them stands the quality that
    can be had within that cost.
    """
    best: list[tuple[float, float]] = []
    for cost, quality in sorted(pairs, key=lambda p: (p[0] if cheaper else -p[0], -p[1])):
        if not best or quality > best[-1][1]:
            best.append((cost, quality))
    corners = best[:1]
    for (_, before), (cost, quality) in zip(best, best[1:], strict=False):
        corners += [(cost, before), (cost, quality)]
    return corners


def _measured(twin: Mapping[str, Any]) -> Sequence[Model]:
    return [m for m in models(twin) if m.benchmark["efficiency"]]
