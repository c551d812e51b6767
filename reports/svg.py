"""Charts as SVG text: no library, no script, the same bytes for the same numbers.

Colours and fonts come from the page's style sheet through classes: `s0` is the teacher, `s1`, `s2`, … the variants, and
each has a marker shape of its own so that nothing rests on colour alone. A mark carries its numbers in a <title>,
unless they stand beside it or a chart has too many marks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, cos, floor, log10, pi, sin

from markupsafe import Markup, escape

from reports.text import tick

SLOTS = 13
"""Classes s0 … s12 in the style sheet, six colours twice over with other shapes; later variants begin again at s1."""
LEFT = 54
"""Least room left of a line chart's axis; its legend begins there."""
LEAST_PLOT = 220
"""Least width of a forest's intervals; long names make it wider than WIDTH."""
RADIUS = 4.0
MARKERS = 25
"""Most points of a line that all have a marker."""
NOTED = 120
"""Most marks of a chart that say their numbers on hovering; of more, the table behind the chart does."""
SHADES = 10
"""Classes h0 … h9 of a heat map, dark to bright."""
WIDTH = 460
"""Of a chart whose names are short: two stand side by side, and one fits a phone."""


@dataclass(frozen=True)
class Point:
    """low, high: ends of the whisker. note: said on hovering, in place of the coordinates."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """name: as in the legend; "" stands in none. joined: draw the line through the points. hollow: outlined markers.

    Of many joined points only some get a marker, enough to tell the lines apart without their colours.
    """

    name: str
    slot: int
    points: Sequence[Point]
    markers: bool = True
    dashed: bool = False
    joined: bool = True
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """ticks: (value, label) pairs in place of computed ones. include: values that must lie within the axis."""

    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    include: Sequence[float] = ()
    show: Callable[[float], str] = tick


@dataclass(frozen=True)
class Rule:
    """A dashed reference line at this value of an axis, and what it stands for."""

    value: float
    label: str = ""


@dataclass(frozen=True)
class Absent:
    """A measurement that ended without a number: its word stands at its x, above the axis, with the model's marker."""

    x: float
    slot: int
    word: str
    note: str


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


@dataclass(frozen=True)
class Cell:
    """One field of a heat map. share: 0 … 1, its shade; None where nothing was measured. note: said on hovering."""

    share: float | None
    text: str
    note: str


