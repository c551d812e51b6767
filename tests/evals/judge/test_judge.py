"""The judge as the benchmark stage calls it, on tiny models: teacher, then student."""

import json
import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import pytest
from endpoint import Endpoint, good
from judged import ALPACA, PROMPTS, QUESTIONS, frame, kept, scores, subject
from tiny_models import tiny

from corpora import chat
from evals import judge
from evals.comparison import compare_runs
from evals.head import EvaluationError
from evals.judge import data
from evals.judge.backends import JudgeError
from hybrid.generate import generate
from steps.config import ConfigError, JudgeConfig, parse_text

DELTAS = {"share": 0.1, "nats": 0.1, "points": 1.0}
TOKENS = 12
CONFIG = JudgeConfig(
    backend="fake", modes=["mt_bench", "pairwise", "alpaca"], answer_tokens=TOKENS, judgment_tokens=40, repeats=2
)


@pytest.fixture(autouse=True)
def short_questions(monkeypatch):
    monkeypatch.setattr(data, "questions", lambda count, seed: data.subset(QUESTIONS, count, f"mt_bench {seed}"))
    monkeypatch.setattr(data, "judge_prompts", lambda: PROMPTS)
    monkeypatch.setattr(data, "alpaca_prompt", lambda: ALPACA)


def _config(endpoint: Endpoint, **settings) -> JudgeConfig:
    own = {"backend": "openai", "model": "m", "base_url": endpoint.url, "repeats": 1, "concurrency": 3, "retries": 1}
    return CONFIG.model_copy(update={"modes": ["mt_bench", "pairwise"], **own, **settings})


def _rows(found, benchmark: str, metric: str) -> list[dict]:
    return [r for r in found.records if (r["benchmark"], r["metric"]) == (benchmark, metric)]


def test_teacher_and_student_are_judged_and_compared(tmp_path):
    told: list[float] = []
    teacher = judge.measure(subject(tmp_path / "t"), CONFIG)
    folder = kept(teacher, "teacher", tmp_path / "rows")
    measured = subject(tmp_path / "s", 1, folder, progress=lambda share, phrase: told.append(share))
    student = judge.measure(measured, CONFIG)

    assert set(teacher.summary) == {"judge", "answers", "mt_bench", "anchors"}, "a teacher has nobody beside it"
    assert set(student.summary) == {"judge", "answers", "mt_bench", "pairwise", "alpaca", "anchors"}
    assert student.summary["judge"] == teacher.summary["judge"]
    assert student.summary["judge"]["kind"] == "fake"
    assert student.summary["alpaca"]["reference"] == "teacher"
    assert student.summary["anchors"]["largest_change"] == 0.0
    assert student.summary["answers"]["n"] == 2 * len(QUESTIONS) + len(QUESTIONS)
    json.dumps([student.records, student.summary], allow_nan=False)
    assert told == sorted(told)
    assert told[-1] == 1.0

    compared = compare_runs(frame(teacher, "teacher"), frame(student, "student"), DELTAS)
    assert not compared.refused
    assert {line["benchmark"] for line in compared.comparisons} == {"mt_bench", "pairwise", "alpaca"}
    by_name = {line["benchmark"]: line for line in compared.comparisons}
    assert by_name["mt_bench"]["clusters"] == len(QUESTIONS)
    assert by_name["pairwise"]["student"] == pytest.approx(student.summary["pairwise"]["win_rate"])


def test_answers_are_the_models_own_and_the_second_follows_the_first(tmp_path):
    asked = subject(tmp_path)
    found = judge.measure(asked, CONFIG)
    answers = {r["item"]: r for r in _rows(found, "mt_bench", "answer_tokens")}
    assert len(answers) == 2 * len(QUESTIONS)
    for question in QUESTIONS:
        said: list[dict] = []
        for turn, text in enumerate(question.turns, 1):
            said.append({"role": "user", "content": text})
            rendered = chat.render(asked.tokenizer, said, generation_prompt=True)
            prompt = asked.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            reply = generate(asked.model, [prompt], TOKENS)[0]
            answer = answers[f"{question.id}/{turn}"]
            assert answer["response"] == asked.tokenizer.decode(reply, skip_special_tokens=True).strip()
            assert answer["score"] == len(reply)
            said.append({"role": "assistant", "content": answer["response"]})


