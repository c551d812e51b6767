"""Paired comparison of a student with its teacher, or of any two models, on the same items.

Every figure here rests on per-item differences, student − teacher: the variance that both models share (some items are
hard for both) cancels, which an unpaired test throws away. Items of one document or subject are resampled together.
Background: Miller 2024, "Adding Error Bars to Evals" (2411.00640); flips: "Accuracy is Not All You Need" (2407.09141).

Loads no model, and nothing that could. Which benchmark is compared by which metric is `evals.comparison`'s affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """Weighted mean difference of `draws` resamples of the clusters, sorted, (draws,)."""
    drawn = bootstrap_sums(np.stack([sums, weights], axis=1), draws, np.random.default_rng(seed))
    return np.sort(drawn[:, 0] / drawn[:, 1])


def bootstrap_sums(clusters: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of `draws` resamples of the rows, (draws, K), where clusters (C, K) has a row for each cluster.

    Equal rows are interchangeable, so their counts are drawn at once from a multinomial: 14 000 binary items cost as
    much as three.
    """
    groups, counts = np.unique(clusters, axis=0, return_counts=True)  # (G, K), (G,)
    total = int(counts.sum())
    block = max(1, _CELLS // len(groups))
    return np.concatenate(
        [
            rng.multinomial(total, counts / total, size=min(block, draws - start)) @ groups  # (block, K)
            for start in range(0, draws, block)
        ]
    )


def tail(alpha: float, clusters: int) -> float:
    """The quantile of `bootstrap_means` at which a one-sided 1 − alpha interval ends: below alpha, the more so the
    fewer clusters there are, of which a plain percentile interval takes too little notice.

    The expanded percentile interval of Hesterberg 2014, "What Teachers Should Know about the Bootstrap" (1411.5279):
    as wide as Student's t would have it.
    """
    return _expanded(alpha, clusters / (clusters - 1), clusters - 1)


def _expanded(alpha: float, inflation: float, freedom: float) -> float:
    """inflation: what the variance of a resample falls short of by a factor. freedom: degrees of, of its estimate."""
    return float(norm.cdf(-sqrt(inflation) * student_t.ppf(1 - alpha, freedom)))


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
    pairs = _paired(teacher_rows, student_rows, benchmark, metric, sides)
    differences = pairs.student - pairs.teacher
    sums, sizes = pairs.clusters[:, 1] - pairs.clusters[:, 0], pairs.clusters[:, 2]
    drawn = pairs.with_imagined
    means = bootstrap_means(drawn[:, 1] - drawn[:, 0], drawn[:, 2], draws, seed)
    two, one = tail(0.025, len(sums)), tail(0.05, len(sums))
    low, high, one_low, one_high = np.quantile(means, [two, 1 - two, one, 1 - one]).tolist()
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    if not higher_is_better:
        up, down = down, up
    alone = pairs.binary and len(sums) == len(differences)
    sign = 1 if higher_is_better else -1
    gain_low, gain_high = sorted((sign * low, sign * high))
    bound = one_low if higher_is_better else one_high
    return {
        "benchmark": benchmark,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "n": len(differences),
        "clusters": len(sums),
        "teacher": float(pairs.clusters[:, 0].sum() / sizes.sum()),
        "student": float(pairs.clusters[:, 1].sum() / sizes.sum()),
        "difference": float(sums.sum() / sizes.sum()),
        "ci_low": low,
        "ci_high": high,
        "bound": bound,
        "p": mcnemar_exact(up, down) if alone else sign_flip_p(sums, draws, seed),
        "p_holm": None,
        "test": "exact McNemar" if alone else "sign flip over clusters",
        "flips_up": up if pairs.binary else None,
        "flips_down": down if pairs.binary else None,
        "mde": minimum_detectable_difference(float(means.std())),
        "delta": delta,
        "verdict": "inconclusive" if len(sums) < FEWEST_CLUSTERS else verdict(gain_low, sign * bound, gain_high, delta),
    }


def mean_of_tasks(
    teacher_rows: pd.DataFrame,
    student_rows: pd.DataFrame,
    metrics: Mapping[str, str],
    delta: float,
    *,
    sides: tuple[str, str] = ("the teacher", "the student"),
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Student − teacher in the plain mean of several tasks' scores, in which every task weighs the same.

    metrics: {benchmark: metric}; all in one unit, more is better. The tasks must share no documents.

    A draw resamples the clusters of each task within that task, the items of both models together: what is paired stays
    paired, and no task gains or loses weight. The interval is therefore one for these tasks, not for others that might
    have been asked. It is a percentile interval, with the imagined flips of `compare` in each task, expanded by the
    degrees of freedom that Welch and Satterthwaite give a sum of independent means. retention: the student's mean as a
    share of the teacher's, what both get by guessing included, with its interval from the same draws; None where a
    teacher that is never right was drawn.
    The verdict is "inconclusive" where a task has fewer clusters than FEWEST_CLUSTERS.

    Raises NotComparable as `compare` does, and ValueError without tasks.
    """
    if not metrics:
        raise ValueError("mean_of_tasks: no tasks given; metrics needs at least one benchmark")
    rng = np.random.default_rng(seed)
    tasks = [_paired(teacher_rows, student_rows, name, metric, sides) for name, metric in metrics.items()]
    drawn = np.stack([bootstrap_sums(task.with_imagined, draws, rng) for task in tasks])  # (T, draws, 3)
    scores = drawn[..., :2] / drawn[..., 2:]  # (T, draws, 2)
    teacher, student = scores.mean(0).T  # (draws,) each
    clusters = np.array([len(task.clusters) for task in tasks])
    resampled = (scores[..., 1] - scores[..., 0]).var(1)  # (T,)
    unbiased = resampled * clusters / (clusters - 1)
    inflation, freedom = 1.0, float(clusters.min() - 1)
    if resampled.any():
        inflation = float(unbiased.sum() / resampled.sum())
        freedom = float(unbiased.sum() ** 2 / (unbiased**2 / (clusters - 1)).sum())
    two, one = _expanded(0.025, inflation, freedom), _expanded(0.05, inflation, freedom)
    low, high, bound = np.quantile(student - teacher, [two, 1 - two, one]).tolist()
    sums = np.stack([task.clusters.sum(0) for task in tasks])  # (T, 3)
    means = (sums[:, :2] / sums[:, 2:]).mean(0)
    kept: list[float | None] = [None, None, None]
    if teacher.min() > 0 and means[0] > 0:
        kept = [float(means[1] / means[0]), *np.quantile(student / teacher, [two, 1 - two]).tolist()]
    return {
        "tasks": list(metrics),
        "n": sum(len(task.teacher) for task in tasks),
        "clusters": int(clusters.sum()),
        "teacher": float(means[0]),
        "student": float(means[1]),
        "difference": float(means[1] - means[0]),
        "ci_low": low,
        "ci_high": high,
        "bound": bound,
        "retention": kept[0],
        "retention_low": kept[1],
        "retention_high": kept[2],
        "mde": minimum_detectable_difference(float((student - teacher).std())),
        "delta": delta,
        "verdict": "inconclusive" if clusters.min() < FEWEST_CLUSTERS else verdict(low, bound, high, delta),
    }


@dataclass(frozen=True)
class _Paired:
    """One benchmark's items of both models, in one order.

    teacher, student: scores (n,). clusters: (C, 3), for each Σ w·teacher, Σ w·student and Σ w.
    """

    teacher: np.ndarray
    student: np.ndarray
    clusters: np.ndarray

    @property
    def binary(self) -> bool:
        return bool(np.isin(self.teacher, (0, 1)).all() and np.isin(self.student, (0, 1)).all())

    @property
    def with_imagined(self) -> np.ndarray:
        """What is resampled: `clusters`, for 0/1 scores with two items more, one flipped each way.

        A resample holds no flip that was not seen, so few flips would pass for certainty and none for an interval
        without width. The two mend it, as in the adjusted interval of Bonett and Price (2012).
        """
        return np.concatenate([self.clusters, [[0, 1, 1], [1, 0, 1]]]) if self.binary else self.clusters


def _paired(
    teacher_rows: pd.DataFrame, student_rows: pd.DataFrame, benchmark: str, metric: str, sides: tuple[str, str]
) -> _Paired:
    pairs = _join(teacher_rows, student_rows, benchmark, metric, sides)
    names = pairs["cluster_teacher"].to_numpy()
    weights = pairs["n_teacher"].to_numpy(float)
    teacher, student = (pairs[f"score_{side}"].to_numpy(float) for side in ("teacher", "student"))
    of_teacher, sizes = cluster_sums(teacher, weights, names)
    of_student, _ = cluster_sums(student, weights, names)
    if len(sizes) < 2:
        raise NotComparable(
            f"{benchmark}/{metric}: all {len(pairs)} items are of one cluster, {names[0]!r}; "
            "an interval needs at least 2"
        )
    return _Paired(teacher, student, np.stack([of_teacher, of_student, sizes], axis=1))


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
