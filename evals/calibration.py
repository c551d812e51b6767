"""Whether a model's confidence in its choices is the share of them that is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

BINS = 15


def of_task(rows: pd.DataFrame, benchmark: str) -> dict[str, Any] | None:
    """`calibration` of a benchmark's metrics `confidence` and `acc`, joined by item; None where it has no confidence.

    rows: the evaluation schema, of one model. Raises ValueError where an item has one metric and not the other.
    """
    task = rows[rows.benchmark == benchmark]
    confidence, correct = (task[task.metric == m].set_index("item").score for m in ("confidence", "acc"))
    if confidence.empty:
        return None
    apart = confidence.index.symmetric_difference(correct.index)
    if len(apart):
        raise ValueError(f"{benchmark}: item {apart[0]!r} lacks acc or confidence, as do {len(apart) - 1} others")
    return calibration(confidence.to_numpy(), correct.loc[confidence.index].to_numpy())


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error and Brier score of the choices taken, and the bins of a reliability diagram.

    confidence: (n,) probability that the model gave to its choice. correct: (n,), 1 where that choice is right.
    ece: Σ (n_bin / n)·|mean accuracy − mean confidence| over bins of equal mass (Nguyen and O'Connor, 1508.05154);
    equal confidences share a bin, so there may be fewer. With few items a bin it is biased upwards, which teacher and
    student on the same items share. brier: mean (confidence − correct)², 0 best; 0.25 is what "one half" always gets.
    Raises ValueError for confidences outside 0 to 1, answers that are not 0 or 1, and no items.
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("calibration needs at least one item, confidences from 0 to 1 and answers that are 0 or 1")
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    cuts = confidence[len(confidence) * np.arange(1, bins) // bins]
    edges = np.unique(np.append(np.searchsorted(confidence, cuts), (0, len(confidence))))
    found = [
        {
            "low": float(confidence[a]),
            "high": float(confidence[b - 1]),
            "confidence": float(confidence[a:b].mean()),
            "accuracy": float(correct[a:b].mean()),
            "n": int(b - a),
        }
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    return {
        "ece": sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in found) / len(confidence),
        "brier": float(np.mean((confidence - correct) ** 2)),
        "bins": found,
    }
