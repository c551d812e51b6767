"""Twenty stored answers that every run has judged anew: whether the judge can tell a good answer from a bad one, and
whether it still judges as it did when the teacher was measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from evals.judge.data import Prompt, content_hash, row
from evals.judge.judgments import Judgments, Progress
from evals.judge.mt_bench import graded

FILE = Path(__file__).with_name("anchors.json")
"""[{"id", "question", "good", "bad"}]: one answer that is right and one that is plainly not."""
COUNT = 20


def measure(
    judgments: Judgments, prompt: Prompt, max_tokens: int, teacher_rows: Path | None, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows "score" of the stored answers, and the figures of them.

    ordered: of `pairs`, in how many the good answer has more than the bad one. stored_mean, largest_change: against
    this judge's scores in the benchmark of the folder `teacher_rows`; None without one.
    """
    pairs = json.loads(FILE.read_text(encoding="utf-8"))
    asked = [(pair["id"], kind, pair["question"], pair[kind]) for pair in pairs for kind in ("good", "bad")]
    conversations = [prompt.messages(question=question, answer=answer) for *_, question, answer in asked]
    texts = judgments.texts(conversations, max_tokens, progress)
    scores, _, failed = graded(texts)
    records = []
    for (name, kind, question, answer), score, text in zip(asked, scores, texts[0], strict=True):
        item = content_hash(question, answer)
        prompt_hash = content_hash(item, judgments.judge.hash, prompt.system, prompt.user, max_tokens)
        hashes = {"item_hash": item, "prompt_hash": prompt_hash}
        records.append(row("anchors", f"{name}/{kind}", name, hashes, "score", score, text or ""))
    changes, stored = _drift(records, teacher_rows) if teacher_rows else ([], [])
    return records, {
        "n": len(scores),
        "mean": fmean(scores),
        "judged": len(scores) * len(texts),
        "failed": failed,
        "pairs": len(pairs),
        "ordered": sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)),
        "stored_mean": fmean(stored) if stored else None,
        "largest_change": max(map(abs, changes)) if changes else None,
    }


def _drift(records: list[dict[str, Any]], teacher_rows: Path) -> tuple[list[float], list[float]]:
    """(new − stored, stored) of the anchors that the same judge was asked in the same way."""
    frame = pd.read_parquet(teacher_rows / "rows.parquet")
    rows = frame[(frame.benchmark == "anchors") & (frame.metric == "score")]
    stored = dict(zip(rows.prompt_hash, rows.score.astype(float), strict=True))
    both = [(r["score"], stored[r["prompt_hash"]]) for r in records if r["prompt_hash"] in stored]
    return [new - old for new, old in both], [old for _, old in both]
