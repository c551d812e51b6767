import copy

import pytest

from evals.stats import wilson
from reports.rows import load
from reports.twin import build_twin
from reports.verdict import difference, headline, reading, run_flags, tally, variant_flags


@pytest.fixture
def twin(example):
    return build_twin(load(example), "t", 3, wilson)


def comparison(**more):
    base = {
        "benchmark": "mmlu",
        "metric": "acc",
        "higher_is_better": True,
        "n": 281,
        "clusters": 57,
        "difference": -0.03,
    }
    return base | {"ci_low": -0.06, "ci_high": -0.01, "mde": 0.04, "delta": 0.02, "verdict": "worse"} | more


def texts(flags, level=None):
    return " ".join(f["text"] for f in flags if level in (None, f["level"]))


def test_no_winner_where_the_interval_holds_zero():
    assert reading(comparison(ci_high=0.01)) == "not distinguishable (n=281, MDE=4.0 points)"
    assert reading(comparison(ci_high=0.0)) == "not distinguishable (n=281, MDE=4.0 points)"
    assert reading(comparison()) == "teacher better"
    assert reading(comparison(difference=0.03, ci_low=0.01, ci_high=0.06)) == "student better"


def test_less_can_be_better():
    nll = comparison(metric="nll", higher_is_better=False, difference=0.3, ci_low=0.2, ci_high=0.4)
    assert reading(nll) == "teacher better"
    assert difference(nll) == "+0.300 nats per token"


def test_tally_counts_every_verdict():
    verdicts = ["non-inferior within 0.02", "worse", "inconclusive", "inconclusive"]
    assert tally([{"verdict": v} for v in verdicts]) == {"non-inferior": 1, "worse": 1, "inconclusive": 2}


def test_headline_states_figures_with_n_and_baseline(twin):
    sentences = " ".join(twin["variants"][0]["headline"])
    assert "KL 0.612 ± 0.041 nats per token from the teacher on 32 held-out conversations" in sentences
    assert "489 paired items, 4 comparisons" in sentences
    assert "1.21× the teacher's tokens per second (batch 8 after 512 tokens, cpu)" in sentences
    assert "1.50× plain greedy at K=3, output identical" in sentences


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": {"near_tie": 2}}, "output identical to plain greedy up to the first near-tie in 2 replies"),
        ({"identical_to_greedy": False}, "output NOT identical to plain greedy (batch 1)."),
        ({"identical_to_greedy": None}, "output not compared with plain greedy (batch 1)."),
    ],
)
def test_headline_says_what_was_checked_of_speculation(twin, change, said):
    variant = copy.deepcopy(twin["variants"][0])
    variant["speculation"]["groups"][0]["rows"][3].update(change)
    assert said in " ".join(headline(variant))


def test_headline_of_injected_acceptance_cannot_be_read_as_measured(twin):
    variant = copy.deepcopy(twin["variants"][0])
    variant["speculation"].update(synthetic=True, injected_acceptance=0.7)
    (sentence,) = [s for s in headline(variant) if "plain greedy" in s]
    assert sentence.startswith("SYNTHETIC speculation, 70.0\u202f% of the proposals accepted unseen: 1.50×")


def test_flags_are_ordered_by_weight(twin):
    levels = [f["level"] for f in twin["variants"][1]["flags"]]
    assert levels == sorted(levels, key=["serious", "caution", "note"].index)


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        (lambda v: v.update(benchmark=None), "serious", "Benchmark not run."),
        (lambda v: v["benchmark"].update(device="cuda"), "serious", "Teacher measured on cpu, student on cuda"),
        (lambda v: v["benchmark"]["fidelity"]["held_out"].update(kl_mean=1.7), "serious", "KL 1.70 is above 1 nat"),
        (lambda v: v["benchmark"]["fidelity"]["held_out"].update(top1=0.3), "caution", "less than half the time (30.0"),
        (lambda v: v["benchmark"]["fidelity"]["held_out"].update(documents=8), "caution", "few conversations (n=8)"),
        (lambda v: v.update(comparisons=[]), "caution", "No paired comparison"),
        (lambda v: v["comparisons"][1].update(clusters=7), "caution", "few independent clusters: mmlu_dev (7)"),
        (lambda v: v["training"][0].update(loss_last=0.5), "caution", "The loss did not fall in align (0.400 → 0.500)"),
        (lambda v: v["training"][0].update(loss_last=None), "serious", "align ended without a finite loss"),
        (lambda v: v["quality"][3].update(kl=0.9), "caution", "Held-out KL rose in sft: 0.630 → 0.900"),
        (
            lambda v: v["speculation"]["groups"][1]["rows"][3].update(identical_to_greedy=False),
            "serious",
            "Speculative output (layers:[0, 14, 29] draft, batch 1) differs from plain greedy at K = 3.",
        ),
        (lambda v: v.update(speculation=None), "note", "Not run: dpo, speculative_profile."),
        (
            lambda v: [r.update(speedup=0.8) for g in v["speculation"]["groups"] for r in g["rows"]],
            "note",
            "at no K faster than plain greedy (best 0.80×)",
        ),
        (lambda v: v["speculation"].update(synthetic=True), "caution", "Speculation is SYNTHETIC"),
    ],
)
def test_each_fault_raises_its_flag(twin, change, level, expected):
    variant = copy.deepcopy(twin["variants"][0])
    teacher = twin["teacher"]["benchmark"]
    assert expected not in texts(variant_flags(variant, teacher, []))
    change(variant)
    assert expected in texts(variant_flags(variant, teacher, []), level)


