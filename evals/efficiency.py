"""What a model costs to decode with: tokens per second and bytes of state."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hybrid import HybridForCausalLM
from hybrid.engine import DecodeEngine

CONTEXTS = (512, 2048, 8192, 32768)
WARM_UP_TOKENS = 4


def decode_speed(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Greedy decoding of all prompts together: tokens per second over the batch, median of `repeats` after a warm-up.

    Reading the prompts is not counted. No reply ends early.
    """
    longest = max(len(p) for p in prompts)
    engine = DecodeEngine(model, batch=len(prompts), max_length=longest + new_tokens, eos_token_ids=())
    engine.generate(prompts, min(new_tokens, WARM_UP_TOKENS))
    rates = [len(prompts) * new_tokens / engine.generate(prompts, new_tokens).decode_seconds for _ in range(repeats)]
    return {
        "batch": len(prompts),
        "tokens_per_second": statistics.median(rates),
        "new_tokens": new_tokens,
        "repeats": repeats,
    }


def state_bytes(model: HybridForCausalLM, contexts: Sequence[int] = CONTEXTS) -> list[dict[str, int]]:
    """Bytes of one sequence's decoding state after `context` tokens: keys and values, SSM states, convolutions."""
    return [{"context": context, **model.cache_bytes(batch=1, context=context)} for context in contexts]
