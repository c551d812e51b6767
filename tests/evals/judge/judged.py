"""What the tests of the judge share: questions in few bytes, judges that do as told, subjects to measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals import rows
from evals.benchmark import Found, Subject
from evals.judge.answers import Answer
from evals.judge.data import Message, Prompt, Question

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import BYTE_VOCAB, byte_tokenizer, tiny

QUESTIONS = [
    Question("81", "writing", ("Hi?", "Why?"), None),
    Question("101", "math", ("1+1?", "And 2+2?"), ("Two.", "Four.")),
    Question("111", "math", ("2*3?", "Sure?"), ("Six.", "Yes.")),
]
SINGLE, MULTI = "Q: {question}\nA: {answer}", "{question_1}|{answer_1}|{question_2}|{answer_2}"
PAIR, PAIR_MULTI = "{question}\nA: {answer_a}\nB: {answer_b}", "{answer_a_1},{answer_a_2} or {answer_b_1},{answer_b_2}"
PROMPTS = {
    "single-v1": Prompt("", f"[[rating]] {SINGLE}"),
    "single-math-v1": Prompt("", f"[[rating]] {SINGLE} R: {{ref_answer_1}}"),
    "single-v1-multi-turn": Prompt("be fair", f"[[rating]] {MULTI}"),
    "single-math-v1-multi-turn": Prompt("be fair", f"[[rating]] {MULTI} R: {{ref_answer_1}} {{ref_answer_2}}"),
    "pair-v2": Prompt("[[A]]", PAIR),
    "pair-math-v1": Prompt("[[A]]", f"{PAIR} R: {{ref_answer_1}}"),
    "pair-v2-multi-turn": Prompt("[[A]]", PAIR_MULTI),
    "pair-math-v1-multi-turn": Prompt("[[A]]", f"{PAIR_MULTI} R: {{ref_answer_2}}"),
}
ALPACA = Prompt("", "{instruction}: m={output_1} M={output_2}")


class Scripted:
    """A judge that says what a function makes of a request's last message; `logprobs` of it as well, if given."""

    kind, model, hash, concurrency = "scripted", "one", "hash-1", 2

    def __init__(self, says: Callable[[str], Any], logprobs: Callable[[str], Any] | None = None):
        self.says, self.logprobs = says, logprobs
        self.asked: list[str] = []

    def complete(self, messages: Sequence[Message], max_tokens: int) -> str:
        return self._said(self.says, messages)

    def choice_logprobs(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        from evals.judge.backends import LogprobsUnavailable

        if self.logprobs is None:
            raise LogprobsUnavailable("words only")
        return self._said(self.logprobs, messages)

    def _said(self, says: Callable[[str], Any], messages: Sequence[Message]) -> Any:
        self.asked.append(messages[-1]["content"])
        said = says(messages[-1]["content"])
        if isinstance(said, Exception):
            raise said
        return said


def answers(name: str) -> dict[str, Answer]:
    """To both turns of QUESTIONS, of two tokens in the first turn and four in the second."""
    return {f"{q.id}/{t}": Answer(f"{name}{q.id}.{t}", 2 * t) for q in QUESTIONS for t in (1, 2)}


def quiet(share: float, phrase: str) -> None:
    assert 0.0 <= share <= 1.0


def subject(work: Path, seed: int = 0, teacher_rows: Path | None = None, **others: Any) -> Subject:
    work.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "name": "student" if teacher_rows else "teacher",
        "model": tiny(seed, (1,) if teacher_rows else (0, 1), BYTE_VOCAB),
        "tokenizer": byte_tokenizer(),
        "teacher": None,
        "corpus": work,
        "teacher_rows": teacher_rows,
        "seed": 0,
        "batch_size": 2,
        "train_length": 32,
        "work": work,
        "progress": quiet,
    }
    return Subject(**settings | others)


def kept(found: Found, name: str, folder: Path) -> Path:
    """The folder of a benchmark with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.table(found.records, name).to_parquet(folder / "rows.parquet", index=False)
    return folder


def scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {r["item"]: r["score"] for r in records}


def frame(found: Found, name: str) -> pd.DataFrame:
    return rows.table(found.records, name)
