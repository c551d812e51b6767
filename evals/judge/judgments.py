"""Questions to a judge: each asked once, written down as the answer comes, several at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from evals.judge.backends import Judge, LogprobsUnavailable, RequestRefused
from evals.judge.data import Message, content_hash
from evals.judge.ledger import Ledger

logger = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
Conversation = Sequence[Message]
Table = Sequence[Sequence[float]]

_RATING = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
_PAIR = re.compile(r"\[\[([ABC])\]\]")
_LETTER = re.compile(r"\W*([mM])\b")


class Judgments:
    """What a judge says, from the ledger where it was asked before."""

    def __init__(self, judge: Judge, ledger: Ledger, repeats: int):
        self.judge, self.ledger, self.repeats = judge, ledger, repeats

    def texts(
        self, conversations: Sequence[Conversation], max_tokens: int, progress: Progress
    ) -> list[list[str | None]]:
        """For each repeat the judge's words on each conversation, None where it refused the request."""

        def ask(messages: Conversation) -> str:
            return self.judge.complete(messages, max_tokens)

        return self._all(conversations, {"max_tokens": max_tokens}, ask, progress)

    def logprobs(
        self, conversations: Sequence[Conversation], choices: Sequence[str], progress: Progress
    ) -> list[list[dict[str, float] | None]] | None:
        """For each repeat ln p of the choices on each conversation, or None if the judge gives none: which the first
        conversation tells."""

        def ask(messages: Conversation) -> dict[str, float]:
            return self.judge.choice_logprobs(messages, choices)

        parameters = {"choices": list(choices)}
        try:
            self._all(conversations[:1], parameters, ask, lambda share, phrase: None)
            return self._all(conversations, parameters, ask, progress)
        except (LogprobsUnavailable, RequestRefused) as error:
            logger.warning("the judge is asked for words instead of log-probabilities: %s", error)
            return None

    def _all(
        self, conversations: Sequence[Conversation], parameters: dict[str, Any], ask: Callable, progress: Progress
    ) -> list[list[Any]]:
        """Answers by repeat and conversation. What is refused is logged and None; if everything is, the first refusal
        is raised."""
        keys = [
            [content_hash(self.judge.hash, list(messages), parameters, repeat) for messages in conversations]
            for repeat in range(self.repeats)
        ]
        waiting = {
            key: messages
            for of_repeat in keys
            for key, messages in zip(of_repeat, conversations, strict=True)
            if key not in self.ledger.found
        }
        total = len({key for of_repeat in keys for key in of_repeat})
        refusals: list[RequestRefused] = []
        done = total - len(waiting)
        with ThreadPoolExecutor(self.judge.concurrency) as pool:
            futures = {pool.submit(self._ask, ask, key, messages) for key, messages in waiting.items()}
            try:
                for future in as_completed(futures):
                    if refusal := future.result():
                        refusals.append(refusal)
                        logger.warning("not judged: %s", refusal)
                    done += 1
                    progress(done / total, f"{done} of {total} judged")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if refusals and len(refusals) == total:
            raise refusals[0]
        return [[self.ledger.found.get(key) for key in of_repeat] for of_repeat in keys]

    def _ask(self, ask: Callable, key: str, messages: Conversation) -> RequestRefused | None:
        try:
            self.ledger.add(key, ask(messages))
        except RequestRefused as refusal:
            return refusal
        return None


def pooled(values: Table, worst: Table, best: Table) -> tuple[list[float], dict[str, Any]]:
    """Scores of judged items over the judge's repeats, all arguments (repeats, n).

    values: with the middle of the scale for what could not be read; worst, best: with the scale's ends instead.
    Returns the n items' means over repeats, and {"best", "worst": means that bound what was not read, "repeat_sd":
    standard deviation of the benchmark's mean between repeats, None for one repeat}.
    """
    scores = np.array(values, dtype=float)
    noise = float(scores.mean(1).std(ddof=1)) if len(scores) > 1 else None
    figures = {"best": float(np.array(best).mean()), "worst": float(np.array(worst).mean()), "repeat_sd": noise}
    return scores.mean(0).tolist(), figures


def rating(text: str | None) -> float | None:
    """The score from 1 to 10 in "[[8]]", or "[8]", as FastChat looks for it; None if there is none."""
    for pattern in _RATING:
        if match := pattern.search(_said(text)):
            return float(match[1]) if 1.0 <= float(match[1]) <= 10.0 else None
    return None


def better(text: str | None) -> float | None:
    """1 for "[[A]]", 0 for "[[B]]", 0.5 for "[[C]]"; None if there is none of them."""
    match = _PAIR.search(_said(text))
    return {"A": 1.0, "B": 0.0, "C": 0.5}[match[1]] if match else None


def letter(text: str | None) -> str | None:
    """The m or M that the text begins with."""
    match = _LETTER.match(_said(text))
    return match[1] if match else None


def _said(text: str | None) -> str:
    """Without what a reasoning model thought aloud first."""
    return (text or "").rpartition("</think>")[2]