def test_another_judge_is_refused_in_a_comparison(tmp_path):
    teacher = judge.measure(subject(tmp_path / "t"), CONFIG)
    folder = kept(teacher, "teacher", tmp_path / "rows")
    with Endpoint(lambda n, body: good("[[A]]" if "[[A]]" in str(body) else "[[5]]")) as endpoint:
        student = judge.measure(subject(tmp_path / "s", 1, folder), _config(endpoint))
    compared = compare_runs(frame(teacher, "teacher"), frame(student, "student"), DELTAS)
    assert [line["benchmark"] for line in compared.comparisons] == ["pairwise"]
    assert [(r["benchmark"], "judge" in r["reason"]) for r in compared.refused] == [("mt_bench", True)]
    assert student.summary["anchors"]["stored_mean"] is None


def test_a_mode_that_was_hardly_read_has_figures_but_no_rows(tmp_path, caplog):
    """Otherwise two models whose judgments nobody could read would be found to be alike."""
    with Endpoint(lambda n, body: good("[[A]]" if "[[A]]" in str(body) else "I cannot say.")) as endpoint:
        found = judge.measure(subject(tmp_path), _config(endpoint))
    assert not _rows(found, "mt_bench", "score")
    assert len(_rows(found, "mt_bench", "answer_tokens")) == 6
    figures = found.summary["mt_bench"]
    assert (figures["readable"], figures["failed"], figures["judged"]) == (False, 6, 6)
    assert (figures["worst"], figures["best"]) == (1.0, 10.0)
    assert "6 of 6 judgments hold no verdict" in caplog.text
    # Nor are the middle marks of stored answers kept, from which no later judgment could be seen to drift.
    assert not _rows(found, "anchors", "score")
    anchors = found.summary["anchors"]
    assert (anchors["readable"], anchors["failed"], anchors["judged"]) == (False, 20, 20)


def test_a_teacher_that_was_asked_otherwise_is_named(tmp_path):
    teacher = judge.measure(subject(tmp_path / "t"), CONFIG.model_copy(update={"answer_tokens": TOKENS - 1}))
    folder = kept(teacher, "teacher", tmp_path / "rows")
    with pytest.raises(EvaluationError, match="no answer to item 81/1 as the student was asked it.*benchmark_teacher"):
        judge.measure(subject(tmp_path / "s", 1, folder), CONFIG)


