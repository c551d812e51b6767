"""Paired comparison of a student with its teacher, or of any two models, on the same items.

Every figure here rests on per-item differences, student − teacher: the variance that both models share (some items are
hard for both) cancels, which an unpaired test throws away. Items of one document or subject are resampled together.
Background: Miller 2024, "Adding Error Bars to Evals" (2411.00640); flips: "Accuracy is Not All You Need" (2407.09141).

Loads no model, and nothing that could. Which benchmark is compared by which metric is `evals.comparison`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

DRAWS = 10_000
FEWEST_CLUSTERS = 5
"""With fewer there is no verdict: intervals of 4 that should miss 0 once in 20 times did so once in 8 (simulated)."""
_CELLS = 4_000_000
"""Largest (draws × groups) block held at once, in array elements."""


class NotComparable(ValueError):
    """Two sets of rows that must not be compared; the message says on which benchmark, on how many items, what differs
    and an example."""


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share. Keeps a width at 0 and at n, where the normal interval has none."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson: given {successes} of {n}; allowed is 0 ≤ successes ≤ n with n ≥ 1")
    z = norm.ppf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def mcnemar_exact(up: int, down: int) -> float:
    """Two-sided exact McNemar p-value: are wrong→right (`up`) and right→wrong (`down`) equally likely?"""
    return 1.0 if up + down == 0 else float(binomtest(up, up + down).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment over one family; result in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def minimum_detectable_difference(standard_error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that a two-sided test at `alpha` finds with `power`: 2.80 standard errors."""
    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * standard_error)


