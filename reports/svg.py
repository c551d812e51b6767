"""Charts as SVG text: no library, no script, the same bytes for the same numbers.

Colours and fonts come from the page's style sheet through classes: `s0` is the teacher, `s1`, `s2`, … the variants, and
each has a marker shape of its own so that nothing rests on colour alone. Every mark carries its numbers in a <title>.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10

from markupsafe import Markup, escape

from reports.text import tick

SLOTS = 7
"""Classes s0 … s6 in the style sheet; later variants take them again from s1."""
LEFT = 54
"""Least room left of a line chart's axis; its legend begins there."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """name: as in the legend; "" stands in none. joined: draw the line through the points."""

    name: str
    slot: int
    points: Sequence[Point]
    markers: bool = True
    dashed: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """ticks: (value, label) pairs in place of computed ones. include: values that must lie within the axis."""

    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    include: Sequence[float] = ()
    show: Callable[[float], str] = tick


@dataclass(frozen=True)
class ForestRow:
    """One paired difference. first: draw `label` (a new benchmark begins)."""

    label: str
    name: str
    slot: int
    value: float
    low: float
    high: float
    note: str
    first: bool


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """One element; attribute `class_` is written `class`, underscores become hyphens. What is not Markup is escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, Markup("").join(escape(c) for c in children))


def slot(index: int) -> int:
    """Style class number of the variant with this 0-based index."""
    return 1 + index % (SLOTS - 1)


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round values (1, 2, 2.5, 5 × 10ⁿ apart) that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / target
    power = 10 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 × 10ⁿ that cover [low, high] > 0; powers of ten alone beyond three decades."""
    multiples = (1, 2, 5) if high / low < 1000 else (1,)
    grid = [m * 10.0**e for e in range(floor(log10(low)) - 1, ceil(log10(high)) + 2) for m in multiples]
    first = max(i for i, value in enumerate(grid) if value <= low * 1.0001)
    last = min(i for i, value in enumerate(grid) if value >= high * 0.9999)
    return grid[first : max(last, first + 1) + 1]


