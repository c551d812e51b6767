"""The bookkeeping of chain speculation (Leviathan et al., 2211.17192, Algorithm 1): propose, accept, advance.

A round's window is the last known token and up to K proposals, so the target has K + 1 distributions: the one at
position i judges proposal i, and the one after the last accepted proposal gives one more token. Nothing here looks at
a device's values from the host. B rows of the batch, S slots, K proposals, V vocabulary, M text length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_ext.sampling.reference import draw


def accept_greedy(chosen: Tensor, draft: Tensor, n_draft: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the longest prefix of the proposals that greedy decoding would have produced.

    chosen (B, K + 1) int32: the target's own token after each window position; draft (B, K) int32; n_draft (B,) int32:
    how many of the proposals are real. Returns n_accepted (B,) int32 and the target's token after them, (B,) int32.
    """
    return _accept_prefix(draft == chosen[:, :-1], chosen, n_draft)


def accept_injected(
    chosen: Tensor, draft: Tensor, n_draft: Tensor, uniforms: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Synthetic acceptance, to profile a shape without trained weights: proposal i is kept if uniform i < rate[i].

    uniforms (B, ≥ K) in [0, 1); rate (K,) float32; the rest as `accept_greedy`.
    """
    return _accept_prefix(uniforms[:, : draft.shape[1]] < rate, chosen, n_draft)


def accept_sampled(
    p: Tensor, q: Tensor | None, draft: Tensor, n_draft: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep proposal d at position i with probability min(1, p_i(d) / q_i(d)), and draw the token after the kept ones.

    p (B, K + 1, V) float32: the target's distributions; q (B, K, V) float32: those that the proposals were drawn from,
    None if the draft is deterministic; uniforms (B, K + 1) in [0, 1). At the first rejection the token comes from
    norm(max(p − q, 0)), or from p where that is zero everywhere; after all n_draft proposals it comes from p. The
    tokens then follow the target's law (2211.17192, Appendix A.1). Returns as `accept_greedy`.
    """
    batch, proposals = draft.shape
    rows = torch.arange(batch, device=draft.device)
    real = torch.arange(proposals, device=draft.device) < n_draft[:, None]
    token = draft.masked_fill(~real, 0).long()
    p_draft = p[:, :-1].gather(2, token[..., None]).squeeze(2)
    q_draft = torch.ones_like(p_draft) if q is None else q.gather(2, token[..., None]).squeeze(2)
    accepted = real & (q_draft > 0) & (uniforms[:, :-1] * q_draft < p_draft)
    n_accepted = _prefix(accepted)
    weights = p[rows, n_accepted.long()]
    if proposals:
        at = n_accepted.long().clamp(max=proposals - 1)
        proposed = torch.nn.functional.one_hot(token[rows, at], p.shape[2]).float() if q is None else q[rows, at]
        residual = (weights - proposed).clamp(min=0.0)
        residual = residual.where(residual.sum(dim=1, keepdim=True) > 0, weights)
        weights = residual.where((n_accepted < n_draft)[:, None], weights)
    return n_accepted, draw(weights, uniforms[:, -1])


def advance(
    n_accepted: Tensor,
    next: Tensor,
    draft: Tensor,
    text: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    ends: Tensor,
    stop: Tensor,
    window: int,
    ring: int,
    emitted: Tensor,
    counts: Tensor,
    n_draft: Tensor,
    proposed: Tensor,
    accepted: Tensor,
    rounds: Tensor,
) -> None:
    """End a round: write the new tokens to the text, move the cursors, close rows that have ended. All in place.

    The new tokens are draft[:n_accepted] and next (B,), cut after the first that is in stop (E,) int32, and where the
    text reaches ends (S,), the length at which a row is full. text (S, M) int32 holds prompt and reply, text[s,
    lengths[s]] being the last known token. lengths, folded (S,) int32: cursors, see the cache; `window` tokens of a
    round at most, `ring` slots of the SSM ring. slots (B,) int32: −1 for rows that take no part, which is what rows
    become that have stopped or are full. emitted (B, K + 1) int32: the new tokens, then −1; counts (B,) int32: how
    many. proposed, accepted (B, K) and rounds (B,) int32 are counted up for rows that take part, acceptance before
    the cuts.
    """
    batch, proposals = draft.shape
    live = slots >= 0
    slot = slots.clamp(min=0).long()
    at = torch.arange(proposals + 1, device=draft.device)
    tokens = pad(draft, (0, 1)).where(at < n_accepted[:, None], next[:, None])
    length = lengths[slot]
    stops = (tokens[..., None] == stop).any(dim=2) & (at <= n_accepted[:, None])
    first_stop = at.where(stops, proposals + 1).amin(dim=1)
    n = torch.minimum(torch.minimum(n_accepted + 1, first_stop + 1), ends[slot] - length - 1).clamp(min=0)
    n = n.where(live, 0).int()
    new = at < n[:, None]
    emitted.copy_(tokens.where(new, -1))
    counts.copy_(n)

    # Rows that take no part all point at slot 0 here: to every slot a difference is added, which for them is 0.
    position = (length[:, None] + 1 + at).clamp(max=text.shape[1] - 1).long()
    change = (tokens - text[slot[:, None], position]).where(new, 0)
    text.index_put_((slot[:, None].expand_as(position), position), change.to(text.dtype), accumulate=True)
    behind = length - folded[slot]
    folded.index_add_(0, slot, behind.where(live & (behind + 2 * window > ring), 0))
    lengths.index_add_(0, slot, n)
    ended = (first_stop < n) | (length + 1 + n >= ends[slot])

    position = at[:-1]
    proposed += live[:, None] & (position < n_draft[:, None])
    accepted += live[:, None] & (position < n_accepted[:, None])
    rounds += live
    slots.masked_fill_(live & ended, -1)


def ngram_propose(text: Tensor, lengths: Tensor, slots: Tensor, longest: int, k: int) -> tuple[Tensor, Tensor]:
    """Prompt look-up: what followed the latest earlier occurrence of the longest known suffix of the text.

    text (S, M) int32, of which lengths + 1 tokens are known; slots (B,) int32, −1 for rows that take no part; longest:
    tokens of a suffix at most. Returns draft (B, k) int32, 0 where nothing is known, and n_draft (B,) int32.
    """
    live = slots >= 0
    slot = slots.clamp(min=0).long()
    last = lengths[slot][:, None].long()  # where the last known token stands
    rows = text[slot]
    at = torch.arange(rows.shape[1], device=text.device)
    matches = at < last  # ends of occurrences of the last n tokens
    found = torch.full_like(last, -1)
    for n in range(longest):
        suffix = rows.gather(1, (last - n).clamp(min=0))
        matches = matches & (rows.roll(n, dims=1) == suffix) & (at >= n)
        end = at.where(matches, -1).amax(dim=1, keepdim=True)
        found = end.where(end >= 0, found)
    n_draft = (last - found).clamp(max=k).where((found >= 0) & live[:, None], 0)
    i = torch.arange(k, device=text.device)
    draft = rows.gather(1, (found + 1 + i).clamp(max=rows.shape[1] - 1)).where(i < n_draft, 0)
    return draft.int(), n_draft[:, 0].int()


def _accept_prefix(accepted: Tensor, chosen: Tensor, n_draft: Tensor) -> tuple[Tensor, Tensor]:
    real = torch.arange(accepted.shape[1], device=accepted.device) < n_draft[:, None]
    n_accepted = _prefix(accepted & real)
    return n_accepted, chosen.gather(1, n_accepted.long()[:, None]).squeeze(1)


def _prefix(accepted: Tensor) -> Tensor:
    """How many leading proposals (B, K) are accepted."""
    return accepted.int().cumprod(dim=1).sum(dim=1).int()