def test_a_third_models_outputs_are_the_reference_for_both(tmp_path):
    records = [{"instruction": f"Say {i}", "output": f"out {i}"} for i in range(6)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    config = CONFIG.model_copy(
        update={"modes": ["alpaca"], "alpaca": f"file:{tmp_path / 'alpaca.json'}", "alpaca_prompts": 4}
    )
    teacher = judge.measure(subject(tmp_path / "t"), config)
    student = judge.measure(subject(tmp_path / "s", 1, kept(teacher, "teacher", tmp_path / "rows")), config)
    assert set(teacher.summary) == {"judge", "answers", "alpaca", "anchors"}
    assert teacher.summary["alpaca"]["reference"] == config.alpaca
    rows = [scores(_rows(found, "alpaca", "preference")) for found in (teacher, student)]
    assert len(rows[0]) == 4
    assert rows[0].keys() == rows[1].keys()
    assert not compare_runs(frame(teacher, "teacher"), frame(student, "student"), DELTAS).refused


@pytest.mark.parametrize(
    ("records", "message"),
    [([{"prompt": "a"}], "an `instruction`"), ([{"instruction": "a", "output": "b"}, {"instruction": "c"}], "1 of 2")],
)
def test_records_of_another_form_are_refused(tmp_path, records, message):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(EvaluationError, match=message):
        data.instructions(f"file:{tmp_path / 'a.jsonl'}", 0, 0)


def test_an_answer_beyond_the_context_is_refused_with_the_setting(tmp_path):
    with pytest.raises(EvaluationError, match="context of 256; lower benchmark.judge.answer_tokens"):
        judge.measure(subject(tmp_path), CONFIG.model_copy(update={"answer_tokens": 250}))
    asked = subject(tmp_path)
    short = tiny(2, (0, 1))
    short.config = replace(short.config, max_position_embeddings=16)
    with pytest.raises(EvaluationError, match="context of 16; lower benchmark.judge.answer_tokens"):
        judge.measure(replace(asked, teacher=short), CONFIG)


def test_rows_of_answers_show_the_question(tmp_path):
    found = judge.measure(subject(tmp_path), CONFIG)
    asked = {r["item"]: r["prompt"] for r in _rows(found, "mt_bench", "answer_tokens")}
    assert asked == {f"{q.id}/{turn}": text for q in QUESTIONS for turn, text in enumerate(q.turns, 1)}
    assert {r["prompt"] for r in _rows(found, "mt_bench", "score")} == {""}


def test_requests_go_out_several_at_a_time_and_never_more_than_allowed(tmp_path):
    together = threading.Barrier(3)  # broken, and so is the test, if the first three do not come at once

    def says(number, body):
        if number < 3:
            together.wait(10)
        return good("[[5]]")

    with Endpoint(says) as endpoint:
        judge.measure(subject(tmp_path), _config(endpoint))
    assert endpoint.most_at_once == 3


@pytest.mark.parametrize("temperatures", ["greedy", "mt_bench"])
def test_a_judge_that_fails_midway_is_asked_only_for_the_rest(tmp_path, temperatures):
    """The judgments that were paid for, and the answers, are those of the first attempt; the result is as if
    undisturbed."""

    expired = False

    def says(number, body):
        if expired and number >= 10:
            return 401, {}, b"key expired"
        return good(f"[[{1 + len(body['messages'][-1]['content']) % 10}]]")

    with Endpoint(says) as endpoint:
        config = _config(endpoint, temperatures=temperatures)
        undisturbed = judge.measure(subject(tmp_path / "u"), config)
        needed = len(endpoint.requests)
        endpoint.requests.clear()
        expired = True
        with pytest.raises(JudgeError, match="key expired"):
            judge.measure(subject(tmp_path / "w"), config)
        judged = (tmp_path / "w" / "judgments.jsonl").read_bytes().count(b"\n")
        assert judged == 10
        answers = (tmp_path / "w" / "answers.jsonl").read_bytes()
        expired = False
        endpoint.requests.clear()
        resumed = judge.measure(subject(tmp_path / "w"), config)
        assert len(endpoint.requests) == needed - judged
    assert (tmp_path / "w" / "answers.jsonl").read_bytes() == answers, "nothing was answered twice"
    assert resumed.summary == undisturbed.summary
    assert resumed.records == undisturbed.records


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """SIGKILL comes while the judge is being asked."""
    killed: list[int] = []

    def says(number, body):
        if number >= 12 and killed:
            os.kill(killed.pop(), signal.SIGKILL)
        return good("[[6]]")

    with Endpoint(says) as endpoint:
        config = _config(endpoint)
        child = multiprocessing.get_context("fork").Process(
            target=judge.measure, args=(subject(tmp_path), config), daemon=True
        )
        child.start()
        killed.append(child.pid)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        before = len(endpoint.requests)
        lines = (tmp_path / "judgments.jsonl").read_bytes().count(b"\n")
        found = judge.measure(subject(tmp_path), config)
        needed = 2 * len(QUESTIONS) + 20
        assert len(endpoint.requests) - before == needed - lines
    assert lines >= 12 - config.concurrency
    assert found.summary["mt_bench"]["n"] == 2 * len(QUESTIONS)
    assert found.summary["mt_bench"]["mean"] == 6.0


def test_a_sampled_answer_survives_a_cut_off_batch(tmp_path):
    """Half of a batch was written down: the other half is what it would have been."""
    config = CONFIG.model_copy(update={"modes": ["mt_bench"], "temperatures": "mt_bench"})
    writing = [data.Question(str(i), "writing", (f"{i}?", "So?"), None) for i in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "questions", lambda count, seed: writing)
        whole = judge.measure(subject(tmp_path), config)
        path = tmp_path / "answers.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:3]), encoding="utf-8")
        again = judge.measure(subject(tmp_path), config)
    assert again.records == whole.records
    assert len({r["response"] for r in _rows(whole, "mt_bench", "answer_tokens")}) > 4, "sampled, so hardly twice alike"


def test_the_configuration_says_what_a_backend_needs():
    base = '[teacher]\nsource = "file:t"\n[corpus]\nsources = ["file:c"]\n[variants.a]\n[benchmark.judge]\n'
    assert not parse_text(base).benchmark.judge.enabled
    for text, missing in (('backend = "openai"\nmodel = "m"', "base_url"), ('backend = "hf"', "source")):
        with pytest.raises(ConfigError, match=f"benchmark.judge: backend .* needs {missing}"):
            parse_text(base + text)
    with pytest.raises(ConfigError, match=r"benchmark\.judge\.source"):
        parse_text(f'{base}backend = "hf"\nsource = "model"')
    good = parse_text(f'{base}backend = "openai"\nmodel = "m"\nbase_url = "http://h/v1"\nparameters = {{ top_k = 1 }}')
    assert good.benchmark.judge.enabled
    assert good.benchmark.judge.parameters == {"top_k": 1}


def test_sources_are_those_that_the_modes_read():
    assert data.sources(JudgeConfig()) == []
    chat_only = data.sources(JudgeConfig(backend="hf", source="file:m"))
    assert chat_only == [data.QUESTIONS, data.REFERENCES, data.JUDGE_PROMPTS, "file:m"]
    everything = data.sources(CONFIG.model_copy(update={"alpaca": "file:a"}))
    assert {data.ALPACA_PROMPT, "file:a"} <= set(everything)