@dataclass(frozen=True)
class Bar:
    """One model's bar of parts that sum to the whole. parts: (style class, words, count)."""

    name: str
    slot: int
    parts: Sequence[tuple[str, str, float]]


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """One element; attribute `class_` is written `class`, underscores become hyphens. What is not Markup is escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    if not children:
        return Markup("<{}{}/>").format(Markup(name), pairs)
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
    """1, 2, 5 × 10ⁿ that cover [low, high] > 0; more within half a decade, powers of ten alone beyond three."""
    multiples = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 5 else (1, 2, 5) if high / low < 1000 else (1,)
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
    height: int = 270,
    levels: Sequence[Rule] = (),
    uprights: Sequence[Rule] = (),
    absent: Sequence[Absent] = (),
) -> Markup:
    """Lines with optional markers and 95 % whiskers. levels, uprights: reference lines at values of y and of x.

    height: of a chart whose legend has one line; it grows with the legend and the labels of the uprights.
    """
    series = [_drawable(s, x.log, y.log) for s in series]
    series = [s for s in series if s.points]
    width, rows = WIDTH, _legend_lines(series, WIDTH)
    right, top, bottom = 26, 30 + 18 * rows + 15 * sum(bool(r.label) for r in uprights), 44
    height += max(0, top - 48)
    xs = [*(p.x for s in series for p in s.points), *(a.x for a in absent), *(r.value for r in uprights)]
    ys = [v for s in series for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    raised = 16 * max((sum(b.x == a.x for b in absent) for a in absent), default=0)
    up = _Scale(y, [*ys, *(r.value for r in levels)], height - bottom - raised, top)
    left = max(LEFT, 27 + 6.5 * max(len(label) for _, label in up.ticks))  # the axis's name stands before its numbers
    across = _Scale(x, xs, left, width - right)

    parts = [_heading(title), _legend(series, width)]
    for value, label in up.ticks:
        parts.append(tag("line", class_="grid", x1=left, x2=width - right, y1=up(value), y2=up(value)))
        parts.append(tag("text", label, class_="tick", x=left - 7, y=up(value) + 3.5, text_anchor="end"))
    for value, label in _apart(across):
        parts.append(tag("text", label, class_="tick", x=across(value), y=height - bottom + 17, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom))
    parts.append(tag("text", x.label, class_="label", x=(left + width - right) / 2, y=height - 8, text_anchor="middle"))
    middle = (top + height - bottom) / 2
    turn = f"rotate(-90 13 {_plain(middle)})"
    parts.append(tag("text", y.label, class_="label", x=13, y=middle, text_anchor="middle", transform=turn))
    for r in levels:
        parts.append(tag("line", class_="rule", x1=left, x2=width - right, y1=up(r.value), y2=up(r.value)))
        if r.label:
            parts.append(tag("text", r.label, class_="tick", x=width - right, y=up(r.value) - 4, text_anchor="end"))
    for i, r in enumerate(sorted(uprights, key=lambda r: r.value)):
        parts.append(_upright(r.label, across(r.value), 30 + 18 * rows + 15 * i, height - bottom, left, width - right))
    noted = sum(len(_shown(s)) for s in series) <= NOTED
    for s in series:
        parts.append(_drawn(s, x, y, across, up, noted))
    for i, a in enumerate(absent):
        at, below = across(a.x), sum(b.x == a.x for b in absent[:i])
        line = height - bottom - 9 - 16 * below
        word = tag("text", a.word, class_="word", x=at - 4, y=line + 4, text_anchor="end")
        parts.append(tag("g", tag("title", a.note), marker(a.slot, at + 4, line), word, class_=f"s{a.slot}"))
    return _frame(title, f"{y.label}, against {x.label}.", width, height, parts)


def forest(title: str, rows: Sequence[ForestRow], axis: Axis, *, zero: str, delta: float | None = None) -> Markup:
    """Paired differences with intervals, below each benchmark's name a row a variant; a line at 0, a dashed one at the
    margin.

    zero: what the line at 0 stands for.
    """
    top, bottom, step = 46, 44, 22
    left = round(30 + 6.6 * max(len(r.name) for r in rows))
    right = round(16 + 7.2 * max(len(r.note) for r in rows))  # the widest of them are signs and digits
    width = max(WIDTH, left + LEAST_PLOT + right)
    height = top + bottom + step * (len(rows) + sum(r.first for r in rows))
    bounds = [v for r in rows for v in (r.low, r.high)] + [0.0] + ([] if delta is None else [delta])
    across = _Scale(axis, bounds, left, width - right)
    floor_y = height - bottom
    parts = [_heading(title)]
    for value, label in _apart(across):
        parts.append(tag("line", class_="grid", x1=across(value), x2=across(value), y1=top, y2=floor_y))
        parts.append(tag("text", label, class_="tick", x=across(value), y=floor_y + 17, text_anchor="middle"))
    parts.append(tag("line", class_="zero", x1=across(0), x2=across(0), y1=top - 4, y2=floor_y))
    margin = None if delta is None else across(delta)
    # the two names stand on either side of their lines, away from each other
    side = "middle" if margin is None else "start" if margin <= across(0) else "end"
    parts.append(tag("text", zero, class_="tick", x=across(0), y=top - 8, text_anchor=side))
    if margin is not None:
        parts.append(tag("line", class_="rule", x1=margin, x2=margin, y1=top - 4, y2=floor_y))
        other = "end" if side == "start" else "start"
        sign = "−δ" if margin <= across(0) else "δ"
        parts.append(tag("text", sign, class_="tick", x=margin, y=top - 8, text_anchor=other))
    y = float(top - step / 2)
    for row in rows:
        if row.first:
            y += step
            parts.append(tag("text", row.label, class_="label strong over", x=8, y=y + 6))
        y += step
        name = tag("text", row.name, class_="label ink", x=left - 12, y=y + 4, text_anchor="end")
        whisker = tag("line", class_="bar", x1=across(row.low), x2=across(row.high), y1=y, y2=y)
        parts.append(tag("g", name, whisker, marker(row.slot, across(row.value), y), class_=f"s{row.slot}"))
        parts.append(tag("text", row.note, class_="tick", x=width - right + 12, y=y + 4))
    middle = (left + width - right) / 2
    parts.append(tag("text", axis.label, class_="label", x=middle, y=height - 8, text_anchor="middle"))
    return _frame(title, f"{axis.label}. One row a benchmark and student.", width, height, parts)


def dots(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[int, Point]]]], names: Mapping[int, str], axis: Axis
) -> Markup:
    """One row a category, one marker a model at its value (the points' x). names: slot → model, for the legend."""
    legend = [Series(name, number, (Point(0, 0),)) for number, name in names.items()]
    left, right, step = round(20 + 6.6 * max(len(label) for label, _ in rows)), 26, 24
    top = 34 + 18 * _legend_lines(legend, WIDTH)
    height = top + step * len(rows) + 44
    across = _Scale(axis, [p.x for _, points in rows for _, p in points], left, WIDTH - right)
    parts = [_heading(title), _legend(legend, WIDTH)]
    for value, label in across.ticks:
        parts.append(tag("line", class_="grid", x1=across(value), x2=across(value), y1=top, y2=height - 44))
        parts.append(tag("text", label, class_="tick", x=across(value), y=height - 27, text_anchor="middle"))
    for i, (label, points) in enumerate(rows):
        y = top + step * (i + 0.5)
        parts.append(tag("text", label, class_="label", x=left - 10, y=y + 4, text_anchor="end"))
        for number, p in points:
            parts.append(tag("g", _marked(number, across(p.x), y, p.note, Markup("")), class_=f"s{number}"))
    middle = (left + WIDTH - right) / 2
    parts.append(tag("text", axis.label, class_="label", x=middle, y=height - 8, text_anchor="middle"))
    return _frame(title, f"{axis.label}, one row a category, one marker a model.", WIDTH, height, parts)


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    x: str,
    y: str,
    *,
    rules: Sequence[tuple[int, str]] = (),
) -> Markup:
    """Fields shaded by a share from 0 to 1, with their text in them. rules: (columns left of it, label) lines."""
    wide, tall, left = 56, 28, 56
    top = 34 + 15 * len(rules)
    width = max(WIDTH, left + wide * len(columns) + 20)
    foot = top + tall * len(rows)
    parts = [_heading(title)]
    for i, (label, cells) in enumerate(rows):
        middle = top + tall * (i + 0.5) + 4
        parts.append(tag("text", label, class_="tick", x=left - 7, y=middle, text_anchor="end"))
        for j, cell in enumerate(cells):
            look = "h-none" if cell.share is None else f"h{min(SHADES - 1, int(SHADES * cell.share))}"
            field = tag("rect", x=left + wide * j, y=top + tall * i, width=wide, height=tall)
            words = tag("text", cell.text, x=left + wide * (j + 0.5), y=middle)
            note = [tag("title", cell.note)] if cell.note else []
            parts.append(tag("g", *note, field, words, class_=f"field {look}"))
    for j, label in enumerate(columns):
        parts.append(tag("text", label, class_="tick", x=left + wide * (j + 0.5), y=foot + 16, text_anchor="middle"))
    end = left + wide * len(columns)
    for i, (before, label) in enumerate(sorted(rules)):
        parts.append(_upright(label, left + wide * before, 30 + 15 * i, foot, left, max(end, width - 20), "solid"))
    parts.append(tag("text", x, class_="label", x=(left + end) / 2, y=foot + 34, text_anchor="middle"))
    middle = (top + foot) / 2
    parts.append(
        tag(
            "text",
            y,
            class_="label",
            x=13,
            y=middle,
            text_anchor="middle",
            transform=f"rotate(-90 13 {_plain(middle)})",
        )
    )
    return _frame(title, f"{y} down, {x} across; brighter fields are higher shares.", width, foot + 44, parts)


