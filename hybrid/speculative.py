"""Chain speculation with exact greedy acceptance (Leviathan et al., 2211.17192, at temperature 0).

A draft proposes up to K tokens, one call of the model scores them all, the longest prefix that greedy decoding would
have produced is kept together with the model's own next token, and the cache is rolled back over the rest. The output
is that of plain greedy decoding, whatever the draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hybrid.generate import check_request, next_logits, right_pad
from hybrid.model import HybridForCausalLM


class Draft(Protocol):
    """Proposes what may come next; one object per sequence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """These tokens are now part of the text."""

    def propose(self, k: int) -> list[int]:
        """At most k tokens that may follow; may be empty."""


class NGramDraft:
    """Prompt look-up: what followed the latest earlier occurrence of the text's longest known suffix. No weights."""

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"the longest suffix must be at least 1 token, got {longest}")
        self.longest = longest
        self.text: list[int] = []
        self.followers: dict[tuple[int, ...], int] = {}
        """Suffix → where the token after its latest occurrence stands."""

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in range(1, min(self.longest, len(self.text)) + 1):
                self.followers[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def propose(self, k: int) -> list[int]:
        for n in range(min(self.longest, len(self.text)), 0, -1):
            at = self.followers.get(tuple(self.text[-n:]))
            if at is not None:
                return self.text[at : at + k]
        return []


@dataclass
class SpeculationStats:
    """Counts of one decoding, of one row or added over many.

    proposed, accepted: by draft position. emitted: tokens out of each verification, in order. seconds: decoding
    without prefill.
    """

    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: float = 0.0


@torch.no_grad()
def generate_speculative(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafts: Sequence[Draft],
    k: int,
    eos_token_ids: Sequence[int] | None = None,
) -> tuple[list[list[int]], list[SpeculationStats]]:
    """Greedy replies as `hybrid.generate.generate` gives them, and one SpeculationStats per prompt.

    drafts: one per prompt, fresh. k: tokens proposed per verification; 0 is plain decoding by the same code.
    """
    check_request(prompts, max_new_tokens)
    device = model.device
    stop = set(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    tokens, counts = right_pad(prompts, device)
    # A window may reach past the reply's end before it is rolled back.
    cache = model.new_cache(len(prompts), int(counts.max()) + max_new_tokens + k + 1)
    hidden = model.hidden(tokens, cache=cache, counts=counts)
    first = next_logits(model, hidden[torch.arange(len(prompts), device=device), counts - 1]).argmax(-1).tolist()
    replies = [[token] for token in first]
    stats = [SpeculationStats([0] * k, [0] * k) for _ in prompts]
    for draft, prompt, reply in zip(drafts, prompts, replies, strict=True):
        draft.extend([*prompt, *reply])
    began = time.perf_counter()
    while running := [not _ended(reply, stop, max_new_tokens) for reply in replies]:
        if not any(running):
            break
        windows = []
        for row, reply in enumerate(replies):
            room = max_new_tokens - len(reply) - 1  # the model's own token always comes on top
            proposal = drafts[row].propose(min(k, room)) if running[row] and room > 0 and k else []
            windows.append([reply[-1], *proposal])
        tokens, counts = right_pad(windows, device)
        counts = counts * torch.tensor(running, device=device)
        chosen = next_logits(model, model.hidden(tokens, cache=cache, counts=counts)).argmax(-1).tolist()
        forget = []
        for row, (window, greedy) in enumerate(zip(windows, chosen, strict=True)):
            if not running[row]:
                forget.append(0)
                continue
            agreed = _agreement(window[1:], greedy)
            new = _until_stop(greedy[: agreed + 1], stop)
            replies[row] += new
            drafts[row].extend(new)
            stats[row].emitted.append(len(new))
            for position in range(len(window) - 1):
                stats[row].proposed[position] += 1
                stats[row].accepted[position] += position < agreed
            forget.append(len(window) - 1 - agreed)
        if any(forget):
            cache.rollback(model, torch.tensor(forget, device=device))
    seconds = time.perf_counter() - began
    for one in stats:
        one.seconds = seconds
    return replies, stats


def _agreement(proposal: Sequence[int], greedy: Sequence[int]) -> int:
    """How many leading proposals are what greedy decoding gives."""
    for position, token in enumerate(proposal):
        if token != greedy[position]:
            return position
    return len(proposal)


def _until_stop(tokens: Sequence[int], stop: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop:
            return list(tokens[: position + 1])
    return list(tokens)


def _ended(reply: Sequence[int], stop: set[int], max_new_tokens: int) -> bool:
    return len(reply) >= max_new_tokens or reply[-1] in stop
