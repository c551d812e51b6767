import json
import re

import pandas as pd
import pytest
from test_build import Page, build

from reports.flips import CHARACTERS, SHOWN, all_flips, flips, shown, word_difference, write_flips
from reports.rows import load


def table(scores, benchmark="task", metric="acc"):
    """scores: item → (score, response)."""
    rows = [(benchmark, item, metric, float(score), response) for item, (score, response) in scores.items()]
    return pd.DataFrame(rows, columns=["benchmark", "item", "metric", "score", "response"])


def line(**more):
    return {"benchmark": "task", "metric": "acc", "higher_is_better": True} | more


def test_only_changed_answers_are_flips_and_the_worst_come_first():
    teacher = table({"a": (1, "yes"), "b": (0, "no"), "c": (1, "so"), "d": (0.9, "much"), "only": (1, "x")})
    student = table({"a": (0, "nay"), "b": (1, "yea"), "c": (1, "other words"), "d": (0.6, "less")})
    found = flips(teacher, student, [line()], "half")
    assert [(f["item"], f["harm"]) for f in found] == [("a", 1.0), ("d", pytest.approx(0.3)), ("b", -1.0)]
    assert found[0] == {
        "benchmark": "task",
        "metric": "acc",
        "item": "a",
        "model": "half",
        "prompt": "",
        "baseline_score": 1.0,
        "score": 0.0,
        "harm": 1.0,
        "baseline_answer": "yes",
        "answer": "nay",
    }
    assert [f["harm"] for f in flips(teacher, student, [line(higher_is_better=False)], "half")][0] == 1.0


def test_scores_without_an_answer_are_no_flips():
    assert flips(table({"a": (2.0, "")}), table({"a": (3.0, "")}), [line()], "half") == []


def test_a_flip_says_what_was_asked():
    """Rows have the prompt of an item once, beside any of its metrics."""
    asked = table({"a": (1, "yes"), "b": (0, "no")}).assign(prompt=["", "Why b?"])
    asked = pd.concat([asked, table({"a": (1, "")}, metric="other").assign(prompt="Why a?")])
    (found,) = flips(asked, table({"a": (0, "nay"), "b": (0, "no")}), [line()], "half")
    assert found["prompt"] == "Why a?"
    assert shown([found])[0]["prompt"] == "Why a?"


def test_a_judged_answer_is_the_model_s_and_not_the_judge_s():
    said = [table({"a": (9, words)}, metric="answer_tokens") for words in ("well said", "badly said")]
    judged = [table({"a": (score, "Rating: [[5]]")}, metric="score") for score in (8, 3)]
    sides = [pd.concat(pair) for pair in zip(said, judged, strict=True)]
    (found,) = flips(*sides, [line(metric="score")], "half")
    assert (found["baseline_answer"], found["answer"], found["harm"]) == ("well said", "badly said", 5.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("the cat sat", "the dog sat", [("same", "the "), ("gone", "cat"), ("new", "dog"), ("same", " sat")]),
        ("same", "same", [("same", "same")]),
        ("", "new words", [("new", "new words")]),
        ("Paris.", "", [("gone", "Paris.")]),
        ("1,5", "1,6", [("same", "1,"), ("gone", "5"), ("new", "6")]),
    ],
)
def test_words_that_differ(before, after, expected):
    assert word_difference(before, after) == expected


def test_both_answers_can_be_read_back_from_the_words():
    before, after = "A b  c\n\nd, e (f)", "A c\nd e; (g)\t!"
    words = word_difference(before, after)
    assert "".join(text for kind, text in words if kind != "new") == before
    assert "".join(text for kind, text in words if kind != "gone") == after


def test_a_page_shows_the_worst_of_each_group_in_turn_and_long_answers_cut():
    changed = [
        {"model": m, "benchmark": b, "item": str(i), "harm": 1.0, "prompt": "", "baseline_answer": "x " * CHARACTERS}
        | {"answer": "y"}
        for m in ("half", "quarter")
        for b in ("t", "u")
        for i in range(50)
    ]
    made = shown([*changed, changed[0] | {"harm": -1.0}])
    assert len(made) == SHOWN and {(f["model"], f["benchmark"]) for f in made[:4]} == {
        (m, b) for m in ("half", "quarter") for b in ("t", "u")
    }
    assert all(f["cut"] and sum(len(text) for _, text in f["words"]) <= CHARACTERS + 1 for f in made)


def test_every_flip_is_written_whole_and_hostile_answers_stay_text(example, tmp_path, hostile):
    _, html = build(example, tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "flips.jsonl").read_text().splitlines()]
    found = all_flips(load(example))
    assert len(written) == len(found) > SHOWN
    assert any(hostile in f["answer"] for f in written)
    section = html[html.index('<section id="flips">') :]
    section = section[: section.index("</section>")]
    assert "&lt;script&gt;" in section and section.count('class="words"') == SHOWN
    assert "<del>" in section and "<ins>" in section
    assert {tag for tag, _ in Page(section + "</section>").tags}.isdisjoint({"script", "img"})
    assert re.search("[\x00\x1b\u202e\u2066]", html) is None


def test_unprintable_answers_can_be_written(tmp_path):
    write_flips([{"answer": "\x00\ud800", "score": float("nan")}], tmp_path / "flips.jsonl")
    assert json.loads((tmp_path / "flips.jsonl").read_text()) == {"answer": "\u2400\ufffd", "score": None}
