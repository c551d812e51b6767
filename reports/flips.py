"""Items on which a student's score is not the baseline's, worst first, with the two answers word by word.

Flips tell what a mean hides: "Accuracy is Not All You Need" (2407.09141).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.rows import TEACHER, RunData, clean
from reports.text import printable

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 24
"""On a page, over all students and benchmarks."""
CHARACTERS = 600
"""Of each answer on a page."""
ANSWER = "answer_tokens"
"""The metric whose response is what the model said, where another model's judgment stands beside it."""


def flips(
    baseline: pd.DataFrame, rows: pd.DataFrame, comparisons: Sequence[Mapping[str, Any]], model: str
) -> list[dict[str, Any]]:
    """Of all compared benchmarks whose items have answers, worst first in each.

    baseline, rows: two models' tables in the evaluation schema. harm: by how much the score is worse than the
    baseline's, in the metric's unit; negative where it is better.
    """
    found = []
    for c in comparisons:
        asked = _prompts(baseline, c["benchmark"])
        ours, theirs = (_answers(table, c["benchmark"], c["metric"]) for table in (rows, baseline))
        sign = -1 if c.get("higher_is_better") is False else 1
        changed = [
            {
                "benchmark": c["benchmark"],
                "metric": c["metric"],
                "item": item,
                "model": model,
                "prompt": asked.get(item, ""),
                "baseline_score": theirs[item][0],
                "score": score,
                "harm": sign * (theirs[item][0] - score),
                "baseline_answer": theirs[item][1],
                "answer": answer,
            }
            for item, (score, answer) in ours.items()
            if item in theirs and theirs[item][0] != score and (theirs[item][1] or answer)
        ]
        found += sorted(changed, key=lambda flip: (-flip["harm"], flip["item"]))
    return found


def all_flips(data: RunData) -> list[dict[str, Any]]:
    """Those of every student of a run against its teacher."""
    teacher = data.benchmarks.get(TEACHER)
    students = [(name, data.benchmarks[name]) for name in data.variants if name in data.benchmarks]
    return [
        flip
        for name, student in students
        if teacher is not None and teacher.rows is not None and student.rows is not None
        for flip in flips(teacher.rows, student.rows, student.comparisons, name)
    ]


def shown(found: Sequence[Mapping[str, Any]], limit: int = SHOWN) -> list[dict[str, Any]]:
    """The worst of each model and benchmark in turn, answers cut and compared word by word."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for flip in found:
        if flip["harm"] > 0:
            groups.setdefault((flip["model"], flip["benchmark"]), []).append(flip)
    turns = [flip for turn in range(limit) for group in groups.values() for flip in group[turn : turn + 1]]
    return [_with_words(flip) for flip in turns[:limit]]


def write_flips(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON object a line, answers whole."""
    lines = [json.dumps(clean(dict(flip)), ensure_ascii=False) for flip in found]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def word_difference(before: str, after: str) -> list[tuple[str, str]]:
    """(kind, text) in reading order; kind "same", "gone" (in `before` alone) or "new" (in `after` alone)."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    parts = []
    for _, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if old[a:b] == new[c:d]:
            parts.append(("same", "".join(old[a:b])))
            continue
        parts += [("gone", "".join(old[a:b])), ("new", "".join(new[c:d]))]
    return [(kind, text) for kind, text in parts if text]


def _answers(table: pd.DataFrame, benchmark: str, metric: str) -> dict[str, tuple[float, str]]:
    """item → (score, what the model said)."""
    own = table[table["benchmark"] == benchmark]
    said = own[own["metric"] == (ANSWER if ANSWER in set(own["metric"]) else metric)]
    answers = dict(zip(said["item"], said["response"], strict=True))
    scored = own[own["metric"] == metric]
    return {
        item: (float(score), str(answers.get(item) or ""))
        for item, score in zip(scored["item"], scored["score"], strict=True)
    }


def _prompts(table: pd.DataFrame, benchmark: str) -> dict[str, str]:
    """item → beginning of what was asked, where the rows have it."""
    if "prompt" not in table:
        return {}
    own = table[(table["benchmark"] == benchmark) & (table["prompt"].fillna("") != "")]
    return dict(zip(own["item"], own["prompt"], strict=True))


def _with_words(flip: Mapping[str, Any]) -> dict[str, Any]:
    before, after = (printable(flip[side]) for side in ("baseline_answer", "answer"))
    words = word_difference(before[:CHARACTERS], after[:CHARACTERS])
    return {k: v for k, v in flip.items() if k not in ("baseline_answer", "answer")} | {
        "prompt": printable(flip["prompt"]),
        "words": words,
        "cut": max(len(before), len(after)) > CHARACTERS,
    }
