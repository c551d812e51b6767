"""Triton twin of `reference.silu_mul`, forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl


def launch_config(width: int) -> dict:
    """BLOCK_F outputs of one row per program, without a remainder where that is possible; 16 bytes a thread."""
    block = next((block for block in (1024, 512, 256) if width % block == 0), 1024)
    return {"BLOCK_F": block, "num_warps": block // 256}


@triton.jit
def _silu_mul_kernel(gate_up, out, F, row_stride, BLOCK_F: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    source = gate_up + row * row_stride + f
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, *, config: dict | None = None) -> Tensor:
    """As the reference; gate_up's rows may be strided."""
    width = gate_up.shape[-1] // 2
    assert gate_up.shape[-1] == 2 * width
    rows = gate_up.reshape(-1, 2 * width)
    assert rows.stride(1) == 1
    config = launch_config(width) | (config or {})
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (len(rows), triton.cdiv(width, config["BLOCK_F"]))
    options = pdl.launch_options(config, gate_up.device, grid[0] * grid[1])
    _silu_mul_kernel[grid](rows, out, width, rows.stride(0), **options)
    return out
