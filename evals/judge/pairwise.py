"""The student's answers beside the teacher's on MT-Bench's questions, in both orders (2306.05685, sections 3.1, 3.4).

A judge that changes its mind with the order prefers a place, not an answer: that counts as a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from evals.judge.answers import Answer, question_hashes
from evals.judge.data import Message, Prompt, Question, row
from evals.judge.judgments import Judgments, Progress, better, pooled
from evals.stats import bootstrap_means, cluster_sums

TIE = 0.5


def measure(
    judgments: Judgments,
    questions: Sequence[Question],
    students: Mapping[str, Answer],
    teachers: Mapping[str, Answer],
    prompts: Mapping[str, Prompt],
    max_tokens: int,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows "win" (1 for the student, 0.5, 0) of both turns of every question, and the figures of them.

    students, teachers: answers by question and turn, {"81/1": …}. `consistent` is the share of judgments, of those that
    were read in both orders, that the order did not change. The interval resamples questions.
    """
    asked = [(q, turn, _prompt(q, turn, prompts)) for q in questions for turn in (1, 2)]
    conversations = [_messages(q, turn, p, students, teachers) for q, turn, p in asked]
    conversations += [_messages(q, turn, p, teachers, students) for q, turn, p in asked]
    texts = judgments.texts(conversations, max_tokens, progress)
    n = len(asked)
    verdicts = [[(_won(a), _lost(b)) for a, b in zip(of_repeat[:n], of_repeat[n:], strict=True)] for of_repeat in texts]
    wins, figures = pooled(*([[count(*pair) for pair in of_repeat] for of_repeat in verdicts] for count in COUNTS))
    records = [
        row(
            "pairwise",
            f"{q.id}/{turn}",
            q.id,
            question_hashes(q, turn, judgments.judge.hash, prompt.system, prompt.user, max_tokens),
            "win",
            win,
            f"[student first] {first or ''}\n[teacher first] {second or ''}",
        )
        for (q, turn, prompt), win, first, second in zip(asked, wins, texts[0][:n], texts[0][n:], strict=True)
    ]
    read = [pair for of_repeat in verdicts for pair in of_repeat if None not in pair]
    consistent = sum(first == second for first, second in read)
    sums = cluster_sums(np.array(wins), clusters=[r["cluster"] for r in records])
    low, high = np.quantile(bootstrap_means(*sums), [0.025, 0.975]).tolist()
    items = [f"{q.id}/{turn}" for q, turn, _ in asked]
    return records, {
        "wins": sum(win > TIE for win in wins),
        "ties": sum(win == TIE for win in wins),
        "losses": sum(win < TIE for win in wins),
        "win_rate": fmean(wins),
        "ci_low": low,
        "ci_high": high,
        "consistent": consistent / len(read) if read else None,
        "inconsistent": len(read) - consistent,
        "n": n,
        "judged": n * len(verdicts),
        "failed": n * len(verdicts) - len(read),
        "length_ratio": sum(students[i].tokens for i in items) / sum(teachers[i].tokens for i in items),
        **figures,
    }


def _won(text: str | None) -> float | None:
    """The student's share of a judgment where its answer is assistant A's."""
    return better(text)


def _lost(text: str | None) -> float | None:
    """The same where its answer is assistant B's."""
    verdict = better(text)
    return None if verdict is None else 1.0 - verdict


def agreed(first: float | None, second: float | None) -> float:
    """The verdict of both orders; a tie where they differ or one was not read."""
    return first if first is not None and first == second else TIE


def at_worst(first: float | None, second: float | None) -> float:
    return agreed(*(0.0 if verdict is None else verdict for verdict in (first, second)))


def at_best(first: float | None, second: float | None) -> float:
    return agreed(*(1.0 if verdict is None else verdict for verdict in (first, second)))


COUNTS = (agreed, at_worst, at_best)


def _prompt(question: Question, turn: int, prompts: Mapping[str, Prompt]) -> Prompt:
    return prompts["pair" + ("-math-v1" if question.references else "-v2") + "-multi-turn" * (turn == 2)]


def _messages(
    question: Question, turn: int, prompt: Prompt, a: Mapping[str, Answer], b: Mapping[str, Answer]
) -> list[Message]:
    (a_1, a_2), (b_1, b_2) = ([side[f"{question.id}/{t}"].text for t in (1, 2)] for side in (a, b))
    right = question.references or ("", "")
    return prompt.messages(
        question=question.turns[0],
        question_1=question.turns[0],
        question_2=question.turns[1],
        ref_answer_1=right[0],
        ref_answer_2=right[1],
        answer_a=a_1,
        answer_b=b_1,
        answer_a_1=a_1,
        answer_a_2=a_2,
        answer_b_1=b_1,
        answer_b_2=b_2,
    )
