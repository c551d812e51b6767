"""Log-probabilities of continuations: what every multiple-choice score is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from evals.batches import length_sorted
from evals.head import EvaluationError, Head, chunk_tokens
from hybrid import HybridForCausalLM


@torch.no_grad()
def loglikelihoods(
    model: HybridForCausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    context: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """(Σ ln p(continuation | context), whether greedy decoding gives it) for pairs of token lists, neither empty.

    A text that several pairs need is read once: four one-letter answers to a question cost one sequence. A pair of more
    than `context` tokens (None: as many as the model has positions) loses its beginning; `too_long` says which. The
    result does not depend on the batch size, rounding aside. progress is told the share of texts that are read.
    """
    limit = context or model.config.max_position_embeddings
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, (before, continuation) in enumerate(pairs):
        if not before or not continuation or len(continuation) > limit:
            raise EvaluationError(
                f"request {i}: context of {len(before)} and continuation of {len(continuation)} tokens; "
                f"both need at least one token, and the continuation at most {limit}"
            )
        readers.setdefault((*before, *continuation[:-1])[-limit:], []).append(i)
    texts = list(readers)
    head = Head(model)
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    read = 0
    for chosen, tokens in length_sorted(texts, batch_size, model.lm_head_weight.device):
        hidden = model.hidden(tokens)
        wanted = [
            (i, row, len(texts[t]) - len(pairs[i][1]), pairs[i][1])
            for row, t in enumerate(chosen)
            for i in readers[texts[t]]
        ]
        rows = torch.tensor([row for _, row, _, continuation in wanted for _ in continuation])
        positions = torch.tensor([first + k for _, _, first, continuation in wanted for k in range(len(continuation))])
        targets = torch.tensor([token for *_, continuation in wanted for token in continuation], device=hidden.device)
        scores, greedy = _token_scores(hidden[rows, positions], head, targets)
        counts = [len(continuation) for *_, continuation in wanted]
        for (i, *_), score, best in zip(wanted, scores.split(counts), greedy.split(counts), strict=True):
            results[i] = float(score.sum()), bool(best.all())
        read += len(chosen)
        progress(read / len(texts))
    return results


def too_long(pair: tuple[Sequence[int], Sequence[int]], context: int) -> bool:
    """Whether a pair has more tokens than are read of it."""
    before, continuation = pair
    return len(before) + len(continuation) - 1 > context


def _token_scores(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ln p (N,) float64 of the targets and whether each is the most probable token, from hidden states (N, D)."""
    scores, greedy = [], []
    size = chunk_tokens(hidden.device)
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        log_p = torch.log_softmax(head(h), -1)
        scores.append(log_p.gather(-1, t[:, None])[:, 0])
        greedy.append(log_p.argmax(-1) == t)
    found = torch.cat(scores).double().cpu()
    if not bool(found.isfinite().all()):
        raise EvaluationError("log-probabilities are not finite; the model's output is broken (NaN or inf)")
    return found, torch.cat(greedy).cpu()
