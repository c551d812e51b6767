"""Whether two greedy replies differ only where the model's own precision cannot tell which token comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from hybrid.model import HybridForCausalLM

TIE = {torch.bfloat16: 0.1, torch.float32: 1e-4}
"""Logits closer than so many standard deviations of all logits may change places between two ways to compute them:
five times the difference that rounding makes."""
RULE = (
    "exact: the same tokens as plain greedy decoding. near-tie: at the first difference both tokens' logits, by the "
    "full forward with a float32 head over the text of plain decoding before it, lie within 0.1 standard deviations of "
    "all logits from the largest one (0.0001 where all is float32). wrong: all else."
)

Agreement = Literal["exact", "near_tie", "wrong"]


@torch.no_grad()
def compare(
    model: HybridForCausalLM, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int]
) -> tuple[Agreement, float]:
    """How a reply compares with plain greedy decoding's by RULE, and the gap where they first differ.

    gap: from the largest logit to the lower one of the two tokens', in standard deviations of all logits; 0 where no
    tokens differ. What comes after the first difference is not compared. No tie explains where a reply ends: one that
    is the beginning of the other is wrong.
    """
    if list(expected) == list(found):
        return "exact", 0.0
    first = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if first is None:
        return "wrong", 0.0
    logits = last_logits(model, torch.tensor([[*prompt, *expected[:first]]], device=model.device))
    worse = torch.minimum(logits[expected[first]], logits[found[first]])
    gap = float((logits.max() - worse) / logits.std())
    return ("near_tie" if gap <= TIE[model.dtype] else "wrong"), gap


def last_logits(model: HybridForCausalLM, tokens: Tensor) -> Tensor:
    """(V,) float32 after tokens (1, L); a bfloat16 result would be coarser than the ties that are looked for."""
    return linear(model.hidden(tokens)[0, -1].float(), model.lm_head_weight.float())
