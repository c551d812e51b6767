import json
from types import SimpleNamespace

import pytest

from evals import items
from evals.head import EvaluationError


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    def put(*cases: dict) -> None:
        path = tmp_path / "cases.jsonl"
        path.write_text("\n".join(json.dumps(c) for c in cases) + "\n", encoding="utf-8")
        monkeypatch.setattr(items, "resolve", lambda source: SimpleNamespace(path=path))

    return put


def test_hellaswag_prompts_are_those_of_the_harness(file_of):
    file_of(
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
    first, second = items.load_items("hellaswag_100", 0, 0)
    assert first.query == "Paintball: They run. They"
    assert (first.choices, first.gold, first.cluster) == (("a", "b"), 1, "h1")
    assert second.query == "Home: How to dry shoes. Look first. Then wait."
    assert second.choices == (" Wash them.", "Go.")


def test_truthfulqa_prompt(file_of):
    file_of({"id": "t", "question": "Why?", "choices": ["Because.", "No.", "Yes."], "expected_index": 0})
    (item,) = items.load_items("truthfulqa_mc1_100", 0, 0)
    assert (item.query, item.choices, item.gold) == ("Q: Why?\nA:", ("Because.", "No.", "Yes."), 0)


def test_mmlu_dev_has_281_questions_and_no_working():
    found = items.load_items("mmlu_dev", 0, 0)
    assert len(found) == len({i.id for i in found}) == 281
    assert len({i.cluster for i in found}) == 57
    assert not [i for i in found if "Let's think" in i.query or "The answer is (" in i.query]
    item = next(i for i in found if i.id == "abstract_algebra-0")
    assert item.query.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    )
    assert item.query.endswith("A. True, True\nB. False, False\nC. True, False\nD. False, True\nAnswer:")
    assert (item.choices, item.gold) == (("A", "B", "C", "D"), 2)
    options_on_lines = next(i for i in found if i.id == "elementary_mathematics-2")
    assert options_on_lines.query.endswith("\nA. 749\nB. 2,675\nC. 2,945\nD. 4,250\nAnswer:")


def test_subsets_are_drawn_by_seed_and_keep_their_order():
    everything = [i.id for i in items.load_items("mmlu_dev", 0, 0)]
    a, again, b = ([i.id for i in items.load_items("mmlu_dev", 40, seed)] for seed in (0, 0, 1))
    assert a == again != b
    assert len(set(a)) == 40
    assert a == sorted(a, key=everything.index)
    assert [i.id for i in items.load_items("mmlu_dev", 9999, 0)] == everything


def test_changed_items_are_refused(monkeypatch, tmp_path):
    path = tmp_path / items.MMLU_FILE
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(
        items.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(EvaluationError, match="is missing; install lm-eval"):
        items.load_items("mmlu_dev", 0, 0)
    path.write_text("{}")
    with pytest.raises(EvaluationError, match="other items than those of lm-eval"):
        items.load_items("mmlu_dev", 0, 0)
