"""Triton twin of `reference.rms_norm`, forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl


def launch_config(rows: int, d: int) -> dict:
    """One row per program: 16 bytes of it a thread, more where the rows alone fill the GPU."""
    warps = max(1, min(triton.next_power_of_2(d) // 256, 16))
    return {"num_warps": max(1, warps // 4) if rows >= 512 else warps}


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    weights = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    values = tl.load(x + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    normed = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * D + d, (weights * normed).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, config: dict | None = None) -> Tensor:
    """As the reference; x's rows may be strided."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    assert rows.stride(1) == 1 and weight.is_contiguous()
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    config = launch_config(len(rows), d) | (config or {})
    _rms_norm_kernel[(len(rows),)](
        rows, weight, out, rows.stride(0), eps,
        D=d, BLOCK_D=triton.next_power_of_2(d), **pdl.launch_options(config, x.device, len(rows)),
    )  # fmt: skip
    return out
