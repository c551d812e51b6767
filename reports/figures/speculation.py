"""What speculative decoding yields, against the number of drafted tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.svg import Axis, Point, Rule, Series, line_chart, slot
from reports.text import number, percent, tick


def sweep(twin: Mapping[str, Any]) -> list[Markup]:
    """Greedy groups alone: acceptance by position and yield at the first batch, speed-up at every batch."""
    variants = twin["variants"]
    groups = [
        (f"{v['name']}, {g['draft']}", i, g)
        for i, v in enumerate(variants)
        if v["speculation"]
        for g in v["speculation"]["groups"]
        if not g["temperature"]
    ]
    # a student's first draft has the student's own marker, its others have markers that no student has
    places: dict[str, int] = {}
    for name, i, _ in groups:
        places.setdefault(name, i if i not in places.values() else len(variants) + len(places))
    batches = list(dict.fromkeys(g["batch"] for *_, g in groups))
    charts = []
    for batch in batches:
        chosen = [(name, slot(places[name]), g["rows"]) for name, _, g in groups if g["batch"] == batch]
        if batch == batches[0]:
            charts += [_by_position(chosen), _yield(chosen)]
        charts.append(_speedup(chosen, batch))
    return [chart for chart in charts if chart]


SpeculationRows = Sequence[tuple[str, int, Sequence[Mapping[str, Any]]]]
"""(series' name, style slot, rows of one draft and batch)."""


def _by_position(chosen: SpeculationRows) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        longest = max(rows, key=lambda row: row["k"], default=None)
        shares = (longest or {}).get("acceptance_by_position") or []
        marks = [
            Point(i, a, note=f"{name}: {percent(a)} at position {i}") for i, a in enumerate(shares, 1) if a is not None
        ]
        series.append(Series(name, number_, marks))
    return _over_k(
        "Acceptance by position, of the longest window",
        series,
        "position in the window; all before it accepted",
        Axis("accepted", include=(0.0, 1.0), show=lambda share: f"{100 * share:.0f} %"),
    )


def _yield(chosen: SpeculationRows) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        marks = [
            Point(
                row["k"],
                row["tokens_per_verification"],
                row["ci_low"],
                row["ci_high"],
                f"{name}, K={row['k']}: {number(row['tokens_per_verification'])}",
            )
            for row in rows
            if row["tokens_per_verification"] is not None
        ]
        series.append(Series(name, number_, marks))
    axis = Axis("tokens per verification")
    return _over_k("Tokens gained per verification", series, "K, drafted tokens", axis, level=Rule(1.0))


def _speedup(chosen: SpeculationRows, batch: int) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        for field, label in (("speedup", name), ("predicted_speedup", f"{name}, predicted")):
            marks = [
                Point(row["k"], row[field], note=f"{label}, K={row['k']}: {number(row[field])}×")
                for row in rows
                if row[field] is not None
            ]
            predicted = field != "speedup"
            series.append(Series("" if predicted else label, number_, marks, dashed=predicted, hollow=predicted))
    title = f"Speed against plain greedy decoding, batch {batch}"
    return _over_k(title, series, "K, drafted tokens", Axis("speed, × plain greedy"), level=Rule(1.0))


def _over_k(title: str, series: Sequence[Series], label: str, y: Axis, level: Rule | None = None) -> Markup | None:
    ks = sorted({p.x for s in series for p in s.points})
    if not ks:
        return None
    x = Axis(label, ticks=[(k, tick(k)) for k in ks])
    return line_chart(title, series, x, y, levels=[] if level is None else [level])
