"""What a judge said: student against teacher, and MT-Bench by category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from reports.figures.models import models, students
from reports.svg import Axis, Bar, Point, dots, stacked_bars
from reports.text import count, number


def pairwise(twin: Mapping[str, Any]) -> Markup | None:
    """Wins, ties and losses of each student, both orders judged."""
    bars = []
    for m in students(twin):
        found = (m.benchmark["judge"] or {}).get("pairwise")
        if found and found["n"]:
            parts = [("win", "win", found["wins"]), ("tie", "tie", found["ties"]), ("lose", "lose", found["losses"])]
            bars.append(Bar(m.name, m.slot, [part for part in parts if part[2] is not None]))
    return stacked_bars("Student against teacher: win, tie, lose", bars, "prompts") if bars else None


def categories(twin: Mapping[str, Any]) -> list[str]:
    """MT-Bench's categories that any model was judged in."""
    return list(dict.fromkeys(c for m in models(twin) for c in _categories(m.benchmark["judge"])))


def by_category(twin: Mapping[str, Any]) -> Markup | None:
    """MT-Bench score of every model in every category."""
    scores = [(m, own) for m in models(twin) if (own := _categories(m.benchmark["judge"]))]
    if not scores:
        return None
    rows = [
        (
            category,
            [
                (m.slot, Point(score, 0, note=f"{m.name}, {category}: {number(score)}, n={count(asked.get(category))}"))
                for m, own in scores
                for asked in [m.benchmark["judge"]["mt_bench"]["category_n"] or {}]
                if (score := own.get(category)) is not None
            ],
        )
        for category in categories(twin)
    ]
    axis = Axis("score of the judge, 1 to 10", ticks=[(s, str(s)) for s in range(1, 11)])
    return dots("MT-Bench by category", rows, {m.slot: m.name for m, _ in scores}, axis)


def _categories(judged: Mapping[str, Any] | None) -> Mapping[str, float | None]:
    return ((judged or {}).get("mt_bench") or {}).get("by_category") or {}
