import json
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import BYTE_VOCAB, byte_tokenizer, subject_of, tiny

from evals import data, lm_eval_adapter, rows
from evals.calibration import of_task
from evals.head import EvaluationError
from evals.lm_eval_adapter import measure_task
from evals.loglikelihood import loglikelihoods
from evals.stats import NotComparable, compare
from evals.tasks import TASKS

ITEMS = [
    {"id": "a", "cluster": "a", "query": "Cooking: A man stirs the pot. He",
     "choices": ["eats.", "runs away from the burning house.", "sits"], "gold": 0},
    {"id": "b", "cluster": "b", "query": "Sport: They throw the ball and", "choices": [" laugh", "it lands far off"],
     "gold": 1},
    {"id": "c", "cluster": "b", "query": "Rain: It pours, so she opens",
     "choices": ["an umbrella", "soup", "the very long letter", "x"], "gold": 2},
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    data: dict[str, str] = field(default_factory=dict)
    items_per_task: int = 0
    max_new_tokens: int = 0


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def written(path: Path, items: list[dict]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return f"file:{path}"


def subject(tokenizer, folder: Path, weights: int = 0, attention: tuple[int, ...] = (0,), **changes):
    made = subject_of(tiny(weights, attention, BYTE_VOCAB), None, folder)
    return replace(made, tokenizer=tokenizer, **changes)


def test_rows_equal_a_direct_computation(tokenizer, tmp_path):
    asked = subject(tokenizer, tmp_path, batch_size=4)
    settings = Settings({"hellaswag_100": written(tmp_path / "items.jsonl", ITEMS)})
    measured = measure_task(asked, "hellaswag_100", settings)
    found = rows.table(measured.records, "student")
    for item in ITEMS:
        query = tokenizer(item["query"])["input_ids"]
        pairs = [(query, tokenizer(f" {c}")["input_ids"]) for c in item["choices"]]
        scores = np.array([score for score, _ in loglikelihoods(asked.model, pairs, 1)])
        normed = scores / [len(c) for c in item["choices"]]
        part = found[found["item"] == item["id"]].set_index("metric")
        for metric, values in (("acc", scores), ("acc_norm", normed)):
            chosen = int(values.argmax())
            assert part.loc[metric, "response"] == item["choices"][chosen]
            assert part.loc[metric, "score"] == float(chosen == item["gold"])
        probabilities = np.exp(scores) / np.exp(scores).sum()
        assert part.loc["confidence", "score"] == pytest.approx(probabilities.max(), rel=1e-4)
    assert set(found["cluster"]) == {"a", "b"}
    assert (found["n"] == 1).all()
    means = found.groupby("metric").score.mean()
    assert measured.summary["acc"] == pytest.approx(means["acc"])
    assert measured.summary["n"] == 3
    assert measured.summary["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    assert "too_long" not in measured.summary
    assert of_task(found, "hellaswag_100")["bins"][0]["n"] >= 1
    json.dumps(measured.summary)


def test_teacher_and_student_rows_pair_up(tokenizer, tmp_path):
    asked = [
        {"id": f"i{k}", "cluster": f"i{k}", "query": f"Q: what is {k} and {k * 7}?\nA:",
         "choices": ["yes", "no", f"{k}"], "gold": k % 3}
        for k in range(20)
    ]  # fmt: skip
    settings = Settings({"truthfulqa_mc1_100": written(tmp_path / "items.jsonl", asked)}, items_per_task=12)
    teacher, student = (
        rows.table(
            measure_task(subject(tokenizer, tmp_path, seed, layers, seed=5), "truthfulqa_mc1_100", settings).records,
            name,
        )
        for seed, layers, name in ((0, (0, 1), "teacher"), (1, (), "student"))
    )
    keys = ["item", "item_hash", "prompt_hash", "cluster", "metric", "n"]
    assert teacher[keys].equals(student[keys])
    assert teacher["item_hash"].nunique() == teacher["prompt_hash"].nunique() == 12
    found = compare(teacher, student, "truthfulqa_mc1_100", "acc", 0.02)
    assert found["n"] == 12
    acc = [frame[frame.metric == "acc"].score.mean() for frame in (teacher, student)]
    assert found["difference"] == pytest.approx(acc[1] - acc[0])


def test_another_seed_asks_other_items(tokenizer, tmp_path):
    settings = Settings(items_per_task=4)
    a, again, b = (
        {r["item"] for r in measure_task(subject(tokenizer, tmp_path, seed=seed), "mmlu_dev", settings).records}
        for seed in (0, 0, 1)
    )
    assert a == again != b
    assert len(a) == 4


SQUAD = [
    {"id": f"q{k}", "title": "Rivers" if k < 3 else "Hills", "context": f"The Po is {k} miles long." + " So it is." * k,
     "question": "How long is it?", "answers": {"text": [f"{k} miles", f"{k} miles long"], "answer_start": [10, 10]}}
    for k in range(5)
]  # fmt: skip


def test_replies_do_not_depend_on_the_batch_and_end_at_a_stop_text(tokenizer, tmp_path):
    settings = Settings({"squad": written(tmp_path / "squad.jsonl", SQUAD)}, max_new_tokens=24)
    one, many = (
        measure_task(subject(tokenizer, tmp_path, 3, (1,), batch_size=size), "squad", settings) for size in (1, 5)
    )
    assert one == many
    assert {r["cluster"] for r in one.records} == {"Rivers", "Hills"}
    assert [r["metric"] for r in one.records[:3]] == ["f1", "exact", "contains"]
    assert not any("\n" in r["response"] for r in one.records)
    assert len({r["response"] for r in one.records}) > 1
    assert one.summary["harness"]["new_tokens"] == 24
    shorter = measure_task(subject(tokenizer, tmp_path, 3, (1,)), "squad", replace(settings, max_new_tokens=2))
    assert not {r["prompt_hash"] for r in shorter.records} & {r["prompt_hash"] for r in one.records}


def test_a_reply_is_scored_by_the_words_before_the_stop(tokenizer, tmp_path, monkeypatch):
    texts = ["It is 0 miles.\nNo: 7", " 1 miles", "", "none", "4 miles long\n"]
    said = [tokenizer(t)["input_ids"] for t in texts]
    monkeypatch.setattr(lm_eval_adapter, "replies", lambda *_: [*said[:2], None, *said[3:]])
    settings = Settings({"squad": written(tmp_path / "squad.jsonl", SQUAD)})
    found = measure_task(subject(tokenizer, tmp_path), "squad", settings)
    scores = {(r["item"], r["metric"]): r["score"] for r in found.records}
    assert [scores[f"q{k}", "exact"] for k in range(5)] == [0, 1, 0, 0, 1]
    assert [scores[f"q{k}", "contains"] for k in range(5)] == [1, 1, 0, 0, 1]
    assert scores["q0", "f1"] == pytest.approx(2 * 2 / (4 + 2))
    assert found.summary["exact"] == pytest.approx(0.4)
    assert found.summary["too_long"] == 1
    assert found.summary["chance"] is None


def test_a_prompt_that_does_not_fit_is_counted_and_never_cut(tokenizer, tmp_path, caplog):
    long = [{**SQUAD[0], "id": "long", "context": "x" * 400}, SQUAD[1]]
    settings = Settings({"squad": written(tmp_path / "squad.jsonl", long)}, max_new_tokens=8)
    found = measure_task(subject(tokenizer, tmp_path), "squad", settings)
    assert found.summary["too_long"] == 1
    assert [r["response"] for r in found.records if r["item"] == "long"] == ["", "", ""]
    assert "1 of 2 items have more tokens than the context of 256: they count as without a reply" in caplog.text


def test_teacher_and_student_have_the_smaller_of_their_contexts(tokenizer, tmp_path):
    asked = subject(tokenizer, tmp_path)
    short = tiny(1, (0, 1), BYTE_VOCAB)
    short.config = replace(short.config, max_position_embeddings=64)
    settings = Settings({"hellaswag_100": written(tmp_path / "i.jsonl", [{**ITEMS[0], "query": "y" * 100}, ITEMS[1]])})
    assert "too_long" not in measure_task(asked, "hellaswag_100", settings).summary
    assert measure_task(replace(asked, teacher=short), "hellaswag_100", settings).summary["too_long"] == 1


def test_a_chat_task_is_put_into_the_template_once(tokenizer, tmp_path, monkeypatch):
    seen = []

    def spy(model, prompts, limit, *_):
        seen.extend((tokenizer.decode(p), limit) for p in prompts)
        return [tokenizer('{"answer": "5"}')["input_ids"]] * len(prompts)

    monkeypatch.setattr(lm_eval_adapter, "replies", spy)
    row = {"question": "What is 2 and 3?", "answer": "2+3=5\n#### 5"}
    settings = Settings({"gsm8k": written(tmp_path / "gsm8k.jsonl", [row])})
    found = measure_task(subject(tokenizer, tmp_path), "gsm8k", settings)
    ((prompt, limit),) = seen
    assert prompt.startswith("<|im_start|>user\n## Question: \n\nWhat is 2 and 3?\n\n\n## Instruction")
    assert prompt.endswith('"answer": "___"\n}\n```<|im_end|>\n<|im_start|>assistant\n')
    assert prompt.count("<|im_start|>") == 2
    assert limit == 1024
    assert (found.summary["acc"], found.summary["no_answer"]) == (1.0, 0.0)
    assert found.summary["harness"]["chat_template"]


def test_instructions_weigh_the_same_whatever_prompt_they_are_of(tokenizer, tmp_path, monkeypatch):
    asked = [
        {"key": 1, "prompt": "Say a and b.", "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
         "kwargs": [{}, {"keywords": ["zebra"]}]},
        {"key": 2, "prompt": "No comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]  # fmt: skip
    monkeypatch.setattr(lm_eval_adapter, "replies", lambda *_: [tokenizer("Hello.")["input_ids"]] * 2)
    settings = Settings({"ifeval": written(tmp_path / "ifeval.jsonl", asked)})
    found = measure_task(subject(tokenizer, tmp_path), "ifeval", settings)
    assert found.summary["prompt_level_strict_acc"] == 0.5
    assert found.summary["inst_level_strict_acc"] == pytest.approx(2 / 3)
    of_first = {r["metric"]: (r["score"], r["n"]) for r in found.records if r["item"] == "1"}
    assert of_first["inst_level_strict_acc"] == (0.5, 2)
    assert of_first["prompt_level_strict_acc"] == (0.0, 1)


def test_evaluation_is_offline_and_leaves_the_environment_as_it_was(tokenizer, tmp_path, monkeypatch):
    seen = {}
    plain = lm_eval_adapter.evaluate

    def spy(*arguments, **options):
        seen.update({n: os.environ.get(n) for n in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")})
        return plain(*arguments, **options)

    monkeypatch.setattr(lm_eval_adapter, "evaluate", spy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    settings = Settings({"hellaswag_100": written(tmp_path / "items.jsonl", ITEMS)})
    measure_task(subject(tokenizer, tmp_path), "hellaswag_100", settings)
    assert seen == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "HF_DATASETS_OFFLINE" not in os.environ


def test_another_version_of_a_task_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "piqa", replace(TASKS["piqa"], version="0.9"))
    row = {"goal": "Dry it.", "sol1": "Wait.", "sol2": "Wet it.", "label": 0}
    with pytest.raises(EvaluationError, match=r"piqa: lm-eval .* has version 1.0 of this task.*version 0.9"):
        measure_task(subject(tokenizer, tmp_path), "piqa", Settings({"piqa": written(tmp_path / "p.jsonl", [row])}))


def test_what_is_missing_is_named_with_the_command_that_fetches_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data.datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(EvaluationError) as error:
        measure_task(subject(tokenizer, tmp_path), "piqa", Settings())
    assert f"{tmp_path}/cache/hub/baber--piqa/142f6d7367fd9877f0fb3b5734ea6a545f54cdd1/default/validation.parquet" in (
        text := str(error.value)
    )
    assert "python -m steps.prefetch" in text
    assert "benchmark.data.piqa" in text


def test_what_one_model_read_more_of_than_the_other_is_not_compared(tokenizer, tmp_path):
    """The teacher is measured before there is a student, with all of its own context."""
    asked = [{**ITEMS[0], "query": "y" * 100}, *ITEMS[1:]]
    settings = Settings({"hellaswag_100": written(tmp_path / "i.jsonl", asked)})
    teacher = subject(tokenizer, tmp_path)
    model = tiny(1, (1,), BYTE_VOCAB)
    model.config = replace(model.config, max_position_embeddings=64)
    student = replace(teacher, name="student", model=model, teacher=teacher.model)
    of_teacher, of_student = (
        rows.table(measure_task(s, "hellaswag_100", settings).records, s.name) for s in (teacher, student)
    )
    with pytest.raises(NotComparable, match="prompt_hash differs on 1 of 3 items, first 'a'"):
        compare(of_teacher, of_student, "hellaswag_100", "acc", 0.02)
    model.config = replace(model.config, max_position_embeddings=256)
    of_student = rows.table(measure_task(student, "hellaswag_100", settings).records, "student")
    assert compare(of_teacher, of_student, "hellaswag_100", "acc", 0.02)["n"] == 3


def test_rows_show_what_was_asked_once_an_item(tokenizer, tmp_path, monkeypatch):
    long = {**ITEMS[0], "query": "Start. " + "so " * 200 + "and he"}
    asked = subject(tokenizer, tmp_path)
    asked.model.config = replace(asked.model.config, max_position_embeddings=2048)
    choices = Settings({"hellaswag_100": written(tmp_path / "items.jsonl", [long, *ITEMS[1:]])})
    found = measure_task(asked, "hellaswag_100", choices).records
    shown = {(r["item"], r["metric"]): r["prompt"] for r in found}
    assert shown["b", "acc_norm"] == "Sport: They throw the ball and"
    assert shown["b", "acc"] == shown["b", "confidence"] == ""
    assert len(shown["a", "acc_norm"]) == 300
    assert shown["a", "acc_norm"].startswith("…") and shown["a", "acc_norm"].endswith("so and he")
    monkeypatch.setattr(lm_eval_adapter, "replies", lambda *_: [tokenizer("5")["input_ids"]])
    problem = Settings({"gsm8k": written(tmp_path / "g.jsonl", [{"question": "What is 2 + 3?", "answer": "#### 5"}])})
    assert [r["prompt"] for r in measure_task(asked, "gsm8k", problem).records] == ["What is 2 + 3?", ""]
