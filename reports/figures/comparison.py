"""Which layers a student kept, and its paired differences from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.svg import Axis, ForestRow, forest, layer_strip, slot
from reports.text import benchmark_name, interval, points, signed
from reports.verdict import is_share

UNITS = {"share": "percentage points", "nats": "nats per token", "points": "points of the judge's scale"}
"""Units of the comparisons as the axis names them."""


def strips(twin: Mapping[str, Any]) -> dict[str, Markup | None]:
    """One strip a variant; None where its layers are not known."""
    return {v["name"]: _strip(v, i) for i, v in enumerate(twin["variants"])}


def _strip(variant: Mapping[str, Any], index: int) -> Markup | None:
    if not variant["layers"]:
        return None
    kept = variant["attention_layers"]
    title = f"{variant['name']}: {len(kept)} of {variant['layers']} layers keep attention"
    return layer_strip(title, variant["layers"], kept, variant["mixer"], slot(index))


def forests(twin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"unit", "chart"}: one chart a unit, because points, nats and perplexities share no axis."""
    pairs = [
        (i, v["name"], c)
        for i, v in enumerate(twin["variants"])
        for c in v["comparisons"]
        if c["difference"] is not None
    ]
    kinds: dict[tuple[str, bool], list[tuple[int, str, Mapping[str, Any]]]] = {}
    for i, name, c in pairs:
        unit = c["unit"] or ("share" if is_share(c["metric"]) else str(c["metric"]))
        kinds.setdefault((unit, bool(c["higher_is_better"])), []).append((i, name, c))
    baseline = twin["baseline"]["name"]
    return [
        {"unit": UNITS.get(unit, unit), "chart": _forest(unit, higher, rows, baseline)}
        for (unit, higher), rows in kinds.items()
    ]


def _forest(unit: str, higher: bool, pairs: Sequence[tuple[int, str, Mapping[str, Any]]], baseline: str) -> Markup:
    scale = 100.0 if unit == "share" else 1.0
    labels = list(dict.fromkeys((c["benchmark"], c["metric"]) for _, _, c in pairs))
    rows = []
    for label in labels:
        for position, (i, name, c) in enumerate(p for p in pairs if (p[2]["benchmark"], p[2]["metric"]) == label):
            low = c["difference"] if c["ci_low"] is None else c["ci_low"]
            high = c["difference"] if c["ci_high"] is None else c["ci_high"]
            show = points if unit == "share" else signed
            note = f"{show(c['difference'])} {interval(c['ci_low'], c['ci_high'], show)}"
            rows.append(
                ForestRow(
                    f"{benchmark_name(c['benchmark'])}, n={c['n']}",
                    name,
                    slot(i),
                    scale * c["difference"],
                    scale * low,
                    scale * high,
                    note,
                    position == 0,
                )
            )
    margins = {c["delta"] for _, _, c in pairs if c.get("delta")}
    delta = (-scale if higher else scale) * margins.pop() if len(margins) == 1 else None
    better = "right" if higher else "left"
    axis = Axis(f"student − {baseline}; further {better} is better")
    title = f"Paired difference in {UNITS.get(unit, unit)}"
    return forest(title, rows, axis, zero=baseline, delta=delta)