def shade_scale() -> Markup:
    """The shades of heat maps from 0 to 100 %."""
    parts = [tag("text", "0 %", class_="tick", x=26, y=13, text_anchor="end")]
    for i in range(SHADES):
        field = tag("rect", x=32 + 18 * i, y=1, width=18, height=16)
        parts.append(tag("g", tag("title", f"{10 * i} to {10 * (i + 1)} %"), field, class_=f"field h{i}"))
    parts.append(tag("text", "100 % found", class_="tick", x=38 + 18 * SHADES, y=13))
    return _frame("Shades of the heat maps", "Dark is none found, bright is all found.", 300, 18, parts, "chart shades")


def stacked_bars(title: str, bars: Sequence[Bar], what: str) -> Markup:
    """Bars of full length, cut in proportion to the counts; each part is named within itself where it has room.

    what: the things counted.
    """
    left, step, end = round(30 + 6.6 * max(len(b.name) for b in bars)), 34, WIDTH - 8
    height = 30 + step * len(bars) + 4
    parts = [_heading(title)]
    for i, bar in enumerate(bars):
        y, at, total = 30 + step * i, float(left), sum(count for _, _, count in bar.parts)
        parts.append(tag("g", marker(bar.slot, 8.0, y + 13.0), class_=f"s{bar.slot}"))
        parts.append(tag("text", bar.name, class_="label", x=18, y=y + 17))
        for look, words, count in bar.parts:
            size = (end - left) * count / total if total else 0.0
            share = f"{words} {count:g}"
            field = tag("rect", x=at, y=y, width=size, height=26)
            fits = 6.8 * len(share) + 6 < size
            text = tag("text", share, x=at + size / 2, y=y + 17) if fits else Markup("")
            note = f"{bar.name}: {words} {count:g} of {total:g} {what}"
            parts.append(tag("g", tag("title", note), field, text, class_=f"part {look}"))
            at += size
    return _frame(title, f"One bar a student; its parts are shares of the {what}.", WIDTH, height, parts)


