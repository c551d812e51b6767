"""Paired statistics against scipy, hand-made numbers and simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from evals.stats import (
    NotComparable,
    bootstrap_means,
    cluster_sums,
    compare,
    holm,
    mcnemar_exact,
    mean_of_tasks,
    minimum_detectable_difference,
    sign_flip_p,
    tail,
    verdict,
    wilson,
)


def rows(scores, model="teacher", clusters=None, n=None, benchmark="hellaswag_100", metric="acc"):
    items = [f"i{k}" for k in range(len(scores))]
    return pd.DataFrame(
        {
            "run": "r",
            "model": model,
            "benchmark": benchmark,
            "item": items,
            "item_hash": [f"h{i}" for i in items],
            "prompt_hash": [f"p{i}" for i in items],
            "cluster": items if clusters is None else clusters,
            "metric": metric,
            "score": np.asarray(scores, dtype=float),
            "n": np.ones(len(scores), dtype=int) if n is None else n,
            "response": "",
        }
    )


@pytest.mark.parametrize(("k", "n"), [(0, 80), (80, 80), (3, 10), (57, 100), (1, 1)])
@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_wilson_equals_scipy(k, n, confidence):
    expected = scipy_stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_keeps_a_width_when_everything_is_right():
    low, high = wilson(80, 80)
    assert low == pytest.approx(0.954, abs=5e-4)
    assert high == pytest.approx(1.0, abs=1e-12)


def test_wilson_names_what_it_was_given():
    with pytest.raises(ValueError, match="given 5 of 4"):
        wilson(5, 4)


def test_mcnemar_by_hand():
    # 2 up, 8 down: P(X ≤ 2 | 10, ½) = 56/1024, doubled.
    assert mcnemar_exact(2, 8) == pytest.approx(112 / 1024)
    assert mcnemar_exact(0, 0) == 1.0


def test_holm_by_hand_and_in_the_given_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_minimum_detectable_difference_of_a_binary_score():
    # 2.8 · √(discordance / n), as printed for n = 80 and 20 % discordance.
    assert minimum_detectable_difference(np.sqrt(0.2 / 80)) == pytest.approx(0.14, abs=1e-3)


def test_bootstrap_matches_the_paired_standard_error():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.3, 1.0, 400)
    means = bootstrap_means(*cluster_sums(differences), draws=20_000)
    assert means.mean() == pytest.approx(differences.mean(), abs=3e-3)
    assert means.std() == pytest.approx(differences.std() / np.sqrt(400), rel=0.03)


def test_bootstrap_interval_agrees_with_scipy():
    rng = np.random.default_rng(2)
    teacher, student = rng.random((2, 300))
    ours = np.quantile(bootstrap_means(*cluster_sums(student - teacher)), [0.025, 0.975])
    scipy_interval = scipy_stats.bootstrap(
        (student - teacher,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert ours == pytest.approx([scipy_interval.low, scipy_interval.high], abs=4e-3)


def test_bootstrap_of_clusters_equals_that_of_their_sums():
    # Two copies of each item in one cluster carry no more information than one copy.
    differences = np.random.default_rng(4).normal(size=150)
    once = bootstrap_means(*cluster_sums(differences))
    twice = bootstrap_means(*cluster_sums(np.repeat(differences, 2), clusters=np.repeat(np.arange(150), 2)))
    assert twice == pytest.approx(once)


def test_bootstrap_in_blocks_has_the_same_spread(monkeypatch):
    sums, weights = cluster_sums(np.random.default_rng(5).normal(size=100))
    whole = bootstrap_means(sums, weights)
    monkeypatch.setattr("evals.stats._CELLS", 1000)
    blocks = bootstrap_means(sums, weights)
    assert len(blocks) == len(whole)
    assert blocks.std() == pytest.approx(whole.std(), rel=0.05)


def test_sign_flip_agrees_with_the_exact_permutation_test():
    differences = np.array([0.5, -0.2, 0.9, 1.1, 0.3, -0.1, 0.7, 0.4, 0.6, -0.3])
    exact = scipy_stats.permutation_test(
        (differences, np.zeros(10)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p(differences, draws=40_000) == pytest.approx(exact, abs=3e-3)


def test_sign_flip_of_binary_differences_is_mcnemar():
    differences = np.array([1.0] * 12 + [-1.0] * 25 + [0.0] * 60)
    assert sign_flip_p(differences, draws=40_000) == pytest.approx(mcnemar_exact(12, 25), abs=5e-3)
    assert sign_flip_p(np.zeros(5)) == 1.0


@pytest.mark.parametrize(
    ("low", "bound", "high", "expected"),
    [
        (-0.015, -0.01, 0.03, "non-inferior within 0.02"),
        (-0.015, -0.012, -0.002, "non-inferior within 0.02"),
        (-0.08, -0.07, -0.01, "worse"),
        (-0.08, -0.07, 0.01, "inconclusive"),
        (-0.03, -0.02, 0.01, "inconclusive"),
    ],
)
def test_verdicts(low, bound, high, expected):
    assert verdict(low, bound, high, 0.02) == expected


def test_compare_by_hand():
    teacher = [1] * 60 + [0] * 40
    student = [1] * 50 + [0] * 10 + [1] * 4 + [0] * 36
    c = compare(rows(teacher), rows(student, "half"), "hellaswag_100", "acc", 0.02)
    assert (c["n"], c["clusters"], c["flips_up"], c["flips_down"]) == (100, 100, 4, 10)
    assert (c["teacher"], c["student"]) == (0.60, 0.54)
    assert c["difference"] == pytest.approx(-0.06)
    assert c["p"] == pytest.approx(scipy_stats.binomtest(4, 14).pvalue)
    assert c["test"] == "exact McNemar"
    # Bonett and Price: (b + 1, c + 1, n + 2).
    centre, error = -6 / 102, np.sqrt((16 / 102 - (6 / 102) ** 2) / 102)
    assert c["ci_low"] == pytest.approx(centre - 1.96 * error, abs=0.01)
    assert c["ci_high"] == pytest.approx(centre + 1.96 * error, abs=0.01)
    assert c["mde"] == pytest.approx(2.8 * error, rel=0.03)
    assert c["ci_low"] < c["bound"] < c["difference"]
    assert c["verdict"] == "inconclusive"


def test_compare_ignores_row_order_and_is_deterministic():
    rng = np.random.default_rng(6)
    teacher, student = rows(rng.integers(0, 2, 50)), rows(rng.integers(0, 2, 50), "half")
    first = compare(teacher, student, "hellaswag_100", "acc", 0.02)
    assert compare(teacher, student.sample(frac=1, random_state=0), "hellaswag_100", "acc", 0.02) == first


def test_compare_weights_by_tokens_and_knows_that_less_is_better():
    tokens = [100, 300, 200] * 2
    teacher = rows([2.0, 3.0, 2.5] * 2, metric="nll", n=tokens)
    student = rows([2.2, 3.1, 2.8] * 2, "half", metric="nll", n=tokens)
    c = compare(teacher, student, "hellaswag_100", "nll", 0.02, higher_is_better=False)
    assert c["difference"] == pytest.approx((0.2 * 100 + 0.1 * 300 + 0.3 * 200) / 600)
    assert c["teacher"] == pytest.approx((2.0 * 100 + 3.0 * 300 + 2.5 * 200) / 600)
    assert c["verdict"] == "worse"
    assert c["bound"] > c["difference"]
    assert c["flips_up"] is None and c["flips_down"] is None
    assert c["test"] == "sign flip over clusters"


def test_flips_count_gains_as_up_when_less_is_better():
    teacher, student = rows([1, 1, 0, 1]), rows([0, 0, 1, 1], "half")
    c = compare(teacher, student, "hellaswag_100", "acc", 0.02, higher_is_better=False)
    assert (c["flips_up"], c["flips_down"]) == (2, 1)


def test_identical_answers_still_have_a_width():
    c = compare(rows([0, 1] * 20), rows([0, 1] * 20, "half"), "hellaswag_100", "acc", 0.02)
    assert c["difference"] == 0
    assert c["ci_high"] == pytest.approx(0.06, abs=0.025)
    assert c["ci_low"] == pytest.approx(-c["ci_high"], abs=0.03)
    assert c["mde"] == pytest.approx(2.8 * np.sqrt(2) / 42, rel=0.05)
    assert c["p"] == 1.0
    assert c["verdict"] == "inconclusive"


def test_one_gain_and_no_loss_does_not_rule_losses_out():
    c = compare(rows([0] * 50), rows([1] + [0] * 49, "half"), "hellaswag_100", "acc", 0.02)
    assert c["ci_low"] < 0 < c["ci_high"]
    assert c["verdict"] == "inconclusive"


def test_identical_models_differ_by_nothing_in_a_score_that_is_no_count():
    scores = [0.25, 0.5, 0.75, 0.25, 0.5]
    c = compare(rows(scores), rows(scores, "half"), "hellaswag_100", "acc", 0.02)
    assert (c["ci_low"], c["ci_high"], c["mde"], c["p"]) == (0, 0, 0, 1)
    assert c["verdict"] == "non-inferior within 0.02"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: (t, s.iloc[1:]), "item sets differ .the teacher 6, the student 5, not in both 1, first 'i0'"),
        (lambda t, s: (t, s.assign(prompt_hash="other")), "prompt_hash differs on 6 of 6 items, first 'i0'"),
        (lambda t, s: (t, s.assign(item_hash="other")), "item_hash differs"),
        (lambda t, s: (t, s.assign(n=7)), "different numbers of tokens"),
        (lambda t, s: (t, s.assign(cluster="one")), "cluster differs"),
        (lambda t, s: (t, s.assign(score=float("nan"))), "the student has no score for 6 items"),
        (lambda t, s: (pd.concat([t, t]), s), "the teacher has item 'i0' more than once"),
        (lambda t, s: (t, s.assign(metric="acc_norm")), "the student has no rows"),
        (
            lambda t, s: (t.assign(cluster="one"), s.assign(cluster="one")),
            "hellaswag_100/acc: all 6 items are of one cluster, 'one'; an interval needs at least 2",
        ),
        (lambda t, s: (t.assign(n=0), s.assign(n=0)), "n must be positive"),
    ],
)
def test_compare_refuses_what_does_not_match(change, message):
    scores = [0, 1, 1, 0, 1, 0]
    teacher, student = change(rows(scores), rows(scores, "half"))
    with pytest.raises(NotComparable, match=message):
        compare(teacher, student, "hellaswag_100", "acc", 0.02)


def test_a_refusal_calls_the_sides_by_their_names():
    one, other = rows([0, 1, 1], "half"), rows([0, 1, 1], "quarter").assign(prompt_hash="other")
    with pytest.raises(NotComparable, match="half and quarter saw different prompts, which a judge"):
        compare(one, other, "hellaswag_100", "acc", 0.02, sides=("half", "quarter"))


@pytest.mark.parametrize(("drop", "lowest", "highest"), [(0.0, 0.03, 0.075), (0.03, 0.48, 0.63)])
def test_false_positive_rate_and_power_are_those_of_a_paired_test(drop, lowest, highest):
    """1000 items, accuracy 0.6 and 0.6 − drop, answers correlated by a latent difficulty (ρ = 0.8): without a drop 5 %
    of the intervals miss 0, with one of three points somewhat more than half do."""
    rng = np.random.default_rng(7)
    runs, n = 600, 1000
    latent = rng.normal(size=(runs, n, 1)) * np.sqrt(0.8) + rng.normal(size=(runs, n, 2)) * np.sqrt(0.2)
    right = latent < scipy_stats.norm.ppf([0.6, 0.6 - drop])  # (runs, n, 2)
    up, down = (right[..., 1] & ~right[..., 0]).sum(1), (right[..., 0] & ~right[..., 1]).sum(1)
    missed = exact = 0
    for run in range(runs):
        d = np.repeat([1.0, -1.0, 0.0], [up[run], down[run], n - up[run] - down[run]])
        low, high = np.quantile(bootstrap_means(*cluster_sums(d), draws=1000, seed=run), [0.025, 0.975])
        missed += not low <= 0 <= high
        exact += mcnemar_exact(int(up[run]), int(down[run])) < 0.05
    assert lowest <= missed / runs <= highest
    assert lowest - 0.01 <= exact / runs <= highest


def test_four_clusters_give_figures_and_no_verdict():
    teacher, student = rows([0.9, 0.8, 0.9, 0.7]), rows([0.1, 0.2, 0.2, 0.1], "half")
    c = compare(teacher, student, "hellaswag_100", "acc", 0.02)
    assert c["ci_high"] < 0
    assert c["verdict"] == "inconclusive"


def test_few_clusters_get_the_width_of_students_t():
    """Normal differences of 8 clusters: a plain percentile interval misses 0 in about 12 % of all runs."""
    rng = np.random.default_rng(9)
    runs, clusters = 500, 8
    missed = {"plain": 0, "expanded": 0}
    for run in range(runs):
        means = bootstrap_means(*cluster_sums(rng.normal(size=clusters)), draws=1000, seed=run)
        for name, level in (("plain", 0.025), ("expanded", tail(0.025, clusters))):
            low, high = np.quantile(means, [level, 1 - level])
            missed[name] += not low <= 0 <= high
    assert missed["expanded"] / runs <= 0.09 < missed["plain"] / runs
    assert tail(0.025, 10**6) == pytest.approx(0.025, rel=1e-4)


def test_clusters_keep_the_false_positive_rate_that_items_alone_lose():
    """40 documents of 20 items whose differences share a document effect."""
    rng = np.random.default_rng(8)
    runs, documents, size = 150, 40, 10
    clusters = np.repeat(np.arange(documents), size)
    missed = {"items": 0, "documents": 0}
    for run in range(runs):
        d = np.repeat(rng.normal(size=documents), size) + rng.normal(size=documents * size)
        for name, by in (("items", None), ("documents", clusters)):
            low, high = np.quantile(bootstrap_means(*cluster_sums(d, clusters=by), draws=300, seed=run), [0.025, 0.975])
            missed[name] += not low <= 0 <= high
    assert missed["documents"] / runs <= 0.10
    assert missed["items"] / runs >= 0.25


def of_tasks(scores, model="teacher", clusters=None):
    """Rows of several tasks. scores, clusters: by task."""
    return pd.concat(
        [rows(values, model, (clusters or {}).get(task), benchmark=task) for task, values in scores.items()],
        ignore_index=True,
    )


ACC = {"large": "acc", "small": "acc"}


def test_every_task_weighs_the_same_in_the_mean():
    teacher = of_tasks({"large": [1] * 60 + [0] * 40, "small": [1] * 8 + [0] * 2})
    student = of_tasks({"large": [1] * 50 + [0] * 50, "small": [1] * 9 + [0]}, "half")
    m = mean_of_tasks(teacher, student, ACC, 0.02)
    assert (m["tasks"], m["n"], m["clusters"]) == (["large", "small"], 110, 110)
    assert (m["teacher"], m["student"]) == (pytest.approx(0.7), pytest.approx(0.7))
    assert m["difference"] == pytest.approx(0.0)
    assert m["retention"] == pytest.approx(1.0)
    # Bonett and Price in each task: of (up, down, n) = (0, 10, 100) and (1, 0, 10), halved by the mean of two.
    error = np.sqrt((12 / 102 - (10 / 102) ** 2) / 102 + (3 / 12 - (1 / 12) ** 2) / 12) / 2
    assert m["mde"] == pytest.approx(2.8 * error, rel=0.03)
    assert m["ci_low"] < m["bound"] < 0 < m["ci_high"]
    assert m["retention_low"] < 1 < m["retention_high"]
    assert m["verdict"] == "inconclusive"


def test_the_mean_over_one_task_is_that_task():
    rng = np.random.default_rng(10)
    teacher = rng.random(60)
    clusters = np.repeat([f"d{k}" for k in range(12)], 5)
    student = teacher + rng.normal(0.05, 0.1, 60)
    tables = rows(teacher, clusters=clusters), rows(student, "half", clusters)
    mean = mean_of_tasks(*tables, {"hellaswag_100": "acc"}, 0.02)
    alone = compare(*tables, "hellaswag_100", "acc", 0.02)
    assert mean["verdict"] == alone["verdict"]
    for figure in ("teacher", "student", "difference"):
        assert mean[figure] == pytest.approx(alone[figure])
    for figure in ("ci_low", "ci_high", "bound", "mde"):
        assert mean[figure] == pytest.approx(alone[figure], abs=2e-3)


def test_the_mean_over_tasks_shows_what_no_task_shows_alone():
    """Three tasks of 400 items with 2 % of flips each way: in the mean of all, 2 points are ruled out."""
    before, after = ([side] * 8 + [1 - side] * 8 + [0] * 200 + [1] * 184 for side in (0, 1))
    teacher, student = of_tasks(dict.fromkeys("abc", before)), of_tasks(dict.fromkeys("abc", after), "half")
    mean = mean_of_tasks(teacher, student, dict.fromkeys("abc", "acc"), 0.0125)
    assert mean["verdict"] == "non-inferior within 0.0125"
    assert compare(teacher, student, "a", "acc", 0.0125)["verdict"] == "inconclusive"


def test_the_mean_over_tasks_says_worse_and_how_much_is_left():
    rng = np.random.default_rng(11)
    right = (rng.random((2, 300)) < 0.8).astype(float)
    kept = right * (rng.random((2, 300)) < 0.75)
    m = mean_of_tasks(*(of_tasks(dict(zip(ACC, scores, strict=True))) for scores in (right, kept)), ACC, 0.02)
    assert m["verdict"] == "worse"
    share = kept.mean() / right.mean()
    assert m["retention"] == pytest.approx(share)
    error = np.sqrt((kept - share * right).var(1).sum() / 300) / 2 / right.mean()  # of a ratio, by linearisation
    assert m["retention_low"] == pytest.approx(share - 1.96 * error, abs=0.006)
    assert m["retention_high"] == pytest.approx(share + 1.96 * error, abs=0.006)


def test_a_task_of_four_clusters_leaves_the_mean_without_a_verdict():
    clusters = {"small": np.repeat(list("abcd"), 5)}
    teacher = of_tasks({"large": [0.5, 0.6] * 50, "small": [0.5] * 20}, clusters=clusters)
    student = of_tasks({"large": [0.4, 0.5] * 50, "small": [0.4, 0.39] * 10}, clusters=clusters)
    assert mean_of_tasks(teacher, student, ACC, 0.02)["verdict"] == "inconclusive"
    assert mean_of_tasks(teacher, student, {"large": "acc"}, 0.02)["verdict"] == "worse"


def test_nothing_is_kept_of_nothing():
    teacher = of_tasks({"large": [0.0] * 40, "small": [0.0] * 20})
    student = of_tasks({"large": [0.5] * 40, "small": [0.25] * 20}, "half")
    m = mean_of_tasks(teacher, student, ACC, 0.02)
    assert (m["retention"], m["retention_low"], m["retention_high"]) == (None, None, None)
    assert (m["ci_low"], m["difference"], m["ci_high"]) == pytest.approx((0.375, 0.375, 0.375))


def test_the_mean_over_tasks_refuses_as_a_comparison_does():
    teacher = of_tasks({"large": [0, 1, 1], "small": [1, 0, 1]})
    student = of_tasks({"large": [0, 1, 1], "small": [1, 0, 1]}, "half")
    student.loc[student.benchmark == "small", "prompt_hash"] = "other"
    with pytest.raises(NotComparable, match="small/acc: prompt_hash differs on 3 of 3 items"):
        mean_of_tasks(teacher, student, ACC, 0.02)
    with pytest.raises(ValueError, match="no tasks given"):
        mean_of_tasks(teacher, student, {}, 0.02)


def test_the_interval_of_the_mean_over_tasks_keeps_its_rate_where_clusters_are_resampled_within_their_task():
    """Two tasks whose items share a document's effect, 10 documents and 30: equal models, 5 % of the intervals may miss
    0. Items taken for independent, far more do."""
    rng = np.random.default_rng(12)
    runs, documents = 150, {"large": (30, 4), "small": (10, 8)}
    by_document = {name: np.repeat([f"d{k}" for k in range(count)], size) for name, (count, size) in documents.items()}
    missed = {"documents": 0, "bound": 0, "retention": 0, "items": 0}
    for run in range(runs):
        base = {name: 0.5 + 0.1 * rng.random(count * size) for name, (count, size) in documents.items()}
        effect = {
            name: 0.05 * (np.repeat(rng.normal(size=count), size) + rng.normal(size=count * size))
            for name, (count, size) in documents.items()
        }
        scores = {name: base[name] + effect[name] for name in base}
        for name, clusters in (("documents", by_document), ("items", None)):
            tables = of_tasks(base, clusters=clusters), of_tasks(scores, "half", clusters)
            m = mean_of_tasks(*tables, ACC, 0.02, draws=500, seed=run)
            missed[name] += not m["ci_low"] <= 0 <= m["ci_high"]
            if name == "documents":
                missed["bound"] += m["bound"] > 0
                missed["retention"] += not m["retention_low"] <= 1 <= m["retention_high"]
    assert missed["documents"] / runs <= 0.10
    assert missed["bound"] / runs <= 0.10
    assert missed["retention"] / runs <= 0.10
    assert missed["items"] / runs >= 0.20
