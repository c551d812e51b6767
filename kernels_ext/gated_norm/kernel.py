"""Triton twin of `reference.gated_rms_norm`, forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl

MULTIPROCESSORS = 132


def launch_config(groups: int, group_size: int) -> dict:
    """BLOCK_M of all `groups` groups of channels per program: up to about a thousand channels, fewer where that leaves
    multiprocessors without work; 16 bytes a thread."""
    block = triton.next_power_of_2(group_size)
    most = min(max(1, 1024 // block), triton.next_power_of_2(triton.cdiv(groups, MULTIPROCESSORS)))
    return {"BLOCK_M": most, "num_warps": max(1, min(most * block // 256, 8))}


@triton.jit
def _gated_rms_norm_kernel(
    y, z, weight, out, n_groups_total, z_stride, eps,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # of a group of channels of a row
    row = index // GROUPS
    start = (index % GROUPS) * GROUP_SIZE
    column = tl.arange(0, BLOCK_SIZE)
    mask = (index < n_groups_total)[:, None] & (column < GROUP_SIZE)[None, :]
    at = index[:, None] * GROUP_SIZE + column[None, :]
    channel = start[:, None] + column[None, :]
    weights = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    gate = tl.load(z + row[:, None] * z_stride + channel, mask=mask, other=0.0).to(tl.float32)
    gated = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    gated = gated * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(gated * gated, 1) / GROUP_SIZE + eps)
    tl.store(out + at, (gated * scale[:, None] * weights).to(out.dtype.element_ty), mask=mask)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, *, config: dict | None = None
) -> Tensor:
    """As the reference; y (…, C) contiguous, z (…, C) may be a slice of wider rows."""
    channels = y.shape[-1]
    assert y.is_contiguous() and weight.is_contiguous() and channels % group_size == 0
    z = z.reshape(-1, channels)
    assert z.stride(1) == 1
    out = torch.empty_like(y)
    groups = y.numel() // group_size
    config = launch_config(groups, group_size) | (config or {})
    programs = triton.cdiv(groups, config["BLOCK_M"])
    _gated_rms_norm_kernel[(programs,)](
        y, z, weight, out, groups, z.stride(0), eps,
        GROUPS=channels // group_size, GROUP_SIZE=group_size, BLOCK_SIZE=triton.next_power_of_2(group_size),
        **pdl.launch_options(config, y.device, programs),
    )  # fmt: skip
    return out
