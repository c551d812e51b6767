"""`reference` in Triton: one program per row of the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl
from kernels_ext.sampling.kernel import pick

FOUND = tl.constexpr(2**26)  # a match of n tokens that ends at e is worth n · FOUND + e


def launch_config(operator: str) -> dict:
    """Launch parameters of `accept_sampled` (blocks of the vocabulary) and `ngram_propose` (blocks of the text)."""
    return {"accept_sampled": {"BLOCK": 4096, "num_warps": 16}, "ngram_propose": {"BLOCK": 2048, "num_warps": 8}}[
        operator
    ]


def accept_greedy(
    chosen: Tensor, draft: Tensor, n_draft: Tensor, *, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.accept_greedy`."""
    return _accept_chosen(chosen, draft, n_draft, None, None, config)


def accept_injected(
    chosen: Tensor, draft: Tensor, n_draft: Tensor, uniforms: Tensor, rate: Tensor, *, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.accept_injected`."""
    return _accept_chosen(chosen, draft, n_draft, uniforms, rate, config)


def _accept_chosen(
    chosen: Tensor, draft: Tensor, n_draft: Tensor, uniforms: Tensor | None, rate: Tensor | None, config: dict | None
) -> tuple[Tensor, Tensor]:
    batch, proposals = draft.shape
    assert chosen.shape == (batch, proposals + 1)
    assert _rows_are_dense(chosen, draft) and (uniforms is None or _rows_are_dense(uniforms))
    n_accepted, following = (torch.empty(batch, dtype=torch.int32, device=draft.device) for _ in range(2))
    _accept_chosen_kernel[(batch,)](
        chosen,
        draft,
        n_draft,
        chosen if uniforms is None else uniforms,
        chosen if rate is None else rate,
        n_accepted,
        following,
        proposals,
        chosen.stride(0),
        draft.stride(0),
        0 if uniforms is None else uniforms.stride(0),
        INJECTED=uniforms is not None,
        BLOCK_K=_window_block(proposals),
        **pdl.launch_options({"num_warps": 1} | (config or {}), draft.device, batch),
    )
    return n_accepted, following


def accept_sampled(
    p: Tensor, q: Tensor | None, draft: Tensor, n_draft: Tensor, uniforms: Tensor, *, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.accept_sampled`."""
    batch, proposals = draft.shape
    vocabulary = p.shape[2]
    assert p.shape[1] == proposals + 1 and p.stride(2) == 1 and _rows_are_dense(draft, uniforms)
    assert q is None or (q.shape == (batch, proposals, vocabulary) and q.stride(2) == 1)
    n_accepted, following = (torch.empty(batch, dtype=torch.int32, device=draft.device) for _ in range(2))
    _accept_sampled_kernel[(batch,)](
        p,
        p if q is None else q,
        draft,
        n_draft,
        uniforms,
        n_accepted,
        following,
        vocabulary,
        proposals,
        p.stride(0),
        p.stride(1),
        0 if q is None else q.stride(0),
        0 if q is None else q.stride(1),
        draft.stride(0),
        uniforms.stride(0),
        HAS_Q=q is not None,
        BLOCK_K=_window_block(proposals),
        **pdl.launch_options(launch_config("accept_sampled") | (config or {}), draft.device, batch),
    )
    return n_accepted, following


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
    *,
    config: dict | None = None,
) -> None:
    """See `reference.advance`."""
    batch, proposals = draft.shape
    assert _rows_are_dense(draft, text, emitted, proposed, accepted)
    _advance_kernel[(batch,)](
        n_accepted,
        next,
        draft,
        text,
        lengths,
        folded,
        slots,
        ends,
        stop,
        emitted,
        counts,
        n_draft,
        proposed,
        accepted,
        rounds,
        2 * window - ring,
        proposals,
        stop.shape[0],
        draft.stride(0),
        text.stride(0),
        emitted.stride(0),
        proposed.stride(0),
        accepted.stride(0),
        BLOCK_K=_window_block(proposals),
        BLOCK_E=max(2, triton.next_power_of_2(stop.shape[0])),
        **pdl.launch_options({"num_warps": 1} | (config or {}), draft.device, batch),
    )


def ngram_propose(
    text: Tensor, lengths: Tensor, slots: Tensor, longest: int, k: int, *, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.ngram_propose`. Raises ValueError where a suffix and a position do not fit in 31 bits."""
    if longest > 31 or text.shape[1] >= FOUND.value:
        raise ValueError(
            f"look-up takes suffixes of at most 31 tokens in texts of fewer than {FOUND.value}, "
            f"got {longest} in {text.shape[1]}"
        )
    assert _rows_are_dense(text)
    batch = slots.shape[0]
    draft = torch.empty(batch, k, dtype=torch.int32, device=text.device)
    n_draft = torch.empty(batch, dtype=torch.int32, device=text.device)
    _ngram_kernel[(batch,)](
        text,
        lengths,
        slots,
        draft,
        n_draft,
        k,
        text.stride(0),
        LONGEST=longest,
        BLOCK_K=_window_block(k),
        **pdl.launch_options(launch_config("ngram_propose") | (config or {}), text.device, batch),
    )
    return draft, n_draft


def _rows_are_dense(*matrices: Tensor) -> bool:
    return all(m.stride(1) == 1 or m.shape[1] <= 1 for m in matrices)


def _window_block(proposals: int) -> int:
    """A power of two that holds a window of K + 1 tokens."""
    return max(2, triton.next_power_of_2(proposals + 1))


@triton.jit
def _accept_chosen_kernel(
    chosen,
    draft,
    n_draft,
    uniforms,
    rate,
    n_accepted,
    following,
    K,
    stride_chosen,
    stride_draft,
    stride_uniforms,
    INJECTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    at = tl.arange(0, BLOCK_K)
    real = (at < K) & (at < tl.load(n_draft + b))
    if INJECTED:
        u = tl.load(uniforms + b * stride_uniforms + at, mask=real, other=1.0)
        agrees = u < tl.load(rate + at, mask=real, other=0.0)
    else:
        own = tl.load(chosen + b * stride_chosen + at, mask=real, other=0)
        agrees = own == tl.load(draft + b * stride_draft + at, mask=real, other=0)
    n = tl.min(tl.where(real & agrees, BLOCK_K, at), 0)
    tl.store(n_accepted + b, n)
    tl.store(following + b, tl.load(chosen + b * stride_chosen + n))


@triton.jit
def _residual(p_row, q_row, at, V, token, subtract, HAS_Q: tl.constexpr):
    """max(p − q, 0), or p unless `subtract`."""
    p = tl.load(p_row + at, mask=at < V, other=0.0)
    if HAS_Q:
        q = tl.load(q_row + at, mask=(at < V) & subtract, other=0.0)
    else:
        q = tl.where((at == token) & subtract, 1.0, 0.0)
    return tl.maximum(p - q, 0.0)


@triton.jit
def _accept_sampled_kernel(
    p,
    q,
    draft,
    n_draft,
    uniforms,
    n_accepted,
    following,
    V,
    K,
    stride_p_row,
    stride_p,
    stride_q_row,
    stride_q,
    stride_draft,
    stride_uniforms,
    HAS_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    p += b * stride_p_row
    q += b * stride_q_row
    draft += b * stride_draft
    uniforms += b * stride_uniforms
    proposals = tl.load(n_draft + b)
    at = tl.arange(0, BLOCK_K)
    real = (at < K) & (at < proposals)
    tokens = tl.load(draft + at, mask=real, other=0)
    p_draft = tl.load(p + at.to(tl.int64) * stride_p + tokens, mask=real, other=0.0)
    if HAS_Q:
        q_draft = tl.load(q + at.to(tl.int64) * stride_q + tokens, mask=real, other=0.0)
    else:
        q_draft = tl.where(real, 1.0, 0.0)
    u = tl.load(uniforms + at, mask=real, other=0.0)
    agrees = real & (q_draft > 0.0) & (u * q_draft < p_draft)
    n = tl.min(tl.where(agrees, BLOCK_K, at), 0)
    tl.store(n_accepted + b, n)

    rejected = n < proposals
    token = tl.load(draft + n, mask=rejected, other=0)
    p_row = p + n.to(tl.int64) * stride_p
    q_row = q + n.to(tl.int64) * stride_q  # not read unless a proposal was rejected
    offsets = tl.arange(0, BLOCK)
    mass_p = tl.zeros([BLOCK], tl.float32)
    mass_residual = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        mass_p += tl.load(p_row + start + offsets, mask=start + offsets < V, other=0.0)
        mass_residual += _residual(p_row, q_row, start + offsets, V, token, rejected, HAS_Q)
    residual = tl.sum(mass_residual, 0)
    subtract = rejected & (residual > 0.0)
    target = tl.load(uniforms + K) * tl.where(subtract, residual, tl.sum(mass_p, 0))
    # Block by block up to the one in which the target is passed.
    start = 0
    latest = 0  # the latest block with a token to choose
    before = residual * 0.0
    mass = tl.sum(_residual(p_row, q_row, offsets, V, token, subtract, HAS_Q), 0)
    while (before + mass <= target) & (start + BLOCK < V):
        latest = tl.where(mass > 0.0, start, latest)
        before += mass
        start += BLOCK
        mass = tl.sum(_residual(p_row, q_row, start + offsets, V, token, subtract, HAS_Q), 0)
    passed = before + mass > target
    start = tl.where(passed | (mass > 0.0), start, latest)
    target = tl.where(passed, target, float("inf"))
    weight = _residual(p_row, q_row, start + offsets, V, token, subtract, HAS_Q)
    tl.store(following + b, pick(weight, start + offsets, before, target))


@triton.jit
def _advance_kernel(
    n_accepted,
    following,
    draft,
    text,
    lengths,
    folded,
    slots,
    ends,
    stop,
    emitted,
    counts,
    n_draft,
    proposed,
    accepted,
    rounds,
    shortfall,
    K,
    E,
    stride_draft,
    stride_text,
    stride_emitted,
    stride_proposed,
    stride_accepted,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    at = tl.arange(0, BLOCK_K)
    slot = tl.load(slots + b)
    if slot < 0:
        tl.store(emitted + b * stride_emitted + at, tl.full([BLOCK_K], -1, tl.int32), mask=at <= K)
        tl.store(counts + b, 0)
    else:
        kept = tl.load(n_accepted + b)
        tokens = tl.load(draft + b * stride_draft + at, mask=(at < K) & (at < kept), other=0)
        tokens = tl.where(at == kept, tl.load(following + b), tokens)
        stops = tl.load(stop + tl.arange(0, BLOCK_E), mask=tl.arange(0, BLOCK_E) < E, other=-1)
        is_stop = tl.max((tokens[:, None] == stops[None, :]).to(tl.int32), 1) > 0
        first_stop = tl.min(tl.where(is_stop & (at <= kept), at, BLOCK_K), 0)
        length = tl.load(lengths + slot)
        end = tl.load(ends + slot)
        n = tl.minimum(tl.minimum(kept, first_stop) + 1, end - length - 1)
        n = tl.maximum(n, 0)
        new = at < n
        tl.store(text + slot.to(tl.int64) * stride_text + length + 1 + at, tokens, mask=new)
        tl.store(emitted + b * stride_emitted + at, tl.where(new, tokens, -1), mask=at <= K)
        tl.store(counts + b, n)
        due = length - tl.load(folded + slot) + shortfall > 0
        tl.store(folded + slot, length, mask=due)
        tl.store(lengths + slot, length + n)
        tl.store(slots + b, -1, mask=(first_stop < n) | (length + 1 + n >= end))
        seen = proposed + b * stride_proposed + at
        tl.store(seen, tl.load(seen, mask=at < K, other=0) + 1, mask=(at < K) & (at < tl.load(n_draft + b)))
        agreed = accepted + b * stride_accepted + at
        tl.store(agreed, tl.load(agreed, mask=at < K, other=0) + 1, mask=(at < K) & (at < kept))
        tl.store(rounds + b, tl.load(rounds + b) + 1)


@triton.jit
def _ngram_kernel(
    text,
    lengths,
    slots,
    draft,
    n_draft,
    k,
    stride_text,
    LONGEST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    slot = tl.load(slots + b)
    live = slot >= 0
    slot = tl.maximum(slot, 0)
    row = text + slot.to(tl.int64) * stride_text
    last = tl.where(live, tl.load(lengths + slot), 0)  # where the last known token stands
    offsets = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.int32)
    for start in range(0, last, BLOCK):
        at = start + offsets
        matches = at < last
        for n in tl.static_range(LONGEST):
            inside = (at >= n) & (at < last)
            suffix = tl.load(row + last - n, mask=last >= n, other=-1)
            matches = matches & inside & (tl.load(row + at - n, mask=inside, other=-1) == suffix)
            best = tl.maximum(best, tl.where(matches, (n + 1) * FOUND + at, 0))
    found = tl.max(best, 0)
    end = found % FOUND
    proposals = tl.where(found > 0, tl.minimum(last - end, k), 0)
    i = tl.arange(0, BLOCK_K)
    known = (i < k) & (i < proposals)
    tl.store(draft + b * k + i, tl.load(row + end + 1 + i, mask=known, other=0), mask=i < k)
    tl.store(n_draft + b, proposals)
