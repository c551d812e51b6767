"""What the modes make of a judge's words, with judges that do as told."""

import json
import math

import numpy as np
import pytest
from judged import ALPACA, PROMPTS, QUESTIONS, Scripted, answers, kept, quiet, scores
from scipy.optimize import minimize
from scipy.special import expit

from evals.benchmark import Found
from evals.judge import alpaca, anchors, mt_bench, pairwise
from evals.judge.answers import Answer
from evals.judge.backends import JudgeError, RequestRefused
from evals.judge.data import Instruction
from evals.judge.judgments import Judgments
from evals.judge.ledger import Ledger


@pytest.fixture
def judgments(tmp_path):
    def of(judge, repeats=1) -> Judgments:
        return Judgments(judge, Ledger(tmp_path / "judgments.jsonl"), repeats)

    return of


def _mt_bench(judgments) -> tuple[list, dict]:
    return mt_bench.measure(judgments, QUESTIONS, answers("s"), PROMPTS, 64, quiet)


def test_mt_bench_grades_both_turns_and_shows_references_where_there_are(judgments):
    judge = Scripted(lambda text: "[[4]]" if "|" in text else "[[8]]")
    records, summary = _mt_bench(judgments(judge))
    assert sorted(judge.asked) == sorted(
        [
            "[[rating]] Q: Hi?\nA: s81.1",
            "[[rating]] Hi?|s81.1|Why?|s81.2",
            "[[rating]] Q: 1+1?\nA: s101.1 R: Two.",
            "[[rating]] 1+1?|s101.1|And 2+2?|s101.2 R: Two. Four.",
            "[[rating]] Q: 2*3?\nA: s111.1 R: Six.",
            "[[rating]] 2*3?|s111.1|Sure?|s111.2 R: Six. Yes.",
        ]
    )
    assert scores(records) == {"81/1": 8, "81/2": 4, "101/1": 8, "101/2": 4, "111/1": 8, "111/2": 4}
    assert {r["cluster"] for r in records} == {"81", "101", "111"}
    assert summary == {
        "mean": 6.0, "turn_1": 8.0, "turn_2": 4.0, "n": 6, "judged": 6, "failed": 0, "best": 6.0, "worst": 6.0,
        "repeat_sd": None, "by_category": {"writing": 6.0, "math": 6.0},
        "category_n": {"writing": 2, "math": 4},
    }  # fmt: skip


def test_a_judgment_without_a_score_is_counted_and_bounded(judgments):
    def says(text):
        if "Hi" in text:
            return "I like it." if "|" not in text else RequestRefused("filtered")
        return "[[10]]"

    records, summary = _mt_bench(judgments(Scripted(says)))
    assert scores(records)["81/1"] == scores(records)["81/2"] == 5.5
    assert summary["n"] == 6
    assert summary["failed"] == 2
    assert summary["mean"] == pytest.approx((4 * 10 + 2 * 5.5) / 6)
    assert summary["worst"] == pytest.approx((4 * 10 + 2 * 1) / 6)
    assert summary["best"] == 10.0
    assert [r["response"] for r in records[:2]] == ["I like it.", ""]


def test_a_judge_that_refuses_everything_is_an_error_and_one_that_fails_too(judgments):
    with pytest.raises(RequestRefused, match="too long"):
        _mt_bench(judgments(Scripted(lambda text: RequestRefused("too long"))))
    with pytest.raises(JudgeError, match="gone"):
        _mt_bench(judgments(Scripted(lambda text: JudgeError("gone"))))


def test_repeats_are_asked_anew_and_their_noise_is_told(judgments):
    counts: dict[str, int] = {}

    def says(text):
        counts[text] = counts.get(text, 0) + 1
        return f"[[{2 + 2 * counts[text]}]]"  # 4 at first, then 6

    records, summary = _mt_bench(judgments(Scripted(says), repeats=2))
    assert set(counts.values()) == {2}
    assert set(scores(records).values()) == {5.0}
    assert summary["repeat_sd"] == pytest.approx(math.sqrt(2))


def test_prompt_hashes_tell_judges_questions_and_prompts_apart(judgments, tmp_path):
    judge = Scripted(lambda text: "[[5]]")
    first = {r["item"]: r["prompt_hash"] for r in _mt_bench(judgments(judge))[0]}
    assert len(set(first.values())) == 6
    others = mt_bench.measure(judgments(judge), QUESTIONS, answers("other"), PROMPTS, 64, quiet)[0]
    assert {r["item"]: r["prompt_hash"] for r in others} == first, "answers do not count: they are what is compared"
    judge.hash = "hash-2"
    second = {r["item"]: r["prompt_hash"] for r in _mt_bench(judgments(judge))[0]}
    assert not set(first.values()) & set(second.values())