def cluster_sums(
    differences: np.ndarray, weights: np.ndarray | None = None, clusters: Sequence[Any] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Σ w·d and Σ w of every cluster, each (C,). differences, weights: (n,); without clusters every item is its own."""
    weights = np.ones(len(differences)) if weights is None else np.asarray(weights, dtype=float)
    if clusters is None:
        return weights * differences, weights
    codes, names = pd.factorize(np.asarray(clusters))
    size = len(names)
    return np.bincount(codes, weights * differences, size), np.bincount(codes, weights, size)


def bootstrap_means(sums: np.ndarray, weights: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weighted mean difference of `draws` resamples of the clusters, sorted, (draws,).

    Clusters with equal (sum, weight) are interchangeable, so their counts are drawn at once from a multinomial: 14 000
    binary items cost as much as three.
    """
    groups, counts = np.unique(np.stack([sums, weights], axis=1), axis=0, return_counts=True)  # (G, 2), (G,)
    rng = np.random.default_rng(seed)
    total = int(counts.sum())
    block = max(1, _CELLS // len(groups))
    means = []
    for start in range(0, draws, block):
        drawn = rng.multinomial(total, counts / total, size=min(block, draws - start)) @ groups  # (block, 2)
        means.append(drawn[:, 0] / drawn[:, 1])
    return np.sort(np.concatenate(means))


def tail(alpha: float, clusters: int) -> float:
    """The quantile of `bootstrap_means` at which a one-sided 1 − alpha interval ends: below alpha, the more so the
    fewer clusters there are, of which a plain percentile interval takes too little notice.

    The expanded percentile interval of Hesterberg 2014, "What Teachers Should Know about the Bootstrap" (1411.5279):
    as wide as Student's t would have it.
    """
    return float(norm.cdf(-sqrt(clusters / (clusters - 1)) * student_t.ppf(1 - alpha, clusters - 1)))


def sign_flip_p(sums: np.ndarray, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided Monte Carlo sign-flip test that the cluster sums are symmetric around 0.

    Used where McNemar does not hold: scores that are not 0 or 1, or items that share a cluster. At least 1/(draws + 1).
    """
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)  # (G,), (G,)
    if not len(sizes):
        return 1.0
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // len(sizes))
    extreme = 0
    for start in range(0, draws, block):
        positive = rng.binomial(counts, 0.5, size=(min(block, draws - start), len(sizes)))
        extreme += int((np.abs((2 * positive - counts) @ sizes) >= observed).sum())
    return (extreme + 1) / (draws + 1)


def verdict(gain_low: float, bound: float, gain_high: float, delta: float) -> str:
    """Non-inferiority within δ, all arguments on a scale where more is better.

    bound: lower end of the one-sided 95 % interval of the gain; gain_low, gain_high: its two-sided 95 % interval.
    "worse" needs the whole two-sided interval below 0 *and* non-inferiority not shown.
    """
    if bound > -delta:
        return f"non-inferior within {delta:g}"
    return "worse" if gain_low <= gain_high < 0 else "inconclusive"


def compare(
    teacher_rows: pd.DataFrame,
    student_rows: pd.DataFrame,
    benchmark: str,
    metric: str,
    delta: float,
    *,
    higher_is_better: bool = True,
    sides: tuple[str, str] = ("the teacher", "the student"),
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """One line of comparison.json: student − teacher on one benchmark and metric, joined item by item.

    sides: what a refusal calls the two, where they are other models.

    Rows are in the evaluation schema; means are weighted by `n` (tokens of an item, or 1). The interval is that of a
    percentile bootstrap over clusters, expanded by `tail`, for 0/1 scores with one imagined flip each way added. p:
    exact McNemar for 0/1 scores where every item is its own cluster, else a sign-flip test over clusters; `test` names
    which. p_holm is None: `holm` needs the whole family. flips are None unless scores are 0/1. `bound` is the end of
    the one-sided 95 % interval towards harm, in the metric's units. The verdict is "inconclusive" for fewer clusters
    than FEWEST_CLUSTERS.

    Raises NotComparable where the two sides do not have the same items, prompts, token counts or clusters.
    """
    pairs = _join(teacher_rows, student_rows, benchmark, metric, sides)
    teacher = pairs["score_teacher"].to_numpy(float)
    student = pairs["score_student"].to_numpy(float)
    weights = pairs["n_teacher"].to_numpy(float)
    differences = student - teacher
    sums, sizes = cluster_sums(differences, weights, pairs["cluster_teacher"].to_numpy())
    if len(sums) < 2:
        raise NotComparable(
            f"{benchmark}/{metric}: all {len(pairs)} items are of one cluster, {pairs['cluster_teacher'].iloc[0]!r}; "
            "an interval needs at least 2"
        )

    difference = float(sums.sum() / sizes.sum())
    binary = bool(np.isin(teacher, (0, 1)).all() and np.isin(student, (0, 1)).all())
    # A resample holds no flip that was not seen, so few flips would pass for certainty and none for an interval without
    # width. Two imagined items, one flipped each way, mend it, as in the adjusted interval of Bonett and Price (2012).
    imagined = (np.array([1.0, -1.0]), np.ones(2)) if binary else (np.empty(0), np.empty(0))
    means = bootstrap_means(np.append(sums, imagined[0]), np.append(sizes, imagined[1]), draws, seed)
    two, one = tail(0.025, len(sums)), tail(0.05, len(sums))
    low, high, one_low, one_high = np.quantile(means, [two, 1 - two, one, 1 - one]).tolist()
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    if not higher_is_better:
        up, down = down, up
    alone = binary and len(sums) == len(pairs)
    sign = 1 if higher_is_better else -1
    gain_low, gain_high = sorted((sign * low, sign * high))
    bound = one_low if higher_is_better else one_high
    return {
        "benchmark": benchmark,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "n": len(pairs),
        "clusters": len(sums),
        "teacher": float(weights @ teacher / weights.sum()),
        "student": float(weights @ student / weights.sum()),
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "bound": bound,
        "p": mcnemar_exact(up, down) if alone else sign_flip_p(sums, draws, seed),
        "p_holm": None,
        "test": "exact McNemar" if alone else "sign flip over clusters",
        "flips_up": up if binary else None,
        "flips_down": down if binary else None,
        "mde": minimum_detectable_difference(float(means.std())),
        "delta": delta,
        "verdict": "inconclusive" if len(sums) < FEWEST_CLUSTERS else verdict(gain_low, sign * bound, gain_high, delta),
    }


def _join(
    teacher_rows: pd.DataFrame, student_rows: pd.DataFrame, benchmark: str, metric: str, sides: tuple[str, str]
) -> pd.DataFrame:
    """One row per item, columns suffixed _teacher and _student, ordered by item; refuses whatever does not match."""
    where = f"{benchmark}/{metric}"
    teacher = _chosen(teacher_rows, benchmark, metric, sides[0])
    student = _chosen(student_rows, benchmark, metric, sides[1])
    apart = teacher.index.symmetric_difference(student.index)
    if len(apart):
        raise NotComparable(
            f"{where}: item sets differ ({sides[0]} {len(teacher)}, {sides[1]} {len(student)}, "
            f"not in both {len(apart)}, first {apart[0]!r}); evaluate both on the same items"
        )
    for column, meaning in (
        ("item_hash", "contents"),
        ("prompt_hash", "prompts, which a judge and its settings belong to"),
        ("n", "numbers of tokens"),
        ("cluster", "clusters"),
    ):
        unlike = teacher.index[(teacher[column] != student[column]).to_numpy()]
        if len(unlike):
            raise NotComparable(
                f"{where}: {column} differs on {len(unlike)} of {len(teacher)} items, first {unlike[0]!r}; "
                f"{sides[0]} and {sides[1]} saw different {meaning}"
            )
    empty = teacher.index[(teacher["n"] <= 0).to_numpy()]
    if len(empty):
        raise NotComparable(f"{where}: n must be positive, and is not for {len(empty)} items, first {empty[0]!r}")
    return teacher.join(student, lsuffix="_teacher", rsuffix="_student")


def _chosen(rows: pd.DataFrame, benchmark: str, metric: str, side: str) -> pd.DataFrame:
    """One side's rows by item, in order; refuses what is not there, twice there or no number."""
    where = f"{benchmark}/{metric}"
    chosen = rows[(rows["benchmark"] == benchmark) & (rows["metric"] == metric)]
    if chosen.empty:
        raise NotComparable(f"{where}: {side} has no rows")
    repeated = chosen["item"][chosen["item"].duplicated()]
    if len(repeated):
        raise NotComparable(f"{where}: {side} has item {repeated.iloc[0]!r} more than once")
    missing = chosen["item"][~np.isfinite(chosen["score"].to_numpy(float))]
    if len(missing):
        raise NotComparable(f"{where}: {side} has no score for {len(missing)} items, first {missing.iloc[0]!r}")
    return chosen.set_index("item").sort_index()
