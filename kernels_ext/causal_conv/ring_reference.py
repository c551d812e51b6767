"""Causal convolution of a window of tokens whose past inputs lie in a ring, with what follows it in a Mamba layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_ext.rotary.reference import rotate_heads
from kernels_ext.slots import writing_rows


def conv_ring_update(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor,
    slots: Tensor,
    silu: bool,
    offset: int = 0,
    dt: Tensor | None = None,
    dt_bias: Tensor | None = None,
    ring_x: Tensor | None = None,
    ring_B: Tensor | None = None,
    ring_dt: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    first_turned: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """y_p = bias + Σ_k weight_k · x_{p−W+1+k} at positions p = lengths[slot] + offset + i, and SiLU if `silu`.

    x (B, T, C): the window's inputs, last dimension contiguous; ring (S, R, C) in x's type holds the input of position
    p at p mod R, and the window's are written there: R ≥ W − 1 + window. Inputs of negative positions are zero. weight
    (C, W); bias (C,) or None; lengths (S,) int32; slots (B,) int32, −1 for padding: its results are zero and no cache
    is touched.

    dt (B, T, H), raw, gives dt_out = softplus(dt + dt_bias) in float32; dt_bias (H,) or None. With ring_x (S, L, G, P),
    ring_B (S, L, G, N) and ring_dt (S, H, L) float32, the channels being x | B | C, the convolved x and B and dt_out
    are also written there, position p at p mod L (2408.15237 §5: the cache from which a window is replayed).

    rope: cos and sin (≥ M, P / 2) float32 by position, M above every position of the window. Channels from first_turned
    on, a multiple of P, are then B and C by heads of P channels, each turned by its position (2104.09864 §3.2.2, halves
    as in Llama) after y was rounded, in float32, and rounded again; what goes to ring_B is turned.

    Returns y (B, T, C) in x's type, summed in float32 and rounded, and dt_out (B, T, H) or None.
    """
    batch, length, _ = x.shape
    width = weight.shape[1]
    live = (slots >= 0)[:, None, None]
    own = slots.clamp(min=0).long()
    start = lengths[own].long() + offset  # (B,)
    back = start[:, None] + torch.arange(1 - width, 0, device=x.device)  # (B, W − 1)
    past = torch.where(back[..., None] >= 0, ring[own[:, None], back % ring.shape[1]], 0)
    inputs = torch.cat([past, x], dim=1).float()  # (B, W − 1 + T, C)
    y = inputs[:, width - 1 :] * weight[:, -1].float()
    for k in range(width - 1):
        y = y + inputs[:, k : k + length] * weight[:, k].float()
    if bias is not None:
        y = y + bias.float()
    y = torch.where(live, F.silu(y) if silu else y, 0).to(x.dtype)
    if rope is not None:
        cos, sin = rope
        at = (start[:, None] + torch.arange(length, device=x.device)).clamp(max=cos.shape[0] - 1)
        heads = y[..., first_turned:].unflatten(-1, (-1, 2 * cos.shape[1]))
        y = torch.cat([y[..., :first_turned], rotate_heads(heads, cos[at], sin[at]).flatten(-2)], dim=-1)

    source, slot, writes = writing_rows(slots)
    position = lengths[slot, None].long() + offset + torch.arange(length, device=x.device)  # (B, T)

    def store(ring: Tensor, values: Tensor) -> None:
        """values (B, T, …) to ring (S, L, …)."""
        at = (slot[:, None], position % ring.shape[1])
        keep = writes.view(-1, *[1] * (values.dim() - 1))
        ring[at] = torch.where(keep, values[source].to(ring.dtype), ring[at])

    store(ring, x)
    dt_out = None
    if dt is not None:
        raw = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        dt_out = torch.where(live, F.softplus(raw), 0)
    if ring_x is not None:
        assert ring_B is not None and ring_dt is not None and dt_out is not None
        shape_x, shape_B = ring_x.shape[2:], ring_B.shape[2:]
        x_B = y.split([shape_x.numel(), shape_B.numel(), y.shape[-1] - shape_x.numel() - shape_B.numel()], dim=-1)
        store(ring_x, x_B[0].unflatten(-1, shape_x))
        store(ring_B, x_B[1].unflatten(-1, shape_B))
        store(ring_dt.transpose(1, 2), dt_out)
    return y, dt_out
