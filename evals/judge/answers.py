"""The measured model's answers, decoded greedily or at MT-Bench's temperatures, and the teacher's from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from corpora import chat
from evals.benchmark import Subject
from evals.head import EvaluationError
from evals.judge.data import Instruction, Message, Question, content_hash, row
from evals.judge.judgments import Progress
from evals.judge.ledger import Ledger
from hybrid.engine import DecodeEngine, Sampling

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's by category; all others are greedy."""
METRIC = "answer_tokens"


@dataclass(frozen=True)
class Answer:
    """tokens: its length, the end of turn included."""

    text: str
    tokens: int


class Answers:
    """Answers to single turns by conversation, kept as they come."""

    def __init__(self, subject: Subject, ledger: Ledger, max_tokens: int):
        self.subject, self.ledger, self.max_tokens = subject, ledger, max_tokens

    def give(
        self,
        conversations: Sequence[Sequence[Message]],
        temperatures: Sequence[float],
        progress: Progress,
    ) -> list[Answer]:
        """The next message of each conversation, at its temperature (0 is greedy).

        Batches are those of all conversations, whether some are known or not, because what is sampled depends on the
        whole batch: a run that was cut off goes on as if it had not been. Raises EvaluationError where a conversation
        and its answer exceed the context of the model or its teacher.
        """
        prompts = [self._prompt(messages) for messages in conversations]
        keys = [
            content_hash(self.subject.name, prompt, self.max_tokens, t, self.subject.seed)
            for prompt, t in zip(prompts, temperatures, strict=True)
        ]
        order = sorted(range(len(prompts)), key=lambda i: (temperatures[i], -len(prompts[i])))
        done = 0
        for temperature in sorted(set(temperatures)):
            chosen = [i for i in order if temperatures[i] == temperature]
            size = min(self.subject.batch_size, len(chosen))
            engine = None
            for at in range(0, len(chosen), size):
                batch = chosen[at : at + size]
                if any(keys[i] not in self.ledger.found for i in batch):
                    if engine is None:
                        length = len(prompts[batch[0]]) + self.max_tokens
                        sampling = Sampling(temperature)
                        engine = DecodeEngine(self.subject.model, batch=size, max_length=length, sampling=sampling)
                    seed = self.subject.seed + at
                    replies = engine.generate([prompts[i] for i in batch], self.max_tokens, seed=seed).replies
                    for i, reply in zip(batch, replies, strict=True):
                        text = str(self.subject.tokenizer.decode(reply, skip_special_tokens=True)).strip()
                        self.ledger.add(keys[i], [text, len(reply)])
                done += len(batch)
                progress(done / len(prompts), f"{done} of {len(prompts)} answered")
        return [Answer(*self.ledger.found[key]) for key in keys]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        text = chat.render(self.subject.tokenizer, messages, generation_prompt=True)
        ids = self.subject.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = self.subject.context
        if len(ids) + self.max_tokens > limit:
            raise EvaluationError(
                f"judge: a question of {len(ids)} tokens and an answer of {self.max_tokens} exceed the context of "
                f"{limit}; lower benchmark.judge.answer_tokens"
            )
        return ids


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def to_questions(
    answers: Answers, questions: Sequence[Question], temperatures: str, progress: Progress
) -> dict[str, Answer]:
    """{"81/1": answer, "81/2": …}: both turns of every question, the second after the model's own first answer."""
    degrees = [TEMPERATURES.get(q.category, 0.0) if temperatures == "mt_bench" else 0.0 for q in questions]
    first = answers.give([[user(q.turns[0])] for q in questions], degrees, lambda share, p: progress(share / 2, p))
    second = answers.give(
        [[user(q.turns[0]), assistant(a.text), user(q.turns[1])] for q, a in zip(questions, first, strict=True)],
        degrees,
        lambda share, p: progress(0.5 + share / 2, p),
    )
    return {
        f"{q.id}/{turn}": answer
        for q, *both in zip(questions, first, second, strict=True)
        for turn, answer in enumerate(both, 1)
    }


def to_instructions(answers: Answers, instructions: Sequence[Instruction], progress: Progress) -> dict[str, Answer]:
    """{instruction's id: greedy answer}."""
    found = answers.give([[user(i.text)] for i in instructions], [0.0] * len(instructions), progress)
    return {i.id: answer for i, answer in zip(instructions, found, strict=True)}


def question_hashes(question: Question, turn: int, *how: Any) -> dict[str, str]:
    """item_hash of the question and its references; prompt_hash of that and of `how` it is answered or judged."""
    item = content_hash(question.turns[:turn], question.references)
    return {"item_hash": item, "prompt_hash": content_hash(item, *how)}


def instruction_hashes(instruction: Instruction, *how: Any) -> dict[str, str]:
    item = content_hash(instruction.text, instruction.output)
    return {"item_hash": item, "prompt_hash": content_hash(item, *how)}


def question_rows(questions: Sequence[Question], answers: Mapping[str, Answer], *how: Any) -> list[dict[str, Any]]:
    """Rows METRIC of the answers to both turns of every question. how: they were made."""
    return [
        row("mt_bench", f"{q.id}/{turn}", q.id, question_hashes(q, turn, *how), METRIC, said.tokens, said.text, asked)
        for q in questions
        for turn, asked in enumerate(q.turns, 1)
        for said in (answers[f"{q.id}/{turn}"],)
    ]


def instruction_rows(
    instructions: Sequence[Instruction], answers: Mapping[str, Answer], *how: Any
) -> list[dict[str, Any]]:
    """Rows METRIC of the answers to instructions. how: they were made."""
    return [
        row("alpaca", i.id, i.id, instruction_hashes(i, *how), METRIC, answers[i.id].tokens, answers[i.id].text, i.text)
        for i in instructions
    ]


def teachers(subject: Subject, benchmark: str, own: Sequence[Mapping[str, Any]]) -> dict[str, Answer]:
    """The teacher's answers by item from its own benchmark, to what the student's rows `own` answer.

    Raises EvaluationError where the teacher was not asked the same.
    """
    assert subject.teacher_rows is not None
    frame = pd.read_parquet(subject.teacher_rows / "rows.parquet")
    rows = frame[(frame.benchmark == benchmark) & (frame.metric == METRIC)].set_index("item")
    found = {}
    for item, prompt_hash in ((r["item"], r["prompt_hash"]) for r in own):
        if item not in rows.index or rows.prompt_hash[item] != prompt_hash:
            raise EvaluationError(
                f"{benchmark}: the teacher's benchmark holds no answer to item {item} as the student was asked it; "
                "recompute it with --force benchmark_teacher"
            )
        found[item] = Answer(str(rows.response[item]), int(rows.score[item]))
    return found
