"""Triton twin of `reference.gated_rms_norm`, forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch_config(group_size: int) -> dict:
    """BLOCK_M groups per program: about a thousand channels, so that few rows still spread over many programs."""
    block = triton.next_power_of_2(group_size)
    return {"BLOCK_M": max(1, 1024 // block), "num_warps": 8 if block >= 4096 else 4}


@triton.jit
def _gated_rms_norm_kernel(
    y, z, weight, out, n_groups_total, z_stride, eps,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # of a group of channels of a row
    row = index // GROUPS
    start = (index % GROUPS) * GROUP_SIZE
    column = tl.arange(0, BLOCK_SIZE)
    mask = (index < n_groups_total)[:, None] & (column < GROUP_SIZE)[None, :]
    at = index[:, None] * GROUP_SIZE + column[None, :]
    channel = start[:, None] + column[None, :]
    gate = tl.load(z + row[:, None] * z_stride + channel, mask=mask, other=0.0).to(tl.float32)
    gated = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(gated * gated, 1) / GROUP_SIZE + eps)
    weights = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (gated * scale[:, None] * weights).to(out.dtype.element_ty), mask=mask)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, *, config: dict | None = None
) -> Tensor:
    """As the reference; y (…, C) contiguous, z (…, C) may be a slice of wider rows."""
    channels = y.shape[-1]
    assert y.is_contiguous() and weight.is_contiguous() and channels % group_size == 0
    z = z.reshape(-1, channels)
    assert z.stride(1) == 1
    config = launch_config(group_size) | (config or {})
    out = torch.empty_like(y)
    groups = y.numel() // group_size
    _gated_rms_norm_kernel[(triton.cdiv(groups, config["BLOCK_M"]),)](
        y, z, weight, out, groups, z.stride(0), eps,
        GROUPS=channels // group_size, GROUP_SIZE=group_size, BLOCK_SIZE=triton.next_power_of_2(group_size), **config,
    )  # fmt: skip
    return out
