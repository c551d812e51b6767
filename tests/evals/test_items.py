import json
from importlib.metadata import distribution

import pytest

from evals import items
from evals.head import EvaluationError


@pytest.fixture
def file_of(tmp_path):
    def put(*cases: dict):
        path = tmp_path / "cases.jsonl"
        path.write_text("\n".join(json.dumps(c) for c in cases) + "\n", encoding="utf-8")
        return path

    return put


def test_hellaswag_prompts_are_those_of_the_harness(file_of):
    path = file_of(
        {
            "id": "h1",
            "activity_label": "Paintball",
            "ctx": "They run. they",
            "endings": ["a", "b"],
            "expected_index": 1,
        },
        {
            "id": "h2",
            "activity_label": "Home",
            "ctx": "[header] How to dry shoes [title] Look first. [step] Then wait.",
            "endings": ["[substeps] Wash them.", "Go."],
            "expected_index": 0,
        },
    )
    first, second = items.READERS["hellaswag_100"](path)
    assert first == {
        "id": "h1", "cluster": "h1", "query": "Paintball: They run. They", "choices": ["a", "b"], "gold": 1,
    }  # fmt: skip
    assert second["query"] == "Home: How to dry shoes. Look first. Then wait."
    assert second["choices"] == [" Wash them.", "Go."]


def test_truthfulqa_prompt(file_of):
    path = file_of({"id": "t", "question": "Why?", "choices": ["Because.", "No.", "Yes."], "expected_index": 0})
    (row,) = items.READERS["truthfulqa_mc1_100"](path)
    assert (row["query"], row["choices"], row["gold"]) == ("Q: Why?\nA:", ["Because.", "No.", "Yes."], 0)


def test_mmlu_dev_has_281_questions_and_no_working():
    path = distribution("lm_eval").locate_file("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
    found = items.READERS["mmlu_dev"](path)
    assert len(found) == len({i["id"] for i in found}) == 281
    assert len({i["cluster"] for i in found}) == 57
    assert not [i for i in found if "Let's think" in i["query"] or "The answer is (" in i["query"]]
    by_id = {i["id"]: i for i in found}
    item = by_id["abstract_algebra-0"]
    assert item["query"].startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    )
    assert item["query"].endswith("A. True, True\nB. False, False\nC. True, False\nD. False, True\nAnswer:")
    assert (item["choices"], item["gold"]) == (["A", "B", "C", "D"], 2)
    assert by_id["elementary_mathematics-2"]["query"].endswith("\nA. 749\nB. 2,675\nC. 2,945\nD. 4,250\nAnswer:")


def conversation(passage: str, question: str, options: list[str], ideal: str) -> dict:
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    user = f"\nPassage: {passage}Question: {question}\n{listed}Answer:"
    return {"input": [{"role": "system", "content": "…"}, {"role": "user", "content": user}], "ideal": ideal}


def test_logiqa_is_taken_out_of_conversations_once(file_of):
    case = conversation("All cats purr.\nTom is a cat.", "So?", ["A.Tom purrs.", "B.No.", "C.Who?", "D. A. is."], "D")
    other = conversation("P.", "Q?", ["A.a", "B.b", "C.c", "D.d"], "A")
    first, second = items.READERS["logiqa"](file_of(case, other, case))
    assert first == {
        "label": "d",
        "context": "All cats purr.\nTom is a cat.",
        "question": "So?",
        "options": ["Tom purrs.", "No.", "Who?", "A. is."],
    }
    assert second["label"] == "a"
    broken = {"input": [{"role": "user", "content": "Hello"}], "ideal": "A"}
    with pytest.raises(EvaluationError, match=r"logiqa: .*:2: no passage, question and four options: 'Hello'"):
        items.READERS["logiqa"](file_of(case, broken))


def test_squad_keeps_what_has_an_answer(tmp_path):
    asked = [
        {"id": "1", "question": " Where? ", "answers": [{"text": "Rome", "answer_start": 3}], "is_impossible": False},
        {"id": "2", "question": "Who?", "answers": [], "is_impossible": True},
    ]
    article = {"title": "Rome", "paragraphs": [{"context": "In Rome.", "qas": asked}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    assert items.READERS["squad"](path) == [
        {
            "id": "1",
            "title": "Rome",
            "context": "In Rome.",
            "question": "Where?",
            "answers": {"text": ["Rome"], "answer_start": [3]},
        }
    ]


def test_subsets_are_drawn_by_task_and_seed_and_keep_their_order():
    a, again, b = (items.drawn(281, 40, "mmlu_dev", seed) for seed in (0, 0, 1))
    assert a == again == sorted(a)
    assert a != b
    assert a != items.drawn(281, 40, "squad", 0)
    assert len(set(a)) == 40
    assert items.drawn(281, 9999, "mmlu_dev", 0) == items.drawn(281, 0, "mmlu_dev", 0) == list(range(281))
