import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import BYTE_VOCAB, byte_tokenizer, subject_of, tiny

from corpora import sources
from evals import lm_eval_adapter
from evals.head import EvaluationError
from evals.lm_eval_adapter import SCORERS, measure_task
from evals.tasks import TASKS, ifeval, squad, zeroeval
from steps.config import TaskName

FORMATS = ("jsonl", "parquet")


def test_the_configuration_names_these_tasks():
    assert set(get_args(TaskName)) == set(TASKS)
    assert {name for name, task in TASKS.items() if task.kind == "text"} == set(SCORERS) - {"truthfulqa_mc2"}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_every_source_is_pinned_by_a_hash_or_a_commit(task):
    for text in (task.source, *([task.chosen] if task.chosen else [])):
        source = sources.parse(text)
        assert source.sha256 or re.fullmatch("[0-9a-f]{40}", source.revision)
    assert bool(task.shots) == bool(task.shots_split)


ARC = {
    "id": "Mercury_1",
    "question": "Which is wet?",
    "choices": {"text": ["sand", "water", "glass"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
OTHER_ARC = {**ARC, "id": "Mercury_2", "question": "What burns?", "answerKey": "1"} | {
    "choices": {"text": ["wood", "iron"], "label": ["1", "2"]}
}
WINOGRANDE = {
    "sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2",
}  # fmt: skip
HELLASWAG = {
    "ind": 24, "activity_label": "Home", "ctx_a": "A man [title] sits.", "ctx_b": "he", "ctx": "…",
    "endings": ["eats [step] fast.", "sleeps.", "runs.", "flies."], "source_id": "s", "split": "val",
    "split_type": "indomain", "label": "1",
}  # fmt: skip
MMLU = [
    {"question": "What is 1 + 1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
    {"question": "Where is the liver?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3},
    {"question": "What is 2 + 2?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 3},
]
TRUTHFULQA = {
    "question": "Do pigs fly?",
    "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["No.", "They do not.", "Yes."], "labels": [1, 1, 0]},
}
PROBLEMS = [
    {"question": "The sun is  _  .", "answer": "A", "options": ["hot", "cold", "wet", "blue"]},
    {"question": "How far is it?", "answer": "C", "options": ["near", "here", "far", "gone"]},
    {"question": "Who says so?", "answer": "D", "options": ["I", "you", "we", "they"]},
]

# Rows in the schema of the hub; the last of the contexts that the model is given; the continuations; the right one.
CHOICES: dict[str, tuple[list[dict[str, Any]], str, list[str], int]] = {
    "winogrande": ([WINOGRANDE], "Ann thanked Eve because Eve", [" had helped."] * 2, 1),
    "piqa": (
        [{"goal": "Dry a shoe.", "sol1": "Wait.", "sol2": "Wash it.", "label": 0}],
        "Question: Dry a shoe.\nAnswer:",
        [" Wait.", " Wash it."],
        0,
    ),
    "hellaswag": ([HELLASWAG], "Home: A man. sits. He", [" eats fast.", " sleeps.", " runs.", " flies."], 1),
    "arc_easy": ([ARC], "Question: Which is wet?\nAnswer:", [" sand", " water", " glass"], 1),
    "arc_challenge": ([OTHER_ARC], "Question: What burns?\nAnswer:", [" wood", " iron"], 0),
    "openbookqa": (
        [{"id": "7-1", "question_stem": "The sun makes", "choices": ARC["choices"], "answerKey": "C"}],
        "The sun makes",
        [" sand", " water", " glass"],
        2,
    ),
    "truthfulqa_mc1": ([TRUTHFULQA], "\n\nQ: Do pigs fly?\nA:", [" No.", " Yes."], 0),
    "pubmedqa": (
        [
            {
                "pubid": 21645374,
                "question": "Do they die?",
                "context": {"contexts": ["First.", "Second."], "labels": ["A", "B"], "meshes": ["m"]},
                "long_answer": "…",
                "final_decision": "no",
            }
        ],
        "Abstract: First.\nSecond.\nQuestion: Do they die?\nAnswer:",
        [" yes", " no", " maybe"],
        1,
    ),
    "race": (
        [{"article": "Once it rained.", "problems": repr(PROBLEMS)}],
        "Article: Once it rained.\n\nThe sun is hot\nQuestion: How far is it?\nAnswer: far\nWho says so?",
        [" I", " you", " we", " they"],
        3,
    ),
    "mmlu": (
        MMLU[:1],
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        [" A", " B", " C", " D"],
        1,
    ),
    "logiqa": (
        [{"label": "c", "context": "All cats purr.", "question": "So?", "options": ["1", "2", "3", "4"]}],
        "Passage: All cats purr.\nQuestion: So?\nChoices:\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        [" 1", " 2", " 3", " 4"],
        2,
    ),
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A subject, and the texts that its model was given. Its answers are those of a tiny random model."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer = byte_tokenizer()
    model = tiny(0, (0,), BYTE_VOCAB)
    model.config = replace(model.config, max_position_embeddings=8192)
    seen: list[tuple[str, str]] = []
    plain = lm_eval_adapter.loglikelihoods

    def spy(model, pairs, *more):
        seen.extend((tokenizer.decode(a), tokenizer.decode(b)) for a, b in pairs)
        return plain(model, pairs, *more)

    monkeypatch.setattr(lm_eval_adapter, "loglikelihoods", spy)
    return SimpleNamespace(
        subject=replace(subject_of(model, None, tmp_path), tokenizer=tokenizer), seen=seen, folder=tmp_path
    )


def given(folder: Path, task: str, ending: str = "jsonl", **splits: list[dict[str, Any]]) -> SimpleNamespace:
    """The configuration that takes a task's items from files."""
    for split, items in splits.items():
        path = folder / task / f"{split}.{ending}"
        path.parent.mkdir(exist_ok=True)
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(items), path)
        else:
            path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return SimpleNamespace(data={task: f"file:{folder / task}"}, items_per_task=0, max_new_tokens=0)


@pytest.mark.parametrize("task", CHOICES)
def test_choices_are_asked_as_the_harness_asks_them(task, asked):
    items, context, continuations, gold = CHOICES[task]
    ending = FORMATS[len(task) % 2]
    found = measure_task(asked.subject, task, given(asked.folder, task, ending, **{TASKS[task].split: items}))
    assert [c for _, c in asked.seen] == continuations
    contexts = [c for c, _ in asked.seen]
    if task == "truthfulqa_mc1":
        assert contexts[0].startswith("Q: What is human life expectancy in the United States?")
        assert contexts[0].endswith(context)
    else:
        assert contexts[-1] == context
    chosen = [r for r in found.records if r["metric"] == "acc"]
    texts = [c.removeprefix(" ") for c in continuations] if task != "winogrande" else contexts
    assert [r["score"] for r in chosen] == [float(r["response"] == texts[gold]) for r in chosen]
    assert {r["metric"] for r in found.records} == {*TASKS[task].metrics, "confidence"}
    assert found.summary["chance"] == pytest.approx(1 / len(continuations))


def test_mc2_is_the_probability_of_all_true_answers(asked, monkeypatch):
    monkeypatch.setattr(lm_eval_adapter, "loglikelihoods", lambda *_: [(-1.0, False), (-2.0, False), (-3.0, False)])
    found = measure_task(
        asked.subject, "truthfulqa_mc2", given(asked.folder, "truthfulqa_mc2", validation=[TRUTHFULQA])
    )
    (record,) = found.records
    assert record["score"] == pytest.approx((1 + 2.718281828**-1) / (1 + 2.718281828**-1 + 2.718281828**-2))
    assert record["response"] == "No."
    assert found.summary["chance"] is None


def test_mmlu_is_asked_by_subject_and_scored_as_one(asked):
    found = measure_task(asked.subject, "mmlu", given(asked.folder, "mmlu", test=MMLU))
    acc = [r for r in found.records if r["metric"] == "acc"]
    assert {(r["item"], r["cluster"]) for r in acc} == {
        ("0", "abstract_algebra"), ("1", "anatomy"), ("2", "abstract_algebra"),
    }  # fmt: skip
    assert {r["benchmark"] for r in acc} == {"mmlu"}
    assert found.summary["n"] == 3
    assert [c for c, _ in asked.seen if "about anatomy" in c] == [c for c, _ in asked.seen if "liver" in c]


def test_worked_examples_are_of_the_item_s_subject_and_in_order(asked):
    shots = [
        {"question": f"{subject} {k}?", "subject": subject, "choices": ["p", "q", "r", "s"], "answer": k % 4}
        for k in range(5)
        for subject in ("anatomy", "abstract_algebra")
    ]
    measure_task(asked.subject, "mmlu_5", given(asked.folder, "mmlu_5", test=MMLU, dev=shots))
    (context,) = {c for c, _ in asked.seen if "liver" in c}
    assert context.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nanatomy 0?")
    assert "anatomy 4?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\nWhere is the liver?" in context
    assert "abstract_algebra" not in context


@pytest.mark.parametrize(
    ("task", "scored", "shot"),
    [
        ("arc_challenge_25", ARC, lambda k: {**ARC, "question": f"Shot {k}?"}),
        ("hellaswag_10", HELLASWAG, lambda k: {**HELLASWAG, "ctx_a": f"Shot {k}."}),
        ("winogrande_5", WINOGRANDE, lambda k: {**WINOGRANDE, "sentence": f"Shot {k}: _ slept."}),
    ],
)
def test_worked_examples_are_drawn_the_same_for_every_model(task, scored, shot, asked):
    spec = TASKS[task]
    config = given(asked.folder, task, train=[shot(k) for k in range(40)], **{spec.split: [scored]})
    first = measure_task(asked.subject, task, config).records
    contexts = [c for c, _ in asked.seen]
    assert all(c.count("Shot ") == spec.shots for c in contexts)
    if task == "arc_challenge_25":
        assert contexts[0].count("Answer: water\n\n") == 25
    other = replace(asked.subject, model=tiny(7, (), BYTE_VOCAB))
    other.model.config = asked.subject.model.config
    again = measure_task(other, task, config).records
    assert [r["prompt_hash"] for r in again] == [r["prompt_hash"] for r in first]
    with pytest.raises(EvaluationError, match=f"{task}: .* is one file, but worked examples are needed too"):
        one = SimpleNamespace(**{**vars(config), "data": {task: f"file:{asked.folder}/{task}/train.jsonl"}})
        measure_task(asked.subject, task, one)


def test_pubmedqa_of_the_hub_is_cut_to_the_official_test_questions(monkeypatch, tmp_path):
    from evals import data

    items = [{**CHOICES["pubmedqa"][0][0], "pubid": number} for number in (1, 2, 3)]
    (tmp_path / "ids.json").write_text('{"3": "yes", "1": "no"}')
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "train.parquet")
    monkeypatch.setattr(data, "_hub_file", lambda source, split: tmp_path / f"{split}.parquet")
    spec = replace(TASKS["pubmedqa"], chosen=f"file:{tmp_path}/ids.json")
    assert [row["pubid"] for row in data.load(spec)["train"]] == [1, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "Two and two", "answer": "4"}', "4"),
        ('Sure!\n```json\n{"reasoning": "line\nbreak {x}", "answer": 4.5}\n```', 4.5),
        ('{"a": {"answer": "inner"}} {"answer": "outer"}', "inner"),
        ('{"reasoning": "he said "no" to it", "answer": "12"}', "12"),
        ('{"reasoning": "cut off before', None),
        ('{"reasoning": "x", answer: 7}', "7"),
        ('{"answer": null}', None),
        ('{"answer": [1, "a"]}', [1, "a"]),
        ("I do not know.", None),
        ("{" * 3000, None),
        ('{"answer": ' + "[" * 100_000, "[" * 100_000),
    ],
)
def test_the_answer_of_a_reply(text, expected):
    assert zeroeval.answer(text) == expected


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("1,234", True), ("$1234.00", True), ("The answer is 1234 miles", True), ("2468/2", True), ("-1234", False),
        ("12 34", False), ("__import__('os').getpid()", False), ("1234/0", True), ("none", False),
    ],
)  # fmt: skip
def test_gsm8k_compares_the_first_number(said, right):
    doc = {"answer": "So it is 617 * 2 = <<617*2=1234>>1234.\n#### 1,234"}
    assert zeroeval.gsm8k(doc, [json.dumps({"answer": said})]) == {"acc": float(right), "no_answer": 0.0}


def test_no_answer_is_wrong_and_counted():
    doc = {"answer": "#### 1", "output": "1"}
    for score in (zeroeval.gsm8k, zeroeval.crux):
        assert score(doc, [""]) == {"acc": 0.0, "no_answer": 1.0}


@pytest.mark.parametrize(
    ("output", "said", "right"),
    [
        ("'bx'", "bx", True), ("'bx'", "'bx'", True), ("'bx'", '"bx"', True), ("'1'", "1", False), ("1", "1", True),
        ("1", 1, True), ("True", True, True), ("True", 1, False), ("1", "True", False), ("[(4, 1)]", "[(4,1)]", True),
        ("[1, 2]", [1, 2], True), ("(1, 2)", [1, 2], False), ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True),
        ("''", "", True), ("2", "1 + 1", False), ("3", "len('abc')", False), ("None", "None", True),
    ],
)  # fmt: skip
def test_crux_compares_values_and_runs_nothing(output, said, right):
    assert zeroeval.crux({"output": output}, [json.dumps({"answer": said})])["acc"] == float(right)


