"""One row of the bench, its targets, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.bench.timed import Spread
from steps.bench.clock import StepProfile
from steps.utilisation import utilisation

OURS, NAIVE = "ours", "naive"


@dataclass
class Row:
    """What is reported of one stage in one form; `note` says why there is no time, or what to know about it.

    rows × length: the batch of a step; of self-chat, sequences decoded at once and their length at the end.
    ms: of an optimiser step; of self-chat, of one token for every sequence. tokens_per_second counts every position
    that is computed, whether its loss counts or not, padding included. flops_per_token, utilisation: as
    `steps.utilisation` defines them. peak_memory_bytes: allocated at once, the first step included;
    of a CUDA graph's memory that counts only while it is captured, when the optimiser has no state yet, so
    held_memory_bytes says what the allocator kept of the device. first_step_s: with compilation. loss: of the first
    step. ratio: of a naive row, our tokens per second over its own.
    """

    stage: str
    shape: str
    form: str
    rows: int = 0
    length: int = 0
    note: str = ""
    ms: float | None = None
    iqr_ms: float | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    flops_per_token: int | None = None
    utilisation: float | None = None
    peak_memory_bytes: int | None = None
    held_memory_bytes: int | None = None
    first_step_s: float | None = None
    loss: float | None = None
    ratio: float | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)
    profile: StepProfile | None = None

    def time(self, spread: Spread, tokens_per_second: float, peak_flops: float | None) -> None:
        self.ms, self.iqr_ms, self.steps = spread.median, spread.iqr, spread.repeats
        self.tokens_per_second = tokens_per_second
        self.utilisation = utilisation(self.flops_per_token, tokens_per_second, peak_flops, processes=1)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**vars(self), "profile": self.profile and self.profile.to_dict()}


@dataclass(frozen=True)
class Target:
    """A bound on one number of our form of a stage."""

    stage: str
    shape: str
    quantity: str
    bound: float
    text: str
    at_least: bool = True

    def verdict(self, row: Row) -> dict[str, Any]:
        """met: None if the row has no such number. missed_by: the share of the bound that is lacking or too much."""
        value = getattr(row, self.quantity)
        if value is None:
            return {"target": self.text, "met": None}
        excess = value / self.bound - 1.0 if self.at_least else 1.0 - value / self.bound
        return {"target": self.text, "met": excess >= 0.0, "missed_by": max(0.0, -excess)}


TARGETS = (
    Target("kl", "smollm2", "tokens_per_second", 260e3, "≥ 260 k tokens/s"),
    Target("kl", "smollm2", "held_memory_bytes", 12e9, "≤ 12 GB", at_least=False),
    Target("kl", "1b", "utilisation", 0.40, "≥ 40 % of the bf16 peak"),
    Target("align", "smollm2", "tokens_per_second", 700e3, "≥ 700 k tokens/s"),
    Target("self-chat", "smollm2", "tokens_per_second", 400e3, "≥ 400 k tokens/s"),
)


def judge(row: Row) -> None:
    """Give our form of a stage the verdicts of its targets."""
    if row.form == OURS:
        row.targets = [t.verdict(row) for t in TARGETS if (t.stage, t.shape) == (row.stage, row.shape)]


_COLUMNS = (
    ("stage", -9),
    ("shape", -10),
    ("form", -5),
    ("batch", 9),
    ("ms/step", 9),
    ("iqr", 7),
    ("tokens/s", 9),
    ("of peak", 7),
    ("peak GB", 7),
    ("held GB", 7),
    ("first step s", 12),
    ("loss", 9),
)
_NONE = "–"


def head() -> str:
    """Names of the columns, underlined."""
    titles = _line([name for name, _ in _COLUMNS])
    return f"{titles}\n{'─' * len(titles)}"


def line(row: Row) -> str:
    """The row's numbers, or why there are none; below it how we compare, and the targets."""
    first = [row.stage, row.shape, row.form, f"{row.rows}×{row.length}" if row.rows else _NONE]
    if row.ms is None:
        found = [f"{_line(first)} {row.note}"]
    else:
        numbers = [
            f"{row.ms:.2f}",
            f"{row.iqr_ms:.2f}",
            f"{row.tokens_per_second:.0f}",
            _NONE if row.utilisation is None else f"{row.utilisation:.1%}",
            _gigabytes(row.peak_memory_bytes),
            _gigabytes(row.held_memory_bytes),
            _NONE if row.first_step_s is None else f"{row.first_step_s:.1f}",
            _NONE if row.loss is None else f"{row.loss:.5g}",
        ]
        found = [_line([*first, *numbers])]
        found += [f"    {row.note}"] if row.note else []
    if row.ratio is not None:
        found.append(f"    ours is {row.ratio:.2f}× as fast")
    found += [f"    target {entry['target']}: {_verdict(entry)}" for entry in row.targets]
    return "\n".join(found)


def _gigabytes(count: int | None) -> str:
    return _NONE if count is None else f"{count / 1e9:.2f}"


def _verdict(entry: dict[str, Any]) -> str:
    if entry["met"] is None:
        return "not measured"
    return "met" if entry["met"] else f"MISSED by {entry['missed_by']:.0%}"


def _line(cells: Sequence[str]) -> str:
    padded = zip(cells, _COLUMNS, strict=False)
    return " ".join(f"{c:<{-width}}" if width < 0 else f"{c:>{width}}" for c, (_, width) in padded)
