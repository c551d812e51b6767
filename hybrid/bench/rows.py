"""One row of the bench, its targets, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.bench.timed import Spread


@dataclass
class Row:
    """What is reported of one measurement; `note` says why there is no time, or what to know about it.

    ms: per round, which without a draft is one step. ratio: how many times as fast as `compared_with`. target, met: of
    the rows that share one, the best has it. details: numbers that only this kind of row has.
    """

    name: str
    shape: str
    batch: int
    context: int
    dtype: str
    draft: str = ""
    k: int = 0
    note: str = ""
    ms: float | None = None
    iqr_ms: float | None = None
    repeats: int | None = None
    tokens_per_second: float | None = None
    compared_with: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def time(self, spread: Spread, tokens_per_second: float) -> None:
        self.ms, self.iqr_ms, self.repeats = spread.median, spread.iqr, spread.repeats
        self.tokens_per_second = tokens_per_second

    def compare(self, what: str, ratio: float) -> None:
        self.compared_with, self.ratio = what, ratio


@dataclass(frozen=True)
class Target:
    """A bound on one number of the best of all rows of a name and, unless None, a batch."""

    name: str
    batch: int | None
    quantity: str
    bound: float
    text: str


TARGETS = (
    Target("plain", 1, "ratio", 0.85, "≥ 85 % of the floor"),
    Target("speculative", 1, "ratio", 2.0, "≥ 2.0× plain"),
    Target("speculative", 64, "ratio", 1.3, "≥ 1.3× plain"),
    Target("selfchat", None, "tokens_per_second", 400e3, "≥ 400 k tokens/s"),
)


def judge(rows: Sequence[Row]) -> None:
    """Give each target to the best row that it is for; to the first one, not met or missed, if none has the number."""
    for target in TARGETS:
        group = [r for r in rows if r.name == target.name and target.batch in (None, r.batch)]
        timed = [r for r in group if getattr(r, target.quantity) is not None]
        if not group:
            continue
        best = max(timed, key=lambda r: getattr(r, target.quantity)) if timed else group[0]
        best.target = target.text
        best.met = getattr(best, target.quantity) >= target.bound if timed else None


_COLUMNS = (
    ("row", -12),
    ("shape", -11),
    ("batch", 5),
    ("context", 7),
    ("dtype", -8),
    ("draft", -10),
    ("K", 2),
    ("ms/round", 9),
    ("iqr", 7),
    ("tokens/s", 9),
    ("ratio", 6),
)


def head() -> str:
    """Names of the columns, underlined."""
    titles = _line([name for name, _ in _COLUMNS])
    return f"{titles}  compared with\n{'─' * len(titles)}"


def line(row: Row) -> str:
    """The row's numbers, or why there are none; below it what is particular to it."""
    first = [row.name, row.shape, str(row.batch), str(row.context), row.dtype, row.draft or "–", str(row.k)]
    if row.ms is None:
        return f"{_line(first)} {row.note}"
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
    numbers = [f"{row.ms:.3f}", f"{row.iqr_ms:.3f}", f"{row.tokens_per_second:.0f}", ratio]
    found = [f"{_line([*first, *numbers])}  {row.compared_with}".rstrip()]
    found += [f"    {text}" for text in (row.note, *_details(row.details)) if text]
    return "\n".join(found)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line for each target."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return [
        f"{row.name} {row.shape}, batch {row.batch}: {row.target}: {words[row.met]}"
        + (f" (K {row.k}, ratio {row.ratio:.2f})" if row.ratio is not None else "")
        for row in rows
        if row.target
    ]


def _details(details: Mapping[Any, Any], title: str = "") -> list[str]:
    """Single numbers on one line; every group of numbers on a line of its own, behind its name."""
    single = {name: value for name, value in details.items() if not isinstance(value, Mapping)}
    numbers = ", ".join(f"{name} {_short(value)}" for name, value in single.items())
    found = [f"{title}: {numbers}" if title else numbers] if single else []
    for name, value in details.items():
        if isinstance(value, Mapping):
            found += _details(value, f"{title} {name}".strip())
    return found


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    padded = zip(cells, _COLUMNS, strict=False)
    return " ".join(f"{c:<{-width}}" if width < 0 else f"{c:>{width}}" for c, (_, width) in padded)
