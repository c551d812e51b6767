"""Rotation by position of a Mamba-2 layer's B and C, where a mixer has the rotary positions of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_ext.slots import writing_rows


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head of every token turned by the token's angles (2104.09864 §3.2.2, halves as in Llama).

    x (B, L, H, P); cos, sin (B, L, P / 2) float32. Gives x's shape and type, contiguous: rotates in float32 and rounds
    once.
    """
    c, s = cos[:, :, None], sin[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


def rotate_window_(
    convolved: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    slots: Tensor,
    groups: int,
    ring_B: Tensor | None = None,
    offset: int = 0,
) -> None:
    """Turn B and C of each token by its position (2104.09864 §3.2.2, halves as in Llama), in place.

    convolved (B, T, (2·G + H)·P), contiguous: what `conv_ring_update` gave, channels x (G·P) | B (G·P) | C (H·P) with
    d_state = headdim P; x stays as it is. cos, sin (≥ M, P / 2) float32 by position; token i of row b has position
    lengths[slot] + offset + i, which must be below M. With ring_B (S, L, G, P) the turned B is also written there,
    position p at p mod L. lengths (S,) int32; slots (B,) int32, each at most once, −1 for padding: nothing of that row
    is touched. Rotates in float32 and rounds once.
    """
    headdim = 2 * cos.shape[1]
    live = (slots >= 0)[:, None, None, None]
    own = slots.clamp(min=0).long()
    tokens = torch.arange(convolved.shape[1], device=convolved.device)
    position = (lengths[own, None].long() + offset + tokens).clamp(max=cos.shape[0] - 1)  # (B, T)
    BC = convolved.unflatten(-1, (-1, headdim))[:, :, groups:]  # (B, T, G + H, P), a view
    c, s = cos[position][:, :, None], sin[position][:, :, None]
    first, second = BC.float().chunk(2, dim=-1)
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(convolved.dtype)
    BC.copy_(torch.where(live, turned, BC))
    if ring_B is not None:
        source, slot, writes = writing_rows(slots)
        at = (slot[:, None], position[source] % ring_B.shape[1])
        B = turned[source, :, :groups].to(ring_B.dtype)
        ring_B[at] = torch.where(writes[:, None, None, None], B, ring_B[at])
