"""Triton twin of `reference.rotate_window_`: B and C of a window, and B in the ring, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl


def launch_config() -> dict:
    """BLOCK_HEADS heads of one token per program, as many as `rope_append` takes."""
    return {"BLOCK_HEADS": 16, "num_warps": 4}


@triton.jit(do_not_specialize=["offset"])
def _rotate_window_kernel(
    convolved, cos, sin, lengths, slots, ring_B, offset, ring_stride_s, ring_stride_l,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, L: tl.constexpr, HAS_RING: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)  # of B's G, then of C's H
    d = tl.arange(0, BLOCK_HALF)
    slot = tl.load(slots + token // T).to(tl.int64)
    if slot < 0:
        return

    present = (head < G + H)[:, None] & (d < HALF)[None, :]
    at = convolved + (token * (2 * G + H) + G + head[:, None]) * (2 * HALF) + d[None, :]
    first = tl.load(at, mask=present, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=present, other=0.0).to(tl.float32)
    position = tl.load(lengths + slot) + offset + (token % T).to(tl.int32)
    c = tl.load(cos + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
    first_out = (first * c - second * s).to(convolved.dtype.element_ty)
    second_out = (second * c + first * s).to(convolved.dtype.element_ty)
    tl.store(at, first_out, mask=present)
    tl.store(at + HALF, second_out, mask=present)
    if HAS_RING:
        is_B = present & (head < G)[:, None]
        to = ring_B + slot * ring_stride_s + (position % L) * ring_stride_l + head[:, None] * (2 * HALF) + d[None, :]
        tl.store(to, first_out, mask=is_B)
        tl.store(to + HALF, second_out, mask=is_B)


def rotate_window_(
    convolved: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    slots: Tensor,
    groups: int,
    ring_B: Tensor | None = None,
    offset: int = 0,
    *,
    config: dict | None = None,
) -> None:
    """As the reference, in one launch."""
    batch, length, width = convolved.shape
    half = cos.shape[1]
    heads = width // (2 * half) - 2 * groups
    assert (2 * groups + heads) * 2 * half == width
    assert convolved.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert ring_B is None or ring_B[0, 0].is_contiguous()
    config = launch_config() | (config or {})
    grid = (batch * length, triton.cdiv(groups + heads, config["BLOCK_HEADS"]))
    _rotate_window_kernel[grid](
        convolved, cos, sin, lengths, slots, ring_B, offset, *((0, 0) if ring_B is None else ring_B.stride()[:2]),
        T=length, H=heads, G=groups, HALF=half, L=1 if ring_B is None else ring_B.shape[1],
        HAS_RING=ring_B is not None, BLOCK_HALF=triton.next_power_of_2(half),
        **pdl.launch_options(config, convolved.device, grid[0] * grid[1]),
    )  # fmt: skip
