"""Attention of a window of tokens over a static cache of keys and values, and the rotation that fills the cache.

Legend: B rows of the batch, T window tokens, S slots of the cache, M positions of a slot, H query heads, G key-value
groups (H = G·R), P headdim. lengths (S,) int32: positions of a slot before the round's window; slots (B,) int32: each
row's slot, at most once, −1 for padding: its output is zero and no cache is touched. Token i of a call has position
lengths[slot] + offset + i, which must be below M. What lies in the cache beyond may be anything, NaN included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels_ext.rms_norm.reference import rms_norm
from kernels_ext.slots import writing_rows


def rope_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    slots: Tensor,
    n_heads: int,
    offset: int = 0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate q and k by their positions (2104.09864 §3.2.2, halves as in Llama) and append k and v to the caches.

    qkv (B, T, (H + 2G)·P): rows q | k | v, last dimension contiguous; k_cache, v_cache (S, G, M, P), written in place;
    cos, sin (≥ M, P / 2) float32 by position, or both None: nothing is rotated; n_heads H. q_norm, k_norm (P,), both or
    none: gains of an RMSNorm over each head of q and k, with eps, before they are rotated. Rotates in float32; returns
    q (B, T, H, P) in qkv's type.
    """
    batch, length, _ = qkv.shape
    groups, last, headdim = k_cache.shape[1], k_cache.shape[2] - 1, k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, headdim))  # (B, T, H + 2G, P)
    tokens = torch.arange(length, device=qkv.device)
    position = (lengths[slots.clamp(min=0).long(), None] + offset + tokens).clamp(max=last)  # (B, T)
    q, k, v = heads.split((n_heads, groups, groups), dim=2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps).to(qkv.dtype), rms_norm(k, k_norm, eps).to(qkv.dtype)
    if cos is not None and sin is not None:
        q, k = (_rotate(x.float(), cos[position], sin[position]).to(qkv.dtype) for x in (q, k))

    source, slot, writes = writing_rows(slots)
    at = (slot[:, None, None], torch.arange(groups, device=qkv.device), position[source][..., None])  # (B, T, G)
    for cache, values in ((k_cache, k), (v_cache, v)):
        cache[at] = torch.where(writes[:, None, None, None], values[source].to(cache.dtype), cache[at])
    return torch.where((slots >= 0)[:, None, None, None], q, 0).contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, P); cos, sin (B, T, P / 2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slots: Tensor,
    offset: int = 0,
    splits: int | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(q·k / √P)·v; query i of the window sees the positions up to its own, which are in the cache already.

    q (B, T, H, P); k_cache, v_cache (S, G, M, P) in q's type. `splits` is for the kernel alone. sliding_window: how
    many positions a query sees, its own the last of them; None is all. Products and softmax in float32; returns
    (B, T, H, P) in q's type.
    """
    batch, length, heads, headdim = q.shape
    groups, positions = k_cache.shape[1:3]
    own = slots.clamp(min=0).long()
    if not q.is_cuda:  # there the host may ask, and what no token sees is not read
        positions = min(positions, int(lengths[own].max()) + offset + length)
    seen_by_last = (lengths[own] + offset)[:, None] + torch.arange(length, device=q.device)  # (B, T)
    keys = torch.arange(positions, device=q.device)
    visible = keys <= seen_by_last[..., None]  # (B, T, M)
    if sliding_window is not None:
        visible &= keys > seen_by_last[..., None] - sliding_window
    k = k_cache[:, :, :positions][own].float()  # (B, G, M, P)
    v = torch.where(visible.any(1)[:, None, :, None], v_cache[:, :, :positions][own], 0).float()
    grouped = q.float().view(batch, length, groups, -1, headdim).permute(0, 2, 3, 1, 4)  # (B, G, R, T, P)
    scores = grouped.reshape(batch, groups, -1, headdim) @ k.transpose(-1, -2) / math.sqrt(headdim)
    scores = scores.view(batch, groups, -1, length, positions).masked_fill(~visible[:, None, None], float("-inf"))
    out = (scores.softmax(dim=-1).view(batch, groups, -1, positions) @ v).view(batch, groups, -1, length, headdim)
    out = out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, headdim).to(q.dtype)
    return torch.where((slots >= 0)[:, None, None, None], out, 0).contiguous()
