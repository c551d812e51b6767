"""Triton twin of `reference.rotate_heads`, with its gradient: the turn back by the same angles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.layout import rows_contiguous


def launch_config() -> dict:
    """BLOCK_ROWS heads of tokens per program: 64 halves of 32 numbers are 16 bytes a thread and load."""
    return {"BLOCK_ROWS": 64, "num_warps": 4}


@triton.jit(do_not_specialize=["length", "rows"])
def _rotate_kernel(
    x, cos, sin, y, length, rows, stride_batch, stride_token, stride_head,
    H: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_HALF)
    present = (row < rows)[:, None] & (d < HALF)[None, :]
    token = (row // H).to(tl.int64)  # of all rows of the batch
    from_x = token // length * stride_batch + token % length * stride_token + row % H * stride_head
    first = tl.load(x + from_x[:, None] + d[None, :], mask=present, other=0.0).to(tl.float32)
    second = tl.load(x + from_x[:, None] + (HALF + d)[None, :], mask=present, other=0.0).to(tl.float32)
    c = tl.load(cos + token[:, None] * HALF + d[None, :], mask=present, other=0.0)
    s = tl.load(sin + token[:, None] * HALF + d[None, :], mask=present, other=0.0)
    if BACK:
        s = -s
    to = y + row.to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
    tl.store(to, (first * c - second * s).to(y.dtype.element_ty), mask=present)
    tl.store(to + HALF, (second * c + first * s).to(y.dtype.element_ty), mask=present)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate_heads`; differentiates in x, through torch.compile as well."""
    return torch.ops.mamballama.rotate_heads(x, cos, sin, False)


@torch.library.custom_op(
    "mamballama::rotate_heads", mutates_args=(), schema="(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor"
)
def _turned(x, cos, sin, back):
    x, cos, sin = rows_contiguous(x), cos.contiguous(), sin.contiguous()
    batch, length, heads, headdim = x.shape
    y = _like(x, cos, sin, back)
    config = launch_config()
    rows = batch * length * heads
    _rotate_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
        x, cos, sin, y, length, rows, *x.stride()[:3],
        H=heads, HALF=headdim // 2, BACK=back, BLOCK_HALF=triton.next_power_of_2(headdim // 2), **config,
    )  # fmt: skip
    return y


@_turned.register_fake
def _like(x, cos, sin, back):
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dy):
    return torch.ops.mamballama.rotate_heads(dy, *ctx.saved_tensors, not ctx.back), None, None, None


_turned.register_autograd(_differentiate, setup_context=_remember)