def layer_strip(title: str, layers: int, attention: Sequence[int], mixer: str, index: int) -> Markup:
    """One cell a layer: filled where a mixer (its name) stands, outlined where attention stayed."""
    cell, gap = 11, 3
    kept = set(attention)
    cells = []
    for layer in range(layers):
        kind = "attention" if layer in kept else mixer
        look = "cell" if layer in kept else f"cell filled s{index}"
        note = tag("title", f"layer {layer}: {kind}")
        cells.append(
            tag("g", note, tag("rect", class_=look, x=1 + layer * (cell + gap), y=1, width=cell, height=18, rx=2))
        )
    return _frame(title, f"Filled: {mixer}; outlined: attention.", layers * (cell + gap), 20, cells, "strip")


def marker(number: int, x: float, y: float, *children: str, hollow: bool = False) -> Markup:
    """The shape of a slot, in the colour of the element around it; drawn once a page, by `key_shapes`."""
    look = {"class_": "hollow"} if hollow else {}
    return tag("use", *children, href=f"#key{number}", x=x, y=y, **look)


def key(number: int) -> Markup:
    """The marker alone, for tables and headings; decorative, the name stands beside it."""
    return tag("svg", marker(number, 6, 6), class_=f"key s{number}", aria_hidden="true")


def key_shapes() -> Markup:
    """What every `marker` of a page refers to, about the origin: plus for the teacher, circle, square, triangle, …"""
    shapes = [
        tag(
            "polygon",
            id=f"key{number}",
            points=" ".join(f"{_plain(RADIUS * x)},{_plain(RADIUS * y)}" for x, y in corners),
        )
        for number, corners in _SHAPES.items()
    ]
    return tag("svg", tag("defs", tag("circle", id="key1", r=RADIUS), *shapes), class_="shapes", aria_hidden="true")


def _star(points: int, inner: float) -> tuple[tuple[float, float], ...]:
    """Corners of a star that points upwards; inner: radius of its notches as a share of that of its points."""
    turns = [(1.3 if i % 2 == 0 else 1.3 * inner, pi * i / points) for i in range(2 * points)]
    return tuple((r * sin(turn), -r * cos(turn)) for r, turn in turns)