def _pairwise(judgments) -> tuple[list, dict]:
    return pairwise.measure(judgments, QUESTIONS, answers("s"), answers("t"), PROMPTS, 64, quiet)


def _first_is_students(text: str) -> bool:
    """Whether assistant A's answer is the student's."""
    return text.index("s81" if "s81" in text else "s1") < text.index("t81" if "t81" in text else "t1")


def test_pairs_are_shown_in_both_orders_and_the_better_one_wins(judgments):
    judge = Scripted(lambda text: "[[A]]" if _first_is_students(text) else "[[B]]")
    records, summary = _pairwise(judgments(judge))
    assert len(judge.asked) == 12
    assert "Hi?\nA: s81.1\nB: t81.1" in judge.asked
    assert "Hi?\nA: t81.1\nB: s81.1" in judge.asked
    assert "s101.1,s101.2 or t101.1,t101.2 R: Four." in judge.asked
    assert set(scores(records).values()) == {1.0}
    assert summary == {
        "wins": 6, "ties": 0, "losses": 0, "win_rate": 1.0, "ci_low": 1.0, "ci_high": 1.0, "consistent": 1.0,
        "inconsistent": 0, "n": 6, "judged": 6, "failed": 0, "length_ratio": 1.0, "best": 1.0, "worst": 1.0,
        "repeat_sd": None,
    }  # fmt: skip


def test_a_judge_that_prefers_a_place_finds_ties(judgments):
    records, summary = _pairwise(judgments(Scripted(lambda text: "[[A]]")))
    assert set(scores(records).values()) == {0.5}
    assert (summary["wins"], summary["ties"], summary["losses"]) == (0, 6, 0)
    assert summary["consistent"] == 0.0
    assert summary["inconsistent"] == 6


def test_pairs_that_were_not_read_are_ties_with_bounds(judgments):
    """Item 81/1 is read in no order; the student loses all others, 81/2 being read in one order only."""

    def says(text):
        if "81.2" in text:
            return "[[B]]" if _first_is_students(text) else "well"
        if "81.1" in text:
            return "well"
        return "[[B]]" if _first_is_students(text) else "[[A]]"

    _, summary = _pairwise(judgments(Scripted(says)))
    assert (summary["wins"], summary["ties"], summary["losses"]) == (0, 2, 4)
    assert summary["failed"] == 2
    assert summary["consistent"] == 1.0, "of those that were read in both orders"
    assert summary["worst"] == 0.0
    assert summary["best"] == pytest.approx((1.0 + 0.5) / 6), "what was lost in one order can be a tie at best"


INSTRUCTIONS = [Instruction(f"{i}", f"say {i}", "") for i in range(4)]
ANSWERS = {f"{i}": Answer("own " * (i + 1), i + 1) for i in range(4)}
REFERENCES = {f"{i}": "other" for i in range(4)}


def _alpaca(judgments) -> tuple[list, dict]:
    return alpaca.measure(judgments, INSTRUCTIONS, ANSWERS, REFERENCES, ALPACA, quiet, seed=0)


def test_alpaca_averages_probabilities_over_both_orders(judgments):
    """P(M) is 0.8 whatever is shown, but for instruction 3, where the own answer has 0.9 wherever it stands."""

    def logprobs(text):
        p = 0.8 if "say 3" not in text else 0.9 if text.endswith("own ") else 0.1
        return {"M": math.log(p / 2), "m": math.log((1 - p) / 2)}

    judge = Scripted(lambda text: "m", logprobs)
    records, summary = _alpaca(judgments(judge))
    assert len(judge.asked) == 8
    assert {"say 0: m=other M=own ", "say 0: m=own  M=other"} <= set(judge.asked)
    assert scores(records) == pytest.approx({"0": 0.5, "1": 0.5, "2": 0.5, "3": 0.9})
    assert summary["weighted_win"] == pytest.approx(0.6)
    assert summary["weighted_win_se"] == pytest.approx(0.1)
    assert (summary["n"], summary["failed"], summary["verdict"]) == (4, 0, "logprobs")


def test_alpaca_goes_by_words_where_there_are_no_log_probabilities(judgments):
    judge = Scripted(lambda text: "hm" if "say 0" in text else "M" if text.endswith("own ") else "m")
    records, summary = _alpaca(judgments(judge))
    assert scores(records) == {"0": 0.5, "1": 1.0, "2": 1.0, "3": 1.0}
    assert summary["verdict"] == "text"
    assert summary["failed"] == 2
    assert (summary["worst"], summary["best"]) == (0.75, 1.0)


