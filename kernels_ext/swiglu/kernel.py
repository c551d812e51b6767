"""Triton twin of `reference.silu_mul`, forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch_config() -> dict:
    """BLOCK_F outputs of one row per program."""
    return {"BLOCK_F": 512, "num_warps": 4}


@triton.jit
def _silu_mul_kernel(gate_up, out, F, row_stride, BLOCK_F: tl.constexpr):
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
    config = launch_config() | (config or {})
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(len(rows), triton.cdiv(width, config["BLOCK_F"]))](rows, out, width, rows.stride(0), **config)
    return out