def test_cache_hits_and_missing_stages_are_told(twin):
    told = texts(twin["variants"][0]["flags"], "note")
    assert "1 of 7 stages come from the cache: align." in told
    assert "Not run: dpo." in told


def test_worse_texts_are_named_in_words(twin):
    variant = copy.deepcopy(twin["variants"][0])
    variant["comparisons"] = [comparison(benchmark=b, metric="nll", difference=0.3) for b in ("held_out_text", "mmlu")]
    told = texts(variant_flags(variant, None, []), "serious")
    assert "held-out free text of the teacher (+0.300 nats per token), mmlu (+0.300 nats per token)." in told


def test_a_failed_benchmark_comes_first_and_loudly(twin):
    variant = copy.deepcopy(twin["variants"][1])
    variant["benchmark"]["failed"] = [{"benchmark": "needle", "error": "RuntimeError: no room"}]
    variant["benchmark"]["recompute"] = "python flows/distill_flow.py run --force benchmark"
    first = variant_flags(variant, None, [])[0]
    assert first["level"] == "serious"
    assert first["text"].startswith(
        "FAILED: needle gave no figures: RuntimeError: no room To compute it again: python "
    )
    twin["teacher"]["benchmark"]["failed"] = [{"benchmark": "gsm8k", "error": "KeyError"}]
    assert run_flags(twin)[0] == {"level": "serious", "text": "On the teacher: FAILED: gsm8k gave no figures: KeyError"}


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        (lambda j: j["judge"].update(kind="fake"), "serious", "stand-in for tests"),
        (lambda j: j["pairwise"].update(failed=2), "caution", "pairwise: judgments that could not be read: 2 (n=8)"),
        (lambda j: j["pairwise"].update(consistent=0.5), "caution", "in only 50.0"),
        (lambda j: j["anchors"].update(ordered=7), "serious", "only 7 of 10 pairs of a good and a bad answer"),
        (lambda j: j["anchors"].update(largest_change=3), "caution", "drifted: by up to 3.00 points on 20"),
    ],
)
def test_a_judge_not_to_be_trusted_is_flagged(twin, change, level, expected):
    variant = copy.deepcopy(twin["variants"][0])
    told = texts(variant_flags(variant, None, []))
    assert "Judged by judge-1b (hf), not by GPT-4" in told
    assert "mt_bench: judgments that could not be read: 1 (n=16)" in told and expected not in told
    change(variant["benchmark"]["judge"])
    assert expected in texts(variant_flags(variant, None, []), level)


def test_unreadable_answers_are_counted(twin):
    variant = copy.deepcopy(twin["variants"][0])
    variant["benchmark"]["tasks"][0].update(task="gsm8k", no_answer=0.12, too_long=3)
    assert "No answer could be read on 12.0\u202f% of gsm8k (n=100)." in texts(
        variant_flags(variant, None, []), "caution"
    )


def test_chance_is_told_of_the_metric_that_is_compared(twin):
    task = {"task": "hellaswag_100", "score": 0.32, "n": 100, "ci_low": 0.24, "ci_high": 0.42, "chance": 0.25}
    twin["teacher"]["benchmark"]["tasks"] = [
        task | {"metric": "acc"},
        task | {"metric": "acc_norm", "score": 0.4, "ci_low": 0.31},
    ]
    assert "above chance" not in texts(run_flags(twin))
    for v in twin["variants"]:
        v["comparisons"] = [c | {"metric": "acc"} for c in v["comparisons"] if c["benchmark"] == "hellaswag_100"]
    assert "hellaswag_100 (acc 32.0" in texts(run_flags(twin))


def test_flags_of_the_run(twin):
    told = texts(run_flags(twin))
    assert "not measurably above chance on truthfulqa_mc1_100 (acc 19.0" in told
    assert "Tiny model: the teacher has 135 million parameters" in told
    assert "Limit used" not in told
    twin["configuration"]["benchmark.items_per_task"] = 40
    assert "Limit used: a seeded sample of at most 40 items of each task." in texts(run_flags(twin), "caution")
    twin["runs"][0]["git_commit"] = "7df0b19-dirty"
    assert "The code that made these figures differs from its commit." in texts(run_flags(twin), "caution")
    bare = twin | {"teacher": {"benchmark": None, "parameters": None}, "variants": [], "configuration": {}}
    assert [f["level"] for f in run_flags(bare)] == ["serious", "serious", "caution"]


@pytest.mark.parametrize(
    ("change", "level", "expected"),
    [
        ({"teacher": "other"}, "serious", "different teachers: KL and perplexity ratios are each to its own"),
        ({"chat_template": "<s>"}, "serious", "chat templates differ"),
        ({"device": "H200"}, "caution", "different devices: speeds do not compare (cpu, H200)"),
        ({"git_commit": "c0ffee"}, "note", "different commits"),
    ],
)
def test_what_runs_do_not_share_is_flagged(twin, change, level, expected):
    run = twin["runs"][0]
    assert expected not in texts(run_flags(twin | {"runs": [run, run]}))
    assert expected in texts(run_flags(twin | {"runs": [run, run | change]}), level)


def test_another_baseline_is_named(twin):
    assert reading(comparison(), "B/half") == "B/half better"
    variant = twin["variants"][0]
    assert "Against B/half on 489 paired items" in " ".join(headline(variant, "B/half"))
    variant["comparisons"][0].update(verdict="worse")
    assert "Worse than B/half: " in texts(variant_flags(variant, None, [], "B/half"), "serious")
