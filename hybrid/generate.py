"""Decoding: prefill once, then token by token, for any batch of unequal prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from hybrid.model import HybridForCausalLM

LIKELY = 1024
"""Tokens of a distribution that are looked at before all are."""


@torch.no_grad()
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
    callback: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Replies (without prompts, with the end-of-turn token where one came) of at most max_new_tokens tokens.

    temperature 0 is greedy, and then the reply to a prompt does not depend on the rest of the batch. eos_token_ids:
    None takes the model's own, () never stops. callback gets each step's tokens (B,), −1 for rows that have ended.
    """
    check_request(prompts, max_new_tokens)
    device = model.device
    stop = torch.tensor(list(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids), device=device)
    tokens, counts = right_pad(prompts, device)
    cache = model.new_cache(len(prompts), int(counts.max()) + max_new_tokens)
    hidden = model.hidden(tokens, cache=cache, counts=counts)
    last = hidden[torch.arange(len(prompts), device=device), counts - 1]  # (B, d_model)
    random = torch.Generator(device=device).manual_seed(seed)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    steps = []
    for step in range(max_new_tokens):
        chosen = sample(next_logits(model, last), temperature, top_k, top_p, random)
        emitted = torch.where(running, chosen, -1)
        steps.append(emitted)
        if callback is not None:
            callback(emitted)
        if len(stop):
            running = running & ~torch.isin(chosen, stop)
            if not bool(running.any()):
                break
        if step + 1 < max_new_tokens:
            last = model.hidden(chosen[:, None], cache=cache, counts=running.long())[:, 0]
    return [[t for t in row if t >= 0] for row in torch.stack(steps, dim=1).tolist()]


def check_request(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or any(not p for p in prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(B, L) tokens, padded on the right with 0, and their counts (B,)."""
    counts = torch.tensor([len(r) for r in rows], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return padded.to(device), counts


def next_logits(model: HybridForCausalLM, hidden: Tensor) -> Tensor:
    """Logits (…, V) in float32 of final hidden states (…, d_model)."""
    return linear(hidden, model.lm_head_weight).float()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits (B, V): argmax at temperature 0, else from the filtered distribution."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """softmax(logits / temperature) of the top_k tokens (0: all), then of the smallest set of mass ≥ top_p."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if top_p < 1.0:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens of mass ≥ top_p, renormalised. The largest few hold that mass almost always, and
    finding them is much cheaper than sorting the vocabulary, which is what is done where they do not."""
    vocabulary = probabilities.shape[-1]
    count = min(LIKELY, vocabulary)
    ordered, order = probabilities.topk(count, dim=-1)
    if count < vocabulary and bool((ordered.sum(-1) < top_p).any()):
        ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p  # mass before the token already reaches top_p
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(outside, 0.0))
    return kept / kept.sum(dim=-1, keepdim=True)
