"""Greedy replies to many prompts of unequal length, for tasks that are scored by what a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hybrid import HybridForCausalLM
from hybrid.engine import DecodeEngine


def replies(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int,
    context: int,
    progress: Callable[[float], None] = lambda share: None,
) -> list[list[int] | None]:
    """At most new_tokens tokens after each prompt, with the end-of-turn token where one came, in the prompts' order.

    None for a prompt that does not fit into `context` tokens together with new_tokens: neither is ever cut. A reply
    does not depend on the batch that its prompt is in: prompts are padded on the right, and the states of the padding
    are never read (`hybrid.engine`). progress is told the share of prompts that are done.
    """
    found: list[list[int] | None] = [None] * len(prompts)
    # Neighbours in length share a batch, the longest first, so that memory runs out at once or never.
    order = sorted((i for i, p in enumerate(prompts) if len(p) + new_tokens <= context), key=lambda i: -len(prompts[i]))
    if not order:
        return found
    longest = len(prompts[order[0]]) + new_tokens
    with torch.autocast(model.device.type, enabled=False):
        engine = DecodeEngine(model, batch=min(batch_size, len(order)), max_length=longest)
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            made = engine.generate([prompts[i] for i in chosen], new_tokens)
            for i, reply in zip(chosen, made.replies, strict=True):
                found[i] = reply
            progress(min(1.0, (at + batch_size) / len(order)))
    return found
