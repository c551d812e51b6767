"""The benchmark's part of the twin: every section that a benchmark stage may leave in summary.json, by named fields.

A section that was off is None, or an empty list; what the stage did not write inside a section is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports.rows import Benchmark

FIDELITY = ("kl_mean", "kl_p50", "kl_p90", "kl_p99", "kl_se", "top1", "ppl", "ppl_ratio", "tokens", "documents")
POSITION = ("from", "to", "kl", "kl_se", "nll", "teacher_nll", "top1", "n", "documents")
NO_SCORES = ("n", "chance", "no_answer", "too_long", "harness", "calibration")
"""Entries of a task that are no score of it."""
BIN = ("low", "high", "confidence", "accuracy", "n")
LAYER = (
    *("layer", "replaced", "mixer_cosine", "mixer_relative_error", "hidden_cosine", "hidden_relative_error"),
    "tokens",
)
SPEED = ("batch", "context", "tokens_per_second", "low", "high", "repeats", "oom")
STATE = ("kv", "ssm", "conv")
JUDGE = {
    "judge": ("kind", "model", "hash"),
    "mt_bench": ("mean", "turn_1", "turn_2", "n", "failed", "by_category", "category_n", "best", "worst", "repeat_sd"),
    "pairwise": (
        *("wins", "ties", "losses", "consistent", "inconsistent", "n", "failed", "length_ratio", "best", "worst"),
        *("win_rate", "ci_low", "ci_high", "repeat_sd"),
    ),
    "alpaca": (
        *("weighted_win", "weighted_win_se", "lc_minimal_local", "se", "n", "failed", "reference", "best", "worst"),
        "verdict",
    ),
    "anchors": ("n", "mean", "stored_mean", "largest_change", "pairs", "ordered", "failed"),
    "answers": ("n", "mean_tokens", "cut", "temperatures"),
}

Interval = Callable[[float, int], tuple[float, float]]
"""(successes, n) → 95 % interval of the share."""


def named(record: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """These fields and no others; what the stage did not write is None."""
    return {name: record.get(name) for name in fields}


def benchmark(found: Benchmark | None, interval: Interval | None) -> dict[str, Any] | None:
    """All sections of one model; None where its benchmark did not run. interval: for scores of tasks."""
    if found is None:
        return None
    s = found.summary
    tasks: Mapping[str, Any] = s.get("tasks") or {}
    return {
        "device": s.get("device"),
        "failed": [named(f, ("benchmark", "error")) for f in s.get("failed") or []],
        "recompute": s.get("recompute"),
        "refused": [],
        "fidelity": {text: _fidelity(f) for text, f in (s.get("fidelity") or {}).items() if f},
        "tasks": [score for task, figures in tasks.items() for score in _scores(task, figures, interval)],
        "calibration": [
            {"task": task, "n": figures.get("n")} | _calibration(figures["calibration"], interval)
            for task, figures in tasks.items()
            if figures.get("calibration")
        ],
        "layers": [named(layer, LAYER) for layer in s.get("layers") or []],
        "length": _length(s.get("length")),
        "needle": _needle(s.get("needle"), interval),
        "efficiency": _efficiency(s.get("efficiency")),
        "judge": _judge(s.get("judge")),
        "rows": None if found.rows is None else len(found.rows),
    }


def against(own: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Speed and memory as multiples of the teacher's, where both were measured at the same setting."""
    ours, theirs = (b and b["efficiency"] for b in (own, teacher))
    if not ours or not theirs:
        return {"decode": [], "prefill": [], "state": []}
    return {
        "decode": _ratios(ours["decode"], theirs["decode"], ("batch", "context"), "tokens_per_second"),
        "prefill": _ratios(ours["prefill"], theirs["prefill"], ("batch", "context"), "tokens_per_second"),
        "state": _ratios(ours["state"], theirs["state"], ("context",), "total"),
    }


def _ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], where: Sequence[str], value: str
) -> list[dict[str, Any]]:
    known = {tuple(t[name] for name in where): t[value] for t in theirs}
    pairs = [(o, known.get(tuple(o[name] for name in where))) for o in ours]
    return [named(o, where) | {"ratio": o[value] / base} for o, base in pairs if base and o[value]]


def _fidelity(figures: Mapping[str, Any]) -> dict[str, Any]:
    return named(figures, FIDELITY) | {"by_position": [named(p, POSITION) for p in figures.get("by_position") or []]}


def _scores(task: str, figures: Mapping[str, Any], interval: Interval | None) -> list[dict[str, Any]]:
    """An entry for every metric. Only a score between 0 and 1 can have an interval."""
    n = figures.get("n")
    shared = named(figures, ("chance", "no_answer", "too_long", "harness"))
    entries = []
    for metric, score in figures.items():
        if metric in NO_SCORES or not isinstance(score, int | float):
            continue
        entry = {"task": task, "metric": metric, "score": score, "n": n} | _ends(interval, score, n)
        entries.append(entry | shared)
    return entries


def _calibration(figures: Mapping[str, Any], interval: Interval | None) -> dict[str, Any]:
    bins = [named(b, BIN) | _ends(interval, b.get("accuracy"), b.get("n")) for b in figures.get("bins") or []]
    return named(figures, ("ece", "brier")) | {"bins": bins} | ({"n": figures["n"]} if figures.get("n") else {})


def _ends(interval: Interval | None, share: float | None, n: int | None) -> dict[str, float | None]:
    """95 % interval of a share of n; none where there is no share or no n."""
    if interval is None or not n or share is None or not 0 <= share <= 1:
        return {"ci_low": None, "ci_high": None}
    low, high = interval(share * n, n)
    return {"ci_low": low, "ci_high": high}


def _length(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not section:
        return None
    return named(section, ("train_length", "max_position_embeddings", "text")) | {
        "curve": [named(c, ("from", "to", "nll", "se", "n", "documents")) for c in section.get("curve") or []],
        "last": [named(c, ("context", "nll", "se", "n")) for c in section.get("last") or []],
    }


def _needle(section: Mapping[str, Any] | None, interval: Interval | None) -> dict[str, Any] | None:
    if not section:
        return None
    fields = (
        *("train_length", "max_position_embeddings", "haystack", "seeds", "lengths", "depths", "threshold"),
        "effective_length",
    )
    cells = [
        named(c, ("length", "depth", "k", "n")) | _ends(interval, c["k"] / c["n"] if c.get("n") else None, c.get("n"))
        for c in section.get("cells") or []
    ]
    return named(section, fields) | {"cells": cells}


def _efficiency(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not section:
        return None
    return named(section, ("dtype", "crossover")) | {
        "decode": [named(d, SPEED) for d in section.get("decode") or []],
        "prefill": [named(d, SPEED) for d in section.get("prefill") or []],
        "state": [
            named(b, ("context", *STATE, "measured")) | {"total": sum(b.get(part) or 0 for part in STATE)}
            for b in section.get("state") or []
        ],
    }


def _judge(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not section:
        return None
    return {part: named(section[part], fields) if section.get(part) else None for part, fields in JUDGE.items()}
