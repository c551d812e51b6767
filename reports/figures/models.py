"""Who stands in a chart, and under which marker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from reports.svg import Rule, slot
from reports.text import count
from reports.verdict import Z95

MOST_NAMES = 3
"""Names that the label of a line lists."""


class Model(NamedTuple):
    """name, style slot and the twin's `benchmark` of one measured model."""

    name: str
    slot: int
    benchmark: Mapping[str, Any]


def students(twin: Mapping[str, Any]) -> list[Model]:
    """All students that were benchmarked, in the page's order."""
    return [Model(v["name"], slot(i), v["benchmark"]) for i, v in enumerate(twin["variants"]) if v["benchmark"]]


def models(twin: Mapping[str, Any]) -> list[Model]:
    """The same with the teacher first, where it was benchmarked."""
    teacher = twin["teacher"]["benchmark"]
    return [*([Model("teacher", 0, teacher)] if teacher else []), *students(twin)]


def whisker(value: float, error: float | None) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval from a standard error; none where there is no error."""
    return (value - Z95 * error, value + Z95 * error) if error else (None, None)


def rules(values: Iterable[tuple[str, int | None]], say: Callable[[str, str], str]) -> list[Rule]:
    """One vertical line a value, for all the students (name, value) that share it; say: (who, value) → its label."""
    shared: dict[int, list[str]] = {}
    for name, value in values:
        if value:
            shared.setdefault(value, []).append(name)
    everyone = len(shared) == 1
    return [
        Rule(value, say("students" if everyone and len(names) > 1 else _listed(names), count(value)))
        for value, names in shared.items()
    ]


def _listed(names: Sequence[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= MOST_NAMES
        else f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
    )