def test_crux_shows_the_function_and_its_input(asked, monkeypatch):
    prompts: list[str] = []

    def spy(model, tokens, *_):
        prompts.extend(asked.subject.tokenizer.decode(t) for t in tokens)
        return [None] * len(tokens)

    monkeypatch.setattr(lm_eval_adapter, "replies", spy)
    row = {"id": "sample_0", "code": "def f(d):\n    return {{**d}}['{%']", "input": "{'a': 1}", "output": "1"}
    found = measure_task(asked.subject, "crux", given(asked.folder, "crux", test=[row]))
    assert "[PYTHON]\ndef f(d):\n    return {{**d}}['{%']\nassert f({'a': 1}) == ??\n[/PYTHON]" in prompts[0]
    assert found.summary["no_answer"] == 1.0


def test_squad_scores_as_in_the_paper():
    doc = {"answers": {"text": ["the Eiffel Tower", "Eiffel Tower in Paris"], "answer_start": [0, 0]}}
    assert squad.score(doc, [" The Eiffel tower."]) == {"f1": 1.0, "exact": 1.0, "contains": 1.0}
    found = squad.score(doc, ["It is the Eiffel Tower"])
    assert found == {"f1": pytest.approx(2 * 2 / (4 + 2)), "exact": 0.0, "contains": 1.0}
    assert squad.score(doc, ["Eiffel Towers"]) == {"f1": pytest.approx(0.5), "exact": 0.0, "contains": 0.0}
    assert squad.score(doc, [""]) == {"f1": 0.0, "exact": 0.0, "contains": 0.0}


def test_ifeval_needs_no_download_and_says_the_same_every_time(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download was asked for"))
    doc = {
        "key": 1,
        "prompt": "…",
        "instruction_id_list": [
            "length_constraints:number_sentences",
            "change_case:capital_word_frequency",
            "language:response_language",
        ],
        "kwargs": [
            {"num_sentences": 3, "relation": "at least"},
            {"capital_frequency": 2, "capital_relation": "at least"},
            {"language": "en"},
        ],
    }
    reply = "Mr. Smith went to the U.S. of old. It was GOOD! Was it?"
    found = [ifeval.score(doc, [reply]) for _ in range(5)]
    assert all(f == found[0] for f in found)
    assert found[0]["inst_level_strict_acc"] == [True, True, True]
    fewer = ifeval.score(doc, ["Mr. Smith went home. It was good."])
    assert fewer["inst_level_strict_acc"] == [False, False, True]
    assert not fewer["prompt_level_strict_acc"]
