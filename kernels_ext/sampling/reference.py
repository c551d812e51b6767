"""Which token comes next: greedy, or by temperature, top-k and top-p, with the randomness handed in.

Every function is a function of its arguments alone and none looks at a device's values from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """Token of the largest logit, the first of several equal ones: logits (M, V) → (M,) int32."""
    return logits.argmax(dim=-1).int()


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row: `greedy` at temperature 0, else drawn from the filtered distribution by its inverse.

    logits (M, V) bfloat16 or float32; uniforms (M,) float32 in [0, 1). Returns (M,) int32. Raises ValueError as
    `check_filter`.
    """
    check_filter(temperature, top_k, top_p)
    if temperature == 0.0:
        return greedy(logits)
    return draw(filtered_probabilities(logits, temperature, top_k, top_p), uniforms)


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """softmax(logits / temperature) of the top_k tokens (0: all), then of the smallest set of the most probable ones
    that has a mass of at least top_p, renormalised.

    Tokens as probable as the last one that is kept are kept too. logits (…, V) bfloat16 or float32, temperature > 0.
    Returns (…, V) float32. Raises ValueError as `check_filter`.
    """
    check_filter(temperature, top_k, top_p, greedy_allowed=False)
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # before the division, which rounds
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = (ordered / temperature).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities  # mass of the more probable tokens
        least = ordered.masked_fill(before >= top_p, float("inf")).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return (logits / temperature).softmax(dim=-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token, in the vocabulary's order, at which the cumulative weight passes uniform · total.

    weights (M, V) ≥ 0, in any unit; uniforms (M,) in [0, 1). Returns (M,) int32, never a token of weight 0; where
    rounding lets no token pass it is the last one of positive weight.
    """
    tokens = torch.arange(weights.shape[-1], dtype=torch.int32, device=weights.device)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    alive = weights > 0
    passed = alive & (cumulative > uniforms[:, None] * cumulative[:, -1:])
    first = tokens.where(passed, len(tokens)).amin(dim=-1)
    last = tokens.where(alive, 0).amax(dim=-1)
    return first.where(first < len(tokens), last)


def check_filter(temperature: float, top_k: int, top_p: float, greedy_allowed: bool = True) -> None:
    """ValueError where the three say nothing that can be sampled from."""
    if temperature < 0.0 or (temperature == 0.0 and not greedy_allowed):
        raise ValueError(f"temperature must be {'>= 0' if greedy_allowed else '> 0'}, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