class _Scale:
    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        values = [v for v in [*values, *axis.include] if not axis.log or v > 0]
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        if axis.ticks is not None:
            self.ticks = list(axis.ticks)
            low, high = min([low, *(v for v, _ in self.ticks)]), max([high, *(v for v, _ in self.ticks)])
        else:
            marks = log_ticks(low, high) if axis.log else linear_ticks(low, high)
            self.ticks = [(v, axis.show(v)) for v in marks]
            low, high = marks[0], marks[-1]
        self._map = log10 if axis.log else float
        self._low, self._span = self._map(low), (self._map(high) - self._map(low)) or 1.0
        self._start, self._end = start, end
        self.log = axis.log

    def __call__(self, value: float) -> float:
        return self._start + (self._map(value) - self._low) / self._span * (self._end - self._start)


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    width: int = 460,
    height: int = 270,
    rule: float | None = None,
) -> Markup:
    """Lines with optional markers and 95 % whiskers. rule: a horizontal reference line at this y."""
    series = [_drawable(s, x.log, y.log) for s in series]
    series = [s for s in series if s.points]
    right, top, bottom = 26, 30 + 18 * _legend_lines(series, width), 44
    xs = [p.x for s in series for p in s.points]
    ys = [v for s in series for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    up = _Scale(y, ys if rule is None else [*ys, rule], height - bottom, top)
    left = max(LEFT, 27 + 6.5 * max(len(label) for _, label in up.ticks))  # the axis's name stands before its numbers
    across = _Scale(x, xs, left, width - right)

    parts = [_heading(title), _legend(series, width)]
    for value, label in up.ticks:
        parts.append(tag("line", class_="grid", x1=left, x2=width - right, y1=up(value), y2=up(value)))
        parts.append(tag("text", label, class_="tick", x=left - 7, y=up(value) + 3.5, text_anchor="end"))
    for value, label in across.ticks:
        parts.append(tag("text", label, class_="tick", x=across(value), y=height - bottom + 17, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom))
    parts.append(tag("text", x.label, class_="label", x=(left + width - right) / 2, y=height - 8, text_anchor="middle"))
    middle = (top + height - bottom) / 2
    turn = f"rotate(-90 13 {_plain(middle)})"
    parts.append(tag("text", y.label, class_="label", x=13, y=middle, text_anchor="middle", transform=turn))
    if rule is not None:
        parts.append(tag("line", class_="rule", x1=left, x2=width - right, y1=up(rule), y2=up(rule)))
    for s in series:
        placed = " ".join(f"{_plain(across(p.x))},{_plain(up(p.y))}" for p in s.points)
        if s.joined:
            parts.append(tag("polyline", class_=f"line s{s.slot}{' dashed' if s.dashed else ''}", points=placed))
        for p in s.points if s.markers else ():
            note = p.note or f"{s.name}: {y.show(p.y)} at {x.show(p.x)}"
            parts.append(_marked(s.slot, across(p.x), up(p.y), note, _whisker(p, across, up)))
    return _frame(title, width, height, parts)


def forest(
    title: str, rows: Sequence[ForestRow], axis: Axis, *, delta: float | None = None, width: int = 960
) -> Markup:
    """Paired differences with intervals, one row a benchmark and variant; a line at 0, a dashed one at the margin."""
    top, bottom, step = 44, 46, 24
    widest = 6.8 * max(len(r.label) for r in rows) + 6.6 * max(len(r.name) for r in rows)
    left, right = min(round(widest) + 44, width // 2), 24 + round(6.2 * max(len(r.note) for r in rows))
    height = top + bottom + step * len(rows) + 8 * sum(r.first for r in rows)
    bounds = [v for r in rows for v in (r.low, r.high)] + [0.0] + ([] if delta is None else [delta])
    across = _Scale(axis, bounds, left, width - right)
    floor_y = height - bottom
    parts = [_heading(title)]
    for value, label in across.ticks:
        parts.append(tag("line", class_="grid", x1=across(value), x2=across(value), y1=top, y2=floor_y))
        parts.append(tag("text", label, class_="tick", x=across(value), y=floor_y + 17, text_anchor="middle"))
    parts.append(tag("line", class_="zero", x1=across(0), x2=across(0), y1=top - 4, y2=floor_y))
    parts.append(tag("text", "teacher", class_="tick", x=across(0), y=top - 8, text_anchor="middle"))
    if delta is not None:
        parts.append(tag("line", class_="rule", x1=across(delta), x2=across(delta), y1=top - 4, y2=floor_y))
    y = float(top - step / 2)
    for row in rows:
        y += step + (8 if row.first else 0)
        if row.first:
            parts.append(tag("text", row.label, class_="label strong", x=8, y=y + 4))
        parts.append(tag("text", row.name, class_=f"label ink s{row.slot}", x=left - 12, y=y + 4, text_anchor="end"))
        whisker = tag("line", class_="whisker", x1=across(row.low), x2=across(row.high), y1=y, y2=y)
        parts.append(_marked(row.slot, across(row.value), y, f"{row.label}, {row.name}: {row.note}", whisker))
        parts.append(tag("text", row.note, class_="tick", x=width - right + 12, y=y + 4))
    parts.append(
        tag("text", axis.label, class_="label", x=(left + width - right) / 2, y=height - 8, text_anchor="middle")
    )
    return _frame(title, width, height, parts)


def layer_strip(title: str, layers: int, attention: Sequence[int], index: int) -> Markup:
    """One cell a layer: filled where a Mamba mixer stands, outlined where attention stayed."""
    cell, gap = 11, 3
    kept = set(attention)
    cells = []
    for layer in range(layers):
        kind = "attention" if layer in kept else "Mamba-2"
        look = "cell" if layer in kept else f"cell filled s{index}"
        note = tag("title", f"layer {layer}: {kind}")
        cells.append(
            tag("g", note, tag("rect", class_=look, x=1 + layer * (cell + gap), y=1, width=cell, height=18, rx=2))
        )
    return _frame(title, layers * (cell + gap), 20, cells, "strip")


def marker(number: int, x: float, y: float, radius: float = 4.0) -> Markup:
    """The shape of a slot: circle, square, triangle, diamond, …"""
    look = f"mark s{number}"
    if number in (0, 1):
        return tag("circle", class_=look, cx=x, cy=y, r=radius)
    shapes = {
        2: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        3: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        4: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        5: ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
        6: ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    }
    corners = " ".join(f"{_plain(x + radius * dx)},{_plain(y + radius * dy)}" for dx, dy in shapes[number])
    return tag("polygon", class_=look, points=corners)


def key(number: int) -> Markup:
    """The marker alone, for tables and headings; decorative, the name stands beside it."""
    return Markup('<svg class="key" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{}</svg>').format(
        marker(number, 6, 6)
    )


def _plain(value: object) -> str:
    """Coordinates to a tenth of a unit; all else as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _frame(title: str, width: int, height: int, parts: Sequence[str], look: str = "chart") -> Markup:
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    look += " broad" if look == "chart" and width > 600 else ""
    return tag("svg", tag("title", title), *parts, class_=look, role="img", **size)


def _heading(title: str) -> Markup:
    return tag("text", title, class_="label strong", x=4, y=12)


def _drawable(s: Series, log_x: bool, log_y: bool) -> Series:
    """Without the points that a logarithmic axis cannot show."""
    points = [p for p in s.points if (not log_x or p.x > 0) and (not log_y or p.y > 0)]
    return replace(s, points=points)


def _marked(number: int, x: float, y: float, note: str, whisker: Markup) -> Markup:
    return tag("g", tag("title", note), whisker, marker(number, x, y), class_=f"point s{number}")


def _whisker(p: Point, across: _Scale, up: _Scale) -> Markup:
    if p.low is None or p.high is None or (up.log and p.low <= 0):
        return Markup("")
    return tag("line", class_="whisker", x1=across(p.x), x2=across(p.x), y1=up(p.low), y2=up(p.high))


def _legend_width(s: Series) -> float:
    return 30 + 6.6 * len(s.name)


def _legend_lines(series: Sequence[Series], width: int) -> int:
    return max((1 + line for _, _, line in _legend_places(series, width)), default=0)


def _legend_places(series: Sequence[Series], width: int) -> list[tuple[Series, float, int]]:
    places: list[tuple[Series, float, int]] = []
    left, x, line = float(LEFT), float(LEFT), 0
    for s in series:
        if not s.name:
            continue
        if x > left and x + _legend_width(s) > width:
            x, line = left, line + 1
        places.append((s, x, line))
        x += _legend_width(s)
    return places


def _legend(series: Sequence[Series], width: int) -> Markup:
    parts = []
    for s, x, line in _legend_places(series, width):
        y = 30.0 + 18 * line
        parts.append(marker(s.slot, x + 6, y))
        parts.append(tag("text", s.name, class_="label", x=x + 16, y=y + 4))
    return Markup("").join(parts)
