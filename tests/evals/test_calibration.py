import numpy as np
import pandas as pd
import pytest

from evals import calibration
from evals.rows import table


def test_two_bins_by_hand():
    confidence = np.array([0.9, 0.2, 0.6, 0.4])
    correct = np.array([1, 0, 0, 1])
    found = calibration.calibration(confidence, correct, bins=2)
    assert found["bins"] == [
        {"low": 0.2, "high": 0.4, "confidence": pytest.approx(0.3), "accuracy": 0.5, "n": 2},
        {"low": 0.6, "high": 0.9, "confidence": pytest.approx(0.75), "accuracy": 0.5, "n": 2},
    ]
    assert found["ece"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.25)
    assert found["brier"] == pytest.approx((0.1**2 + 0.2**2 + 0.6**2 + 0.6**2) / 4)


def test_bins_have_equal_mass_whatever_the_confidences_are():
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 100)
    bins = calibration.calibration(confidence, rng.random(100) < confidence)["bins"]
    assert len(bins) == calibration.BINS == 15
    assert sum(b["n"] for b in bins) == 100
    assert {b["n"] for b in bins} == {6, 7}
    assert all(a["high"] < b["low"] for a, b in zip(bins, bins[1:], strict=False))


def test_equal_confidences_share_a_bin_and_their_order_does_not_matter():
    confidence = np.array([0.5] * 20 + [1.0] * 10)
    correct = np.array([1, 0] * 10 + [1] * 10)
    found = calibration.calibration(confidence, correct)
    assert [(b["low"], b["high"], b["n"]) for b in found["bins"]] == [(0.5, 0.5, 20), (1.0, 1.0, 10)]
    assert found["ece"] == 0.0
    order = np.random.default_rng(1).permutation(30)
    assert calibration.calibration(confidence[order], correct[order]) == found


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_its_excess():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.3, 0.7, 50_000)
    correct = rng.random(50_000) < truth
    assert calibration.calibration(truth, correct)["ece"] < 0.01
    assert calibration.calibration(truth + 0.2, correct)["ece"] == pytest.approx(0.2, abs=0.01)


def test_fewer_items_than_bins():
    found = calibration.calibration(np.array([0.75]), np.array([1]))
    assert found["bins"] == [{"low": 0.75, "high": 0.75, "confidence": 0.75, "accuracy": 1.0, "n": 1}]
    assert found["ece"] == 0.25
    assert len(calibration.calibration(np.array([0.1, 0.2, 0.3]), np.array([0, 0, 1]))["bins"]) == 3


@pytest.mark.parametrize(
    ("confidence", "correct"), [([], []), ([1.2], [1]), ([float("nan")], [1]), ([-0.1], [0]), ([0.5], [0.5])]
)
def test_what_is_no_probability_or_no_answer_is_refused(confidence, correct):
    with pytest.raises(ValueError, match="at least one item, confidences from 0 to 1"):
        calibration.calibration(np.array(confidence), np.array(correct))


def rows(*scores: tuple[str, str, str, float]) -> pd.DataFrame:
    return table(
        [
            {
                "benchmark": benchmark,
                "item": item,
                "item_hash": item,
                "prompt_hash": item,
                "cluster": item,
                "metric": metric,
                "score": score,
                "n": 1,
                "response": "",
            }
            for benchmark, item, metric, score in scores
        ],
        "student",
    )


def test_rows_are_joined_by_item():
    frame = rows(
        ("mmlu_dev", "b", "confidence", 0.8),
        ("mmlu_dev", "a", "confidence", 0.4),
        ("mmlu_dev", "a", "acc", 0.0),
        ("mmlu_dev", "b", "acc", 1.0),
        ("other", "a", "acc", 1.0),
    )
    expected = calibration.calibration(np.array([0.8, 0.4]), np.array([1.0, 0.0]))
    assert calibration.of_task(frame, "mmlu_dev") == expected
    assert calibration.of_task(frame, "other") is None


def test_a_confidence_without_an_answer_is_refused():
    frame = rows(
        ("mmlu_dev", "a", "confidence", 0.4), ("mmlu_dev", "b", "confidence", 0.8), ("mmlu_dev", "a", "acc", 0)
    )
    with pytest.raises(ValueError, match="mmlu_dev: item 'b' lacks acc or confidence"):
        calibration.of_task(frame, "mmlu_dev")
