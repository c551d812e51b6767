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
    does not depend on what is decoded beside it: prompts are padded on the right, and the states of the padding
    are never read (`hybrid.engine`). batch_size: replies at once. progress is told the share of prompts that are done.
    """
    found: list[list[int] | None] = [None] * len(prompts)
    # The longest first, so that memory runs out at once or never.
    order = sorted((i for i, p in enumerate(prompts) if len(p) + new_tokens <= context), key=lambda i: -len(prompts[i]))
    if not order:
        return found
    longest = len(prompts[order[0]]) + new_tokens
    with torch.autocast(model.device.type, enabled=False):
        engine = DecodeEngine(model, batch=min(batch_size, len(order)), max_length=longest)
        made = engine.generate_all([prompts[i] for i in order], new_tokens, progress=progress)
    for i, reply in zip(order, made.replies, strict=True):
        found[i] = reply
    return found
