import pandas as pd
import pytest

from evals.rows import COLUMNS, excerpt, mean_scores, table


def record(item="a", metric="acc", score=1.0, **changes):
    return {
        "benchmark": "quiz",
        "item": item,
        "item_hash": "h",
        "prompt_hash": "p",
        "cluster": item,
        "metric": metric,
        "score": score,
        "n": 1,
        "response": "yes",
    } | changes


def test_a_table_has_the_schema_whatever_it_holds():
    for records in ([], [record(score=1), record("b", score=0)]):
        frame = table(records, "half", "run 7")
        assert list(frame.columns) == list(COLUMNS)
        assert frame.score.dtype == "float64"
        assert frame.n.dtype == "int64"
        assert set(frame.model) <= {"half"} and set(frame.run) <= {"run 7"}


def test_a_table_is_the_same_when_it_was_read_again(tmp_path):
    frame = table([record(response="naïve <b>\u202e\0"), record("b", metric="f1", score=0.25, n=3)], "teacher")
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), frame, check_dtype=False)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record(), record(score=0.0)], "quiz: item 'a' has metric 'acc' more than once"),
        ([record(), record("b", extra=1)], r"record 1 \(quiz, item 'b'\): missing \[\], unknown \['extra'\]"),
        ([{"item": "a"}], r"record 0 \(None, item 'a'\): missing \['benchmark', 'cluster'"),
        ([record(run="r")], r"unknown \['run'\]"),
    ],
)
def test_records_that_are_no_rows_are_refused(records, message):
    with pytest.raises(ValueError, match=message):
        table(records, "half")


def test_means_count_items_once_however_many_metrics_they_have():
    frame = table([record(m, metric, s) for m, s in (("a", 1), ("b", 0)) for metric in ("acc", "f1")], "half")
    assert mean_scores(frame, "quiz") == {"acc": 0.5, "f1": 0.5, "n": 2}


def test_a_prompt_is_kept_where_there_is_one():
    assert list(table([record(), record("b", prompt="Why?")], "half").prompt) == ["", "Why?"]


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        (" Why? ", False, "Why?"),
        ("a" * 300, True, "a" * 300),
        ("a" * 300 + "b", False, "a" * 299 + "…"),
        ("a" + "b" * 300, True, "…" + "b" * 299),
    ],
)
def test_an_excerpt_is_short_and_says_where_it_was_cut(text, end, expected):
    assert excerpt(text, end) == expected
