"""How near each student is to the teacher: layer by layer, position by position, and in how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from markupsafe import Markup

from reports.figures.models import Model, models, students, whisker
from reports.svg import Axis, Point, Series, line_chart
from reports.text import TEXTS, count, number, percent

LAYER_MEASURES = {
    "mixer_cosine": ("Mixer output: cosine with the teacher's attention", "cosine"),
    "mixer_relative_error": ("Mixer output: relative error", "relative L2 error"),
    "hidden_cosine": ("Hidden state after the layer: cosine", "cosine"),
    "hidden_relative_error": ("Hidden state after the layer: relative error", "relative L2 error"),
}
"""Measures of `evals.layers` → title and axis of their charts."""
DIAGRAMS = 4
"""Most tasks whose calibration is drawn."""
CURVES = 20
"""Most reliability curves of a page: with many models there are diagrams of fewer tasks."""


def by_layer(twin: Mapping[str, Any]) -> list[Markup]:
    """One chart a measure; replaced layers filled, kept ones hollow."""
    found = [m for m in students(twin) if m.benchmark["layers"]]
    charts = []
    for field, (title, axis) in LAYER_MEASURES.items():
        series = [
            Series(
                m.name if replaced else "",
                m.slot,
                points,
                joined=False,
                hollow=not replaced,
            )
            for m in found
            for replaced in (True, False)
            if (points := _layer_points(m, field, replaced))
        ]
        if not series:
            continue
        last = max(entry["layer"] for m in found for entry in m.benchmark["layers"])
        ticks = [(layer, str(layer)) for layer in range(0, last + 1, 5)]
        bounds = (1.0,) if field.endswith("cosine") else (0.0,)
        charts.append(line_chart(title, series, Axis("layer", ticks=ticks), Axis(axis, include=bounds)))
    return charts


def _layer_points(model: Model, field: str, replaced: bool) -> list[Point]:
    kind = "replaced" if replaced else "kept"
    return [
        Point(e["layer"], e[field], note=f"{model.name}, layer {e['layer']}, {kind}: {number(e[field])}")
        for e in model.benchmark["layers"]
        if e["replaced"] == replaced and e[field] is not None
    ]


def by_position(twin: Mapping[str, Any]) -> list[Markup]:
    """KL to the teacher against the position in the text, one chart a text."""
    charts = []
    for text, name in TEXTS.items():
        series = [
            Series(m.name, m.slot, points)
            for m in students(twin)
            if (points := _position_points(m.name, (m.benchmark["fidelity"].get(text) or {}).get("by_position") or []))
        ]
        if series:
            x = Axis("position in the text, tokens", log=True)
            y = Axis("KL, nats per token", include=(0.0,))
            charts.append(line_chart(f"KL by position, {name}", series, x, y))
    return charts


def _position_points(name: str, buckets: Sequence[Mapping[str, Any]]) -> list[Point]:
    return [
        Point(
            middle(b),
            b["kl"],
            *whisker(b["kl"], b["kl_se"]),
            f"{name}, positions {span(b)}: {number(b['kl'])} nats, n={count(b['n'])} tokens",
        )
        for b in buckets
        if b["kl"] is not None
    ]


def middle(bucket: Mapping[str, Any]) -> float:
    """Where the bucket of positions from ≤ p < to stands on a logarithmic axis: at its geometric middle."""
    return sqrt(max(1, bucket["from"]) * max(1, bucket["to"] - 1))


def span(bucket: Mapping[str, Any]) -> str:
    """A bucket's first and last position."""
    return f"{count(bucket['from'])} to {count(bucket['to'] - 1)}"


def calibration(twin: Mapping[str, Any]) -> dict[str, Markup]:
    """Reliability diagrams of the first tasks, all models in each: accuracy against confidence, and where they would be
    equal. Not of all: with every task of lm-eval the bins alone would fill a page of half a megabyte."""
    found = models(twin)
    tasks = list(dict.fromkeys(c["task"] for m in found for c in m.benchmark["calibration"]))
    shown = max(1, min(DIAGRAMS, CURVES // max(1, len(found))))
    return {task: _reliability(task, found) for task in tasks[:shown]}


def _reliability(task: str, found: Sequence[Model]) -> Markup:
    series = [Series("", 0, [Point(0.0, 0.0), Point(1.0, 1.0)], markers=False, dashed=True)]
    sizes: list[int] = []
    for m in found:
        bins: Sequence[Mapping[str, Any]] = next(
            (c["bins"] for c in m.benchmark["calibration"] if c["task"] == task), []
        )
        points = [
            Point(
                b["confidence"],
                b["accuracy"],
                b["ci_low"],
                b["ci_high"],
                f"{m.name}: confidence {percent(b['confidence'])}, right {percent(b['accuracy'])}, n={count(b['n'])}",
            )
            for b in bins
        ]
        sizes += [b["n"] for b in bins]
        series.append(Series(m.name, m.slot, points))

    def show(share: float) -> str:
        return f"{100 * share:.0f} %"

    each = " to ".join(count(n) for n in dict.fromkeys((min(sizes), max(sizes)))) if sizes else ""
    x = Axis(f"confidence, mean of a bin of {each} items", include=(0.0, 1.0), show=show)
    y = Axis("right, share of the bin", include=(0.0, 1.0), show=show)
    return line_chart(f"Reliability on {task}", series, x, y, height=330)
