"""Beyond the training length: loss by position, loss on the same last tokens, and needles found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.figures.fidelity import middle, span
from reports.figures.models import Model, models, rules, whisker
from reports.svg import NOTED, Axis, Cell, Point, Rule, Series, heat_map, line_chart
from reports.text import count, interval, number, percent


def by_position(twin: Mapping[str, Any]) -> Markup | None:
    """Loss by position bucket; whiskers are 95 % intervals by document."""
    series = [
        Series(m.name, m.slot, [_bucket(m.name, b) for b in m.benchmark["length"]["curve"] if b["nll"] is not None])
        for m in _measured(twin)
    ]
    if not any(s.points for s in series):
        return None
    x = Axis("position in the document, tokens", log=True)
    y = Axis("loss, nats per token")
    title = "Loss by position in long documents"
    return line_chart(title, series, x, y, uprights=_lengths(twin))


def _bucket(name: str, b: Mapping[str, Any]) -> Point:
    note = (
        f"{name}, positions {span(b)}: {number(b['nll'])} nats, "
        f"n={count(b['n'])} tokens of {count(b['documents'])} documents"
    )
    return Point(middle(b), b["nll"], *whisker(b["nll"], b["se"]), note)


def last_tokens(twin: Mapping[str, Any]) -> Markup | None:
    """Loss on the same last tokens against how much of the text before them is read."""
    series = [
        Series(
            m.name,
            m.slot,
            [
                Point(
                    e["context"],
                    e["nll"],
                    *whisker(e["nll"], e["se"]),
                    f"{m.name}, context {count(e['context'])}: {number(e['nll'])} nats, n={count(e['n'])} tokens",
                )
                for e in m.benchmark["length"]["last"]
                if e["nll"] is not None
            ],
        )
        for m in _measured(twin)
    ]
    if not any(s.points for s in series):
        return None
    contexts = sorted({p.x for s in series for p in s.points})
    x = Axis("context before them, tokens", log=True, ticks=[(c, count(c)) for c in contexts])
    title = "Loss on the same last tokens against context"
    y = Axis("loss, nats per token")
    return line_chart(title, series, x, y, uprights=_lengths(twin))


def needles(twin: Mapping[str, Any]) -> list[Markup]:
    """One heat map a model: needles found by depth and length."""
    context = twin["teacher"]["context"]
    measured = [m for m in models(twin) if m.benchmark["needle"] and m.benchmark["needle"]["cells"]]
    noted = sum(len(m.benchmark["needle"]["cells"]) for m in measured) <= NOTED
    return [
        _needle_map(m.name, grid, grid["train_length"] if m.slot else context, noted)
        for m in measured
        for grid in [m.benchmark["needle"]]
    ]


def _needle_map(name: str, grid: Mapping[str, Any], trained: int | None, noted: bool) -> Markup:
    lengths, depths = sorted(grid["lengths"]), sorted(grid["depths"])
    cells = {(c["depth"], c["length"]): c for c in grid["cells"]}
    rows = [
        (f"{100 * depth:.0f} %", [_needle_cell(depth, length, cells.get((depth, length)), noted) for length in lengths])
        for depth in depths
    ]
    limits = [
        (sum(length <= limit for length in lengths), f"{word} to {count(limit)}")
        for word, limit in (("trained", trained), ("effective", grid["effective_length"]))
        if limit
    ]
    return heat_map(
        f"{name}: needles found", [count(n) for n in lengths], rows, "length, tokens", "depth", rules=limits
    )


def _needle_cell(depth: float, length: int, cell: Mapping[str, Any] | None, noted: bool) -> Cell:
    where = f"depth {100 * depth:.0f} %, {count(length)} tokens"
    if cell is None or not cell["n"]:
        return Cell(None, "–", f"{where}: not measured" if noted else "")
    share = cell["k"] / cell["n"]
    low, high = cell.get("ci_low"), cell.get("ci_high")
    spread = "" if low is None else f" {interval(low, high, percent)}"
    note = f"{where}: {cell['k']} of {cell['n']}, {percent(share)}{spread}"
    return Cell(share, f"{cell['k']}/{cell['n']}", note if noted else "")


def _measured(twin: Mapping[str, Any]) -> Sequence[Model]:
    return [m for m in models(twin) if m.benchmark["length"]]


def _lengths(twin: Mapping[str, Any]) -> list[Rule]:
    """Where training ended, for each length that students were trained with, and the teacher's own context."""
    trained = [(m.name, m.benchmark["length"]["train_length"]) for m in _measured(twin) if m.slot]
    context = twin["teacher"]["context"]
    own = [Rule(context, f"teacher's context, {count(context)}")] if context else []
    return [*rules(trained, lambda who, length: f"{who} trained to {length}"), *own]
