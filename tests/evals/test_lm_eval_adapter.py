import os
import socket

import pytest
from tiny_models import BYTE_VOCAB, byte_tokenizer, tiny

from evals import items, rows
from evals.items import Item
from evals.lm_eval_adapter import METRICS, evaluate_tasks
from evals.loglikelihood import loglikelihoods
from evals.stats import compare
from steps.config import BenchmarkConfig

ITEMS = [
    Item("a", "a", "Cooking: A man stirs the pot. He", ("eats.", "runs away from the burning house.", "sits"), 0),
    Item("b", "b", "Sport: They throw the ball and", (" laugh", "it lands far off"), 1),
    Item("c", "b", "Rain: It pours, so she opens", ("an umbrella", "soup", "the very long letter", "x"), 2),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def test_rows_equal_a_direct_computation(tokenizer, no_network):
    model = tiny(0, (0,), BYTE_VOCAB)
    found = rows.table(evaluate_tasks(model, tokenizer, {"hellaswag_100": ITEMS}, batch_size=4), "student")
    for item in ITEMS:
        pairs = [(tokenizer(item.query)["input_ids"], tokenizer(f" {c}")["input_ids"]) for c in item.choices]
        scores = [score for score, _ in loglikelihoods(model, pairs, 1)]
        normed = [score / len(c) for score, c in zip(scores, item.choices, strict=True)]
        part = found[found["item"] == item.id].set_index("metric")
        for metric, values in (("acc", scores), ("acc_norm", normed)):
            chosen = values.index(max(values))
            assert part.loc[metric, "response"] == item.choices[chosen]
            assert part.loc[metric, "score"] == float(chosen == item.gold)
    assert set(found["cluster"]) == {"a", "b"}
    assert (found["n"] == 1).all()
    assert rows.mean_scores(found, "hellaswag_100")["n"] == 3


def test_teacher_and_student_rows_pair_up(tokenizer, no_network):
    asked = [
        Item(f"i{k}", f"i{k}", f"Q: what is {k} and {k * 7}?\nA:", ("yes", "no", f"{k}"), k % 3) for k in range(12)
    ]
    teacher, student = (
        rows.table(evaluate_tasks(tiny(seed, layers, BYTE_VOCAB), tokenizer, {"truthfulqa_mc1_100": asked}, 8), name)
        for seed, layers, name in ((0, (0, 1), "teacher"), (1, (), "student"))
    )
    keys = ["item", "item_hash", "prompt_hash", "cluster", "metric", "n"]
    assert teacher[keys].equals(student[keys])
    assert teacher["item_hash"].nunique() == teacher["prompt_hash"].nunique() == 12
    found = compare(teacher, student, "truthfulqa_mc1_100", "acc", 0.02)
    assert found["n"] == 12
    assert found["difference"] == pytest.approx(student.score.mean() - teacher.score.mean())


def test_every_task_of_the_configuration_has_a_definition():
    allowed = BenchmarkConfig.model_fields["tasks"].annotation.__args__[0].__args__
    assert set(METRICS) == set(items.LOADERS) == set(allowed)


def test_an_item_may_have_a_metric_once():
    record = {"benchmark": "t", "item": "i", "item_hash": "h", "prompt_hash": "h", "cluster": "i", "metric": "acc",
              "score": 1, "n": 1, "response": ""}  # fmt: skip
    frame = rows.table([record], "teacher", run="7")
    assert list(frame.columns) == list(rows.COLUMNS)
    assert (frame.model[0], frame.run[0], frame.score.dtype.name, frame.n.dtype.name) == (
        "teacher", "7", "float64", "int64",
    )  # fmt: skip
    with pytest.raises(ValueError, match="item 'i' has metric 'acc' more than once"):
        rows.table([record, record], "teacher")
