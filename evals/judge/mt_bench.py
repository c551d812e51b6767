"""MT-Bench's single-answer grading (2306.05685, section 3.1): 1 to 10 for each turn, guided by a reference where there
is one. The second turn is graded with the whole conversation in view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evals.judge.answers import Answer, question_hashes
from evals.judge.data import Message, Prompt, Question, row
from evals.judge.judgments import Judgments, Progress, pooled, rating

LOW, HIGH = 1.0, 10.0
MIDDLE = (LOW + HIGH) / 2
"""What a judgment counts that holds no score."""


def measure(
    judgments: Judgments,
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    prompts: Mapping[str, Prompt],
    max_tokens: int,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows "score" of both turns of every question, and the figures of them.

    answers: {"81/1": …} by question and turn.
    """
    asked = [(q, turn, _prompt(q, turn, prompts)) for q in questions for turn in (1, 2)]
    texts = judgments.texts([_messages(q, turn, p, answers) for q, turn, p in asked], max_tokens, progress)
    scores, figures, failed = graded(texts)
    records = [
        row(
            "mt_bench",
            f"{q.id}/{turn}",
            q.id,
            question_hashes(q, turn, judgments.judge.hash, prompt.system, prompt.user, max_tokens),
            "score",
            score,
            text or "",
        )
        for (q, turn, prompt), score, text in zip(asked, scores, texts[0], strict=True)
    ]
    by_category: dict[str, list[float]] = {}
    for (question, *_), score in zip(asked, scores, strict=True):
        by_category.setdefault(question.category, []).append(score)
    return records, {
        "mean": fmean(scores),
        "turn_1": fmean(scores[::2]),
        "turn_2": fmean(scores[1::2]),
        "n": len(scores),
        "judged": len(scores) * len(texts),
        "failed": failed,
        **figures,
        "by_category": {category: fmean(found) for category, found in by_category.items()},
        "category_n": {category: len(found) for category, found in by_category.items()},
    }


def graded(texts: Sequence[Sequence[str | None]]) -> tuple[list[float], dict[str, Any], int]:
    """Scores by item of judgments by repeat and item, `pooled`'s figures, and how many hold no score."""
    found = [[rating(text) for text in of_repeat] for of_repeat in texts]

    def filled(value: float) -> list[list[float]]:
        return [[value if score is None else score for score in of_repeat] for of_repeat in found]

    scores, figures = pooled(filled(MIDDLE), filled(LOW), filled(HIGH))
    return scores, figures, sum(score is None for of_repeat in found for score in of_repeat)


def _prompt(question: Question, turn: int, prompts: Mapping[str, Prompt]) -> Prompt:
    return prompts["single" + ("-math" * bool(question.references)) + "-v1" + "-multi-turn" * (turn == 2)]


def _messages(question: Question, turn: int, prompt: Prompt, answers: Mapping[str, Answer]) -> list[Message]:
    first, second = (answers[f"{question.id}/{t}"].text for t in (1, 2))
    right = question.references or ("", "")
    values = {"ref_answer_1": right[0], "ref_answer_2": right[1], "answer_1": first, "answer_2": second}
    both = {"question_1": question.turns[0], "question_2": question.turns[1]}
    return prompt.messages(question=question.turns[0], answer=first, **both, **values)
