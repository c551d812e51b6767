"""Depthwise causal convolution over time, with state and document boundaries."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """y_t = bias + Σ_k weight_k · x_{t−W+1+k}, channel by channel; taps never cross a document's start.

    x (B, L, C); weight (C, W); bias (C,); seq_idx (B, L). initial_state (B, W−1, C) holds the inputs before the first
    token,
    of its document; zeros if None. Returns (B, L, C) in x's type.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, channels)
    history = torch.cat([initial_state.to(x.dtype), x], dim=1)  # (B, W − 1 + L, C)
    y = x * weight[:, -1].to(x.dtype)
    for k in range(width - 1):
        tap = history[:, k : k + length] * weight[:, k].to(x.dtype)
        if seq_idx is not None:
            back = width - 1 - k
            first = seq_idx[:, :1].expand(-1, min(back, length))
            same = seq_idx == torch.cat([first, seq_idx[:, : length - back]], dim=1)[:, :length]
            tap = tap * same[..., None]
        y = y + tap
    if bias is not None:
        y = y + bias.to(x.dtype)
    return torch.nn.functional.silu(y) if silu else y
