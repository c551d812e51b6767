"""Replies to prompts in one call; `hybrid.engine` is what decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hybrid.engine import Callback, DecodeEngine, Sampling
from hybrid.model import HybridForCausalLM


def generate(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_ids: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> list[list[int]]:
    """Replies (without prompts, with the end-of-turn token where one came) of at most max_new_tokens tokens.

    temperature 0 is greedy, and then the reply to a prompt does not depend on the rest of the batch. eos_token_ids:
    None takes the model's own, () never stops. callback gets each step's tokens (B, 1) int32, −1 for rows that have
    ended. Buffers and graphs last for this call: who calls often keeps a `Generator`.
    """
    return Generator()(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_ids=eos_token_ids,
        callback=callback,
    )


class Generator:
    """`generate` that keeps its buffers and graphs for the next call of the same shape; `engine` is the one it has."""

    def __init__(self) -> None:
        self.engine: DecodeEngine | None = None
        self._shape: tuple[object, ...] = ()

    def __call__(
        self,
        model: HybridForCausalLM,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_ids: Sequence[int] | None = None,
        callback: Callback | None = None,
        slots: int | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[list[int]]:
        """See `generate`. slots: decode so many prompts at a time, each new one in the place of one that has ended;
        None is all at once. progress: is told the share of prompts that are done; with slots there is no callback."""
        sampling = Sampling(temperature, top_k, top_p)
        stop = None if eos_token_ids is None else tuple(eos_token_ids)
        batch = max(1, len(prompts) if slots is None else min(slots, len(prompts)))
        length = max((len(p) for p in prompts), default=0) + max(1, max_new_tokens)
        shape = (model, batch, length, sampling, stop)
        if self.engine is None or self._shape != shape:
            self.engine = None  # its memory is free before the next one takes its own
            self.engine = DecodeEngine(model, batch=batch, max_length=length, sampling=sampling, eos_token_ids=stop)
            self._shape = shape
        with torch.autocast(model.device.type, enabled=False):
            if slots is not None:
                return self.engine.generate_all(prompts, max_new_tokens, seed=seed, progress=progress).replies
            return self.engine.generate(prompts, max_new_tokens, seed=seed, callback=callback).replies
