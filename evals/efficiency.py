"""What a model costs to decode with: tokens per second and bytes of state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.generate import generate

CONTEXTS = (512, 2048, 8192, 32768)
WARM_UP_TOKENS = 4


def decode_speed(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Greedy decoding of all prompts together: tokens per second over the batch, median of `repeats` after a warm-up.

    Reading the prompts is not counted: time starts when the first new token is there. No reply ends early.
    """
    prompts = [list(p) for p in prompts]
    generate(model, prompts, WARM_UP_TOKENS, eos_token_ids=())
    rates = []
    for _ in range(repeats):
        first: list[float] = []

        def started(tokens: torch.Tensor, first: list[float] = first) -> None:
            if not first:
                tokens.cpu()  # waits for the device
                first.append(time.perf_counter())

        generate(model, prompts, new_tokens + 1, eos_token_ids=(), callback=started)
        rates.append(len(prompts) * new_tokens / (time.perf_counter() - first[0]))
    return {
        "batch": len(prompts),
        "tokens_per_second": statistics.median(rates),
        "new_tokens": new_tokens,
        "repeats": repeats,
    }


def state_bytes(model: HybridForCausalLM, contexts: Sequence[int] = CONTEXTS) -> list[dict[str, int]]:
    """Bytes of one sequence's decoding state after `context` tokens: keys and values, SSM states, convolutions."""
    return [{"context": context, **model.cache_bytes(batch=1, context=context)} for context in contexts]
