"""One round's share of a mixer's window: softmax attention over the ring of inputs; the gates of scan and window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def window_gate(
    y: Tensor,
    C: Tensor,
    z: Tensor,
    weight: Tensor,
    sink: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    lengths: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
) -> Tensor:
    """(y | a) · silu(z) · weight, a_t = (e^{s_0} v_0 + Σ_j e^{s_j} x_j) / (e^{s_0} + Σ_j e^{s_j}) over the last
    `window` positions j ≥ 0, t's own among them; s_j = C_t·B_j / √P, s_0 = C_t·k_0 / √P with the sink (k_0, v_0).

    y (B, T, H, P), the scan's output; C (B, T, H, P), turned by position; z (B, T, 2·H·P); weight (2·H·P,); sink
    (2, G, P), H a multiple of G. ring_x, ring_B (S, L, G, P) hold position p at p mod L, the window's own tokens
    already, L ≥ window + T − 1. lengths (S,) int32; token i of row b has position lengths[slot] + offset + i. slots
    (B,) int32, −1 for padding: zeros come out. Returns (B, T, 2·H·P) in ring_x's type; float32 inside.
    """
    batch, length, heads, width = C.shape
    groups = ring_x.shape[2]
    own = slots.clamp(min=0).long()
    position = lengths[own, None].long() + offset + torch.arange(length, device=C.device)  # (B, T)
    back = position[..., None] + torch.arange(1 - window, 1, device=C.device)  # (B, T, W)
    at = own[:, None, None], back % ring_x.shape[1]
    present = (back >= 0)[..., None, None]
    keys, values = (torch.where(present, ring[at], 0).float() for ring in (ring_B, ring_x))  # (B, T, W, G, P)
    queries = C.float().unflatten(2, (groups, -1)) * width**-0.5  # (B, T, G, R, P)
    k_0, v_0 = sink.float()
    scores = torch.einsum("btgrp,btwgp->btgrw", queries, keys)
    scores = scores.masked_fill(~present[:, :, None, None, :, 0, 0], -torch.inf)
    first = torch.einsum("btgrp,gp->btgr", queries, k_0)[..., None]
    weights = torch.cat([first, scores], dim=-1).softmax(-1)
    attended = torch.einsum("btgrw,btwgp->btgrp", weights[..., 1:], values) + weights[..., :1] * v_0[:, None]
    both = torch.cat([y.float().reshape(batch, length, -1), attended.reshape(batch, length, -1)], dim=-1)
    live = (slots >= 0)[:, None, None]
    return torch.where(live, both * silu(z.float()) * weight.float(), 0).to(ring_x.dtype)
