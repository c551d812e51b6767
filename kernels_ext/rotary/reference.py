"""Rotation by position of a Mamba-2 layer's B and C, where a mixer has the rotary positions of attention. Decoding
turns them where it convolves them, see `kernels_ext.causal_conv`."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head of every token turned by the token's angles (2104.09864 §3.2.2, halves as in Llama).

    x (B, L, H, P); cos, sin (B, L, P / 2) float32. Gives x's shape and type, contiguous: rotates in float32 and rounds
    once.
    """
    c, s = cos[:, :, None], sin[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)
