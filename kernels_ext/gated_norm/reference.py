"""Gated RMSNorm over groups of channels, the gate applied before the norm."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """RMSNorm(y · silu(z)) over consecutive groups of `group_size` channels (norm_before_gate=False in mamba-ssm).

    y, z (..., C); weight (C,). Computed in float32, returned in y's type.
    """
    gated = y.float() * torch.nn.functional.silu(z.float())
    grouped = gated.unflatten(-1, (-1, group_size))
    normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(y.dtype)
