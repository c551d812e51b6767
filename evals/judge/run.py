"""All that the judge is asked about one model: its answers first, then the modes, then the anchors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evals.benchmark import Found, Subject
from evals.judge import alpaca, anchors, backends, data, mt_bench, pairwise
from evals.judge.answers import (
    Answer,
    Answers,
    instruction_rows,
    question_rows,
    teachers,
    to_instructions,
    to_questions,
)
from evals.judge.judgments import Judgments, Progress
from evals.judge.ledger import Ledger

logger = logging.getLogger(__name__)

BY_QUESTION = {"mt_bench", "pairwise"}
"""Modes that judge both turns of MT-Bench's questions."""
MOST_UNREAD = 0.1
"""Share of judgments without a verdict up to which a mode gives rows. Each counts as the middle of the scale, so many
would make any two models alike, and a student non-inferior."""
REMEDY = "Take a judge that keeps to the form that it is asked for, or raise benchmark.judge.judgment_tokens."


def measure(subject: Subject, config: Any) -> Found:
    """Rows and figures of the modes that a `steps.config.JudgeConfig` asks for.

    Rows "answer_tokens" hold the model's own answers, which a student's benchmark reads from its teacher's. Answers and
    judgments are kept in the subject's work folder as they come, so that what was paid for is not asked for again.
    Where the teacher itself is measured, what needs a student beside it is left out. A mode in which more than
    MOST_UNREAD of the judgments hold no verdict is not `readable`: it has figures, but no rows to compare. Raises
    JudgeError where the judge cannot be asked, SourceError where data are missing.
    """
    judge = backends.make(config, subject.model.device, subject.model.dtype)
    drawn = data.questions(config.questions, subject.seed)
    questions = drawn if BY_QUESTION & set(config.modes) else []
    instructions = _instructions(config, drawn, subject.seed) if "alpaca" in config.modes else []
    prompts, tokens = data.judge_prompts(), config.judgment_tokens
    modes = _modes(subject, config, instructions)
    calls = {"mt_bench": 2 * len(questions), "pairwise": 4 * len(questions), "alpaca": 2 * len(instructions)}
    parts = _Parts(
        subject.progress,
        {"questions": 2 * len(questions), "instructions": len(instructions)}
        | {mode: config.repeats * count for mode, count in calls.items() if mode in modes}
        | {"anchors": config.repeats * anchors.COUNT},
    )
    with Ledger(subject.work / "answers.jsonl") as given, Ledger(subject.work / "judgments.jsonl") as judged:
        answers = Answers(subject, given, config.answer_tokens)
        by_turn = to_questions(answers, questions, config.temperatures, parts.of("questions"))
        by_instruction = to_instructions(answers, instructions, parts.of("instructions"))
        to_all = question_rows(questions, by_turn, config.answer_tokens, config.temperatures)
        to_each = instruction_rows(instructions, by_instruction, config.answer_tokens)
        found = Found(
            to_all + to_each,
            {
                "judge": {"kind": judge.kind, "model": judge.model, "hash": judge.hash},
                "answers": _figures([*by_turn.values(), *by_instruction.values()], config),
            },
        )

        def keep(name: str, measured: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
            records, figures = measured
            readable = figures["failed"] <= MOST_UNREAD * figures["judged"]
            found.summary[name] = figures | {"readable": readable}
            if readable:
                found.records += records
            else:
                unread = f"{figures['failed']} of {figures['judged']}"
                logger.warning("%s: %s judgments hold no verdict; its rows are left out. %s", name, unread, REMEDY)

        judgments = Judgments(judge, judged, config.repeats)
        if "mt_bench" in modes:
            progress = parts.of("mt_bench")
            keep("mt_bench", mt_bench.measure(judgments, questions, by_turn, prompts, tokens, progress))
        if "pairwise" in modes:
            theirs, progress = teachers(subject, "mt_bench", to_all), parts.of("pairwise")
            keep("pairwise", pairwise.measure(judgments, questions, by_turn, theirs, prompts, tokens, progress))
        if "alpaca" in modes:
            others = {i.id: i.output for i in instructions}
            if not _has_outputs(instructions):
                others = {item: answer.text for item, answer in teachers(subject, "alpaca", to_each).items()}
            prompt, progress = data.alpaca_prompt(), parts.of("alpaca")
            figures = alpaca.measure(judgments, instructions, by_instruction, others, prompt, progress, subject.seed)
            keep("alpaca", figures)
            found.summary["alpaca"]["reference"] = config.alpaca if _has_outputs(instructions) else "teacher"
        stored, progress = subject.teacher_rows, parts.of("anchors")
        keep("anchors", anchors.measure(judgments, prompts["single-v1"], tokens, stored, progress))
    return found


def _instructions(config: Any, questions: Sequence[data.Question], seed: int) -> list[data.Instruction]:
    if config.alpaca:
        return data.instructions(config.alpaca, config.alpaca_prompts, seed)
    openings = [data.Instruction(q.id, q.turns[0], "") for q in questions]
    return data.subset(openings, config.alpaca_prompts, f"alpaca {seed}")


def _has_outputs(instructions: Sequence[data.Instruction]) -> bool:
    return bool(instructions and instructions[0].output)


def _modes(subject: Subject, config: Any, instructions: Sequence[data.Instruction]) -> set[str]:
    """Those of the modes asked for that have something to compare the model with."""
    alone = {"mt_bench", "alpaca"} if _has_outputs(instructions) else {"mt_bench"}
    return set(config.modes) & (alone if subject.teacher_rows is None else {*BY_QUESTION, "alpaca"})


def _figures(answers: Sequence[Answer], config: Any) -> dict[str, Any]:
    """`cut`: share of the answers that are as long as is allowed."""
    return {
        "n": len(answers),
        "mean_tokens": fmean(a.tokens for a in answers),
        "cut": fmean(a.tokens >= config.answer_tokens for a in answers),
        "temperatures": config.temperatures,
    }


class _Parts:
    """One share of progress from parts of unequal size, which are done one after another."""

    def __init__(self, progress: Progress, sizes: Mapping[str, int]):
        self.progress, self.sizes = progress, sizes

    def of(self, name: str) -> Progress:
        names = list(self.sizes)
        before = sum(self.sizes[n] for n in names[: names.index(name)])
        total = sum(self.sizes.values())

        def report(share: float, phrase: str) -> None:
            self.progress((before + share * self.sizes[name]) / total, f"{name}: {phrase}")

        return report
