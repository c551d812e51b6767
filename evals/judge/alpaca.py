"""AlpacaEval 2's weighted win rate, and one that takes out what the judge gives for length alone (2404.04475).

Every pair is shown in both orders and the two are averaged; AlpacaEval draws one. The length-controlled figure is the
smallest of its models, fitted to these answers alone: not the leaderboard's, which knows every prompt's difficulty, and
from which it was found to differ by up to 28 points. It is therefore called "LC (minimal, local)".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import expit

from evals.judge.answers import Answer, instruction_hashes
from evals.judge.data import Instruction, Prompt, row
from evals.judge.judgments import Judgments, Progress, letter, pooled

LETTERS = ("m", "M")
VERDICT_TOKENS = 4
"""Room for a verdict in words, which is one letter."""
RIDGE = 0.01
"""Keeps the fit finite where every prompt was won, or lost; on 805 prompts it changes the fifth digit."""
DRAWS = 1000


def measure(
    judgments: Judgments,
    instructions: Sequence[Instruction],
    answers: Mapping[str, Answer],
    references: Mapping[str, str],
    prompt: Prompt,
    progress: Progress,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows "preference", the probability that the judge takes the answer and not the reference, and the figures.

    references: what each instruction's answer is compared with. From the log-probabilities of the letter that names the
    better answer; from the letter itself where the judge gives none, which `verdict` tells. Shares, not percent. `se`
    is that of the length-controlled figure, by a bootstrap over prompts in which the model is fitted anew: the standard
    error that AlpacaEval prints is that of its model's predictions and about half as large.
    """
    pairs = [(references[i.id], answers[i.id].text) for i in instructions]
    conversations = [
        prompt.messages(instruction=i.text, output_1=first, output_2=second)
        for reverse in (False, True)
        for i, pair in zip(instructions, pairs, strict=True)
        for first, second in (pair[::-1] if reverse else pair,)
    ]
    logprobs = judgments.logprobs(conversations, LETTERS, progress)
    if logprobs is not None:
        found = [[_probability(p) for p in of_repeat] for of_repeat in logprobs]
    else:
        texts = judgments.texts(conversations, VERDICT_TOKENS, progress)
        found = [[_certainty(letter(text)) for text in of_repeat] for of_repeat in texts]

    n = len(instructions)

    def preferences(unread: float) -> list[list[float]]:
        """Mean of both orders by repeat and prompt; `found` is of the second answer, which in reverse is the
        reference."""
        return [
            [
                ((unread if a is None else a) + (unread if b is None else 1.0 - b)) / 2
                for a, b in zip(of_repeat[:n], of_repeat[n:], strict=True)
            ]
            for of_repeat in found
        ]

    scores, figures = pooled(preferences(0.5), preferences(0.0), preferences(1.0))
    verdict = "text" if logprobs is None else "logprobs"
    how = (judgments.judge.hash, prompt.system, prompt.user, verdict)
    records = [
        row("alpaca", i.id, i.id, instruction_hashes(i, *how), "preference", score, answers[i.id].text)
        for i, score in zip(instructions, scores, strict=True)
    ]
    lengths = np.array([len(answer) - len(reference) for reference, answer in pairs], dtype=float)
    return records, {
        "weighted_win": fmean(scores),
        "weighted_win_se": stdev(scores) / sqrt(n) if n > 1 else None,
        "lc_minimal_local": length_controlled(np.array(scores), lengths),
        "se": length_controlled_error(np.array(scores), lengths, seed) if n > 1 else None,
        "n": n,
        "judged": 2 * n * len(found),
        "failed": sum(p is None for p in chain(*found)),
        "verdict": verdict,
        **figures,
    }


def _probability(logprobs: Mapping[str, float] | None) -> float | None:
    """P(M) / (P(m) + P(M)), None where neither letter is among the likely answers."""
    if logprobs is None or max(logprobs.values()) == -np.inf:
        return None
    return float(expit(logprobs["M"] - logprobs["m"]))


def _certainty(said: str | None) -> float | None:
    return None if said is None else float(said == "M")


def length_controlled(preferences: np.ndarray, lengths: np.ndarray) -> float:
    """σ(a) of logit P = a + b · tanh(Δ / sd(Δ)): the preference were both answers equally long.

    preferences: (n,) in [0, 1]. lengths: (n,) characters of the answer less those of the reference. Fitted by
    iteratively reweighted least squares, which for shares is quasi-likelihood.
    """
    spread = lengths.std()
    design = np.stack([np.ones(len(lengths)), np.tanh(lengths / spread) if spread > 0 else np.zeros(len(lengths))], 1)
    weights = np.zeros(2)
    for _ in range(100):
        expected = expit(design @ weights)
        curvature = (design * (expected * (1 - expected))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, design.T @ (preferences - expected) - RIDGE * weights)
        # Far out the curvature vanishes and Newton's step overshoots; what a step of 2 cannot reach is next to 0 or 1.
        weights += step.clip(-2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    return float(expit(weights[0]))


def length_controlled_error(preferences: np.ndarray, lengths: np.ndarray, seed: int, draws: int = DRAWS) -> float:
    """Standard error of `length_controlled` by a bootstrap over prompts."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(preferences), size=(draws, len(preferences)))
    return float(np.std([length_controlled(preferences[c], lengths[c]) for c in chosen], ddof=1))