def test_alpaca_counts_letters_that_are_not_among_the_likely(judgments):
    def logprobs(text):
        if "say 0" in text:
            return {"M": -math.inf, "m": -math.inf}
        return {"M": -0.1, "m": -math.inf} if text.endswith("own ") else {"m": -0.1, "M": -math.inf}

    records, summary = _alpaca(judgments(Scripted(lambda text: "m", logprobs)))
    assert scores(records) == {"0": 0.5, "1": 1.0, "2": 1.0, "3": 1.0}
    assert summary["failed"] == 2


def test_the_length_controlled_figure_is_the_ridge_fits_optimum():
    rng = np.random.default_rng(0)
    lengths = rng.normal(300, 500, 200)
    preferences = expit(-0.7 + 1.5 * np.tanh(lengths / lengths.std()) + rng.normal(0, 0.5, 200))

    def loss(weights):
        p = expit(weights[0] + weights[1] * np.tanh(lengths / lengths.std()))
        likelihood = preferences * np.log(p) + (1 - preferences) * np.log(1 - p)
        return -likelihood.sum() + alpaca.RIDGE / 2 * (weights**2).sum()

    best = minimize(loss, [0.0, 0.0], tol=1e-12).x
    found = alpaca.length_controlled(preferences, lengths)
    assert found == pytest.approx(expit(best[0]), abs=1e-5)
    assert abs(found - expit(-0.7)) < 0.05
    assert preferences.mean() - found > 0.1, "longer answers had been preferred for their length"


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_the_length_controlled_figure_is_finite_where_all_is_won_or_lost(won):
    found = alpaca.length_controlled(np.full(50, won), np.arange(50.0))
    assert abs(found - won) < 0.01
    assert alpaca.length_controlled(np.full(50, won), np.zeros(50)) == pytest.approx(won, abs=0.01)


def test_equal_lengths_leave_the_mean():
    assert alpaca.length_controlled(np.array([0.2, 0.4, 0.9]), np.full(3, 7.0)) == pytest.approx(0.5, abs=1e-3)


def test_the_error_is_that_of_another_sample_of_prompts():
    """Against the spread of the figure over fresh samples from the same distribution."""
    rng = np.random.default_rng(1)

    def sample():
        lengths = rng.normal(0, 1, 150)
        return (rng.random(150) < expit(0.3 + np.tanh(lengths))).astype(float), lengths

    spread = np.std([alpaca.length_controlled(*sample()) for _ in range(300)])
    told = np.mean([alpaca.length_controlled_error(*sample(), seed=0, draws=100) for _ in range(5)])
    assert told == pytest.approx(spread, rel=0.2)


def _anchors(judgments, teacher_rows=None) -> tuple[list, dict]:
    return anchors.measure(judgments, PROMPTS["single-v1"], 64, teacher_rows, quiet)


def _of_the_good(low: int, high: int):
    good = {pair["good"] for pair in json.loads(anchors.FILE.read_text(encoding="utf-8"))}
    return lambda text: f"[[{high if text.partition('A: ')[2] in good else low}]]"


def test_anchors_tell_whether_the_judge_knows_good_from_bad(judgments, tmp_path):
    records, summary = _anchors(judgments(Scripted(_of_the_good(2, 9))))
    assert len(records) == anchors.COUNT == 20
    assert summary == {
        "n": 20, "mean": 5.5, "judged": 20, "failed": 0, "pairs": 10, "ordered": 10, "stored_mean": None,
        "largest_change": None,
    }  # fmt: skip
    indifferent = Scripted(lambda text: "[[7]]")
    indifferent.hash = "another"
    assert _anchors(judgments(indifferent))[1]["ordered"] == 0


def test_anchors_tell_how_the_judge_changed_since_the_teacher_was_measured(judgments, tmp_path):
    before, _ = _anchors(judgments(Scripted(_of_the_good(2, 9))))
    folder = kept(Found(before), "teacher", tmp_path / "teacher")
    (tmp_path / "judgments.jsonl").unlink()
    _, summary = _anchors(judgments(Scripted(_of_the_good(3, 7))), folder)
    assert (summary["mean"], summary["stored_mean"], summary["largest_change"]) == (5.0, 5.5, 2.0)
    other = Scripted(_of_the_good(3, 7))
    other.hash = "another"
    assert _anchors(judgments(other), folder)[1]["stored_mean"] is None, "another judge's scores are no measure"