_PLUS = (
    (-4, -13),
    (4, -13),
    (4, -4),
    (13, -4),
    (13, 4),
    (4, 4),
    (4, 13),
    (-4, 13),
    (-4, 4),
    (-13, 4),
    (-13, -4),
    (-4, -4),
)
_SHAPES: Mapping[int, Sequence[tuple[float, float]]] = {
    0: tuple((x / 10, y / 10) for x, y in _PLUS),
    2: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    3: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
    4: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    5: ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
    6: ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    7: _star(5, 0.45),
    8: ((-1.1, -1.1), (1.1, 1.1), (1.1, -1.1), (-1.1, 1.1)),
    9: ((-1.2, 0), (0.9, -1.1), (0.9, 1.1)),
    10: ((1.2, 0), (-0.9, -1.1), (-0.9, 1.1)),
    11: ((-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1), (1.1, 1.1)),
    12: ((-0.5, -1.3), (0.5, -1.3), (0.5, 1.3), (-0.5, 1.3)),
}


def _plain(value: object) -> str:
    """Coordinates to a tenth of a unit; all else as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _frame(title: str, desc: str, width: int, height: int, parts: Sequence[str], look: str = "chart") -> Markup:
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    look += " broad" if look == "chart" and width > 1.2 * WIDTH else ""
    return tag("svg", tag("title", title), tag("desc", desc), *parts, class_=look, role="img", **size)


def _heading(title: str) -> Markup:
    return tag("text", title, class_="label strong", x=4, y=12)


def _upright(label: str, x: float, top: float, bottom: float, left: float, right: float, look: str = "rule") -> Markup:
    """A vertical line with its label beside its upper end, on the side that has the room."""
    line = tag("line", class_=look, x1=x, x2=x, y1=top + (4 if label else 0), y2=bottom)
    if not label:
        return line
    fits = x + 6 + 6.2 * len(label) <= right or x - left < right - x
    side, at = ("start", x + 5) if fits else ("end", x - 5)
    return line + tag("text", label, class_="tick", x=at, y=top + 11, text_anchor=side)


def _apart(scale: _Scale) -> list[tuple[float, str]]:
    """The ticks of an axis whose labels do not touch the one before."""
    kept: list[tuple[float, str]] = []
    end = float("-inf")
    for value, label in scale.ticks:
        half = 3.2 * len(label)
        if scale(value) - half > end + 4:
            kept.append((value, label))
            end = scale(value) + half
    return kept


def _drawable(s: Series, log_x: bool, log_y: bool) -> Series:
    """Without the points that a logarithmic axis cannot show."""
    points = [p for p in s.points if (not log_x or p.x > 0) and (not log_y or p.y > 0)]
    return replace(s, points=points)


def _shown(s: Series) -> Sequence[Point]:
    """The points of a line that have a marker."""
    many = s.joined and len(s.points) > MARKERS
    stride = len(s.points) // (MARKERS // 2) if many else 1
    return s.points[s.slot % stride :: stride] if s.markers else ()


def _drawn(s: Series, x: Axis, y: Axis, across: _Scale, up: _Scale, noted: bool) -> Markup:
    parts = []
    if s.joined:
        placed = " ".join(f"{_plain(across(p.x))},{_plain(up(p.y))}" for p in s.points)
        parts.append(tag("polyline", class_="line dashed" if s.dashed else "line", points=placed))
    for p in _shown(s):
        note = (p.note or f"{s.name}: {y.show(p.y)} at {x.show(p.x)}") if noted else ""
        parts.append(_marked(s.slot, across(p.x), up(p.y), note, _whisker(p, across, up), s.hollow))
    return tag("g", *parts, class_=f"s{s.slot}")


def _marked(number: int, x: float, y: float, note: str, whisker: Markup, hollow: bool = False) -> Markup:
    """A marker with what is said on hovering over it or its whisker."""
    title = [tag("title", note)] if note else []
    if not whisker:
        return marker(number, x, y, *title, hollow=hollow)
    return tag("g", *title, whisker, marker(number, x, y, hollow=hollow))


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
        parts.append(tag("g", marker(s.slot, x + 6, y, hollow=s.hollow), class_=f"s{s.slot}"))
        parts.append(tag("text", s.name, class_="label", x=x + 16, y=y + 4))
    return Markup("").join(parts)
