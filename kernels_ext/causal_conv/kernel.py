"""Triton twin of `ring_reference.conv_ring_update`: convolution, dt and all cache writes of a layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl

MULTIPROCESSORS = 132


def launch_config(batch: int, tokens: int, channels: int) -> dict:
    """BLOCK_C channels per program, all T tokens of a row at once; few rows are spread over many programs."""
    if batch * triton.cdiv(channels, 512) >= 2 * MULTIPROCESSORS:
        return {"BLOCK_C": 512, "num_warps": 4}
    return {"BLOCK_C": 128, "num_warps": 4 if tokens > 1 else 2}


@triton.jit
def _own(weight, bias, c, mask, weight_stride_c, W: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    """What of channels c the kernel before does not write: bias and the weight of the token itself."""
    added = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BIAS:
        added += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    return added, tl.load(weight + c * weight_stride_c + (W - 1), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sums(
    x_row, ring_row, weight, added, last_weight, c, mask, start, live, x_stride_t, ring_stride_r, weight_stride_c,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Channels c of the convolution, rounded, and the window's own inputs, both (BLOCK_T, BLOCK_C)."""
    i = tl.arange(0, BLOCK_T)
    in_window = (i < T)[:, None] & mask[None, :]
    tap_weights = weight + c * weight_stride_c
    # The sum starts with what does not wait for the row's length.
    window = tl.load(x_row + i[:, None] * x_stride_t + c[None, :], mask=in_window, other=0.0)
    acc = added[None, :] + window.to(tl.float32) * last_weight[None, :]
    for k in tl.static_range(W - 1):
        if W - 1 - k < T:
            back = i - (W - 1) + k  # counted from the window's first token
            at = x_row + back[:, None] * x_stride_t + c[None, :]
            from_x = tl.load(at, mask=in_window & (back >= 0)[:, None], other=0.0)
            tap_weight = tl.load(tap_weights + k, mask=mask, other=0.0).to(tl.float32)
            acc += from_x.to(tl.float32) * tap_weight[None, :]
    for k in tl.static_range(W - 1):
        back = i - (W - 1) + k
        position = start + back
        past = in_window & ((back < 0) & (position >= 0) & live)[:, None]
        from_ring = tl.load(ring_row + (position % R)[:, None] * ring_stride_r + c[None, :], mask=past, other=0.0)
        tap_weight = tl.load(tap_weights + k, mask=mask, other=0.0).to(tl.float32)
        acc += from_ring.to(tl.float32) * tap_weight[None, :]
    if SILU:
        acc = acc * tl.sigmoid(acc)
    return tl.where(live, acc, 0.0).to(DTYPE), window


@triton.jit
def _convolve(
    x, ring, weight, bias, y, ring_x, ring_B, cos, sin,
    lengths, slots, offset, b, block, channels, channels_x, channels_B, first_turned,
    x_stride_b, x_stride_t, ring_stride_s, ring_stride_r,
    ring_x_stride_s, ring_x_stride_l, ring_B_stride_s, ring_B_stride_l, weight_stride_c,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RING: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_T)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    added, last_weight = _own(weight, bias, c, in_c, weight_stride_c, W, HAS_BIAS, BLOCK_C)
    if HALF > 0:
        # The other half of a channel's head may be another program's, so each computes what it needs of it.
        turned = in_c & (c >= first_turned)
        d = (c - first_turned) % (2 * HALF)
        other = tl.where(d < HALF, c + HALF, c - HALF)
        other_added, other_weight = _own(weight, bias, other, turned, weight_stride_c, W, HAS_BIAS, BLOCK_C)
    if PDL:
        gdc_wait()
    slot = tl.load(slots + b).to(tl.int64)
    live = slot >= 0
    start = tl.load(lengths + slot, mask=live, other=0) + offset
    position = start + i
    x_row = x + b * x_stride_b
    ring_row = ring + slot * ring_stride_s
    result, window = _sums(
        x_row, ring_row, weight, added, last_weight, c, in_c, start, live, x_stride_t, ring_stride_r, weight_stride_c,
        T, W, R, SILU, BLOCK_T, BLOCK_C, y.dtype.element_ty,
    )  # fmt: skip
    if HALF > 0:
        half, _ = _sums(
            x_row, ring_row, weight, other_added, other_weight, other, turned, start, live, x_stride_t, ring_stride_r,
            weight_stride_c, T, W, R, SILU, BLOCK_T, BLOCK_C, y.dtype.element_ty,
        )  # fmt: skip
        in_table = ((i < T) & live)[:, None] & turned[None, :]
        at = position[:, None] * HALF + (d % HALF)[None, :]
        cosine = tl.load(cos + at, mask=in_table, other=1.0)
        sine = tl.load(sin + at, mask=in_table, other=0.0)
        sine = tl.where((d < HALF)[None, :], -sine, sine)
        result = (result.to(tl.float32) * cosine + half.to(tl.float32) * sine).to(result.dtype)
    tl.store(y + (b * T + i[:, None]) * channels + c[None, :], result, mask=(i < T)[:, None] & in_c[None, :])

    in_window = (i < T)[:, None] & in_c[None, :] & live
    tl.store(ring_row + (position % R)[:, None] * ring_stride_r + c[None, :], window, mask=in_window)
    if HAS_RING:
        column = (position % L)[:, None]
        to_x = ring_x + slot * ring_x_stride_s + column * ring_x_stride_l + c[None, :]
        tl.store(to_x, result, mask=in_window & (c < channels_x)[None, :])
        to_B = ring_B + slot * ring_B_stride_s + column * ring_B_stride_l + (c - channels_x)[None, :]
        is_B = (c >= channels_x) & (c < channels_x + channels_B)
        tl.store(to_B, result, mask=in_window & is_B[None, :])


@triton.jit
def _softplus_dt(
    dt, dt_bias, dt_out, ring_dt,
    lengths, slots, offset, b, heads, dt_stride_b, dt_stride_t, ring_dt_stride_s, ring_dt_stride_h, ring_dt_stride_l,
    T: tl.constexpr, L: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_RING: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    mask = (i < T)[:, None] & (h < heads)[None, :]
    added = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if HAS_DT_BIAS:
        added = tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    slot = tl.load(slots + b).to(tl.int64)
    raw = tl.load(dt + b * dt_stride_b + i[:, None] * dt_stride_t + h[None, :], mask=mask, other=0.0)
    raw = raw.to(tl.float32) + added[None, :]
    live = slot >= 0
    start = tl.load(lengths + slot, mask=live, other=0) + offset
    # log(1 + e) loses the digits of a small e; log(u)·e/(u − 1) with u = 1 + e rounded does not (Kahan).
    e = tl.exp(tl.minimum(raw, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    value = tl.where(raw <= 20.0, log1p, raw)
    value = tl.where(mask & live, value, 0.0)
    tl.store(dt_out + (b * T + i[:, None]) * heads + h[None, :], value, mask=mask)
    if HAS_RING:
        column = ((start + i) % L)[:, None]
        to = ring_dt + slot * ring_dt_stride_s + h[None, :] * ring_dt_stride_h + column * ring_dt_stride_l
        tl.store(to, value, mask=mask & live)


@triton.jit(do_not_specialize=["offset"])
def _conv_ring_kernel(
    x, ring, weight, bias, lengths, slots, y, dt, dt_bias, dt_out, ring_x, ring_B, ring_dt, cos, sin, offset,
    channels, channels_x, channels_B, first_turned, heads, x_stride_b, x_stride_t, ring_stride_s, ring_stride_r,
    dt_stride_b, dt_stride_t, ring_x_stride_s, ring_x_stride_l, ring_B_stride_s, ring_B_stride_l,
    ring_dt_stride_s, ring_dt_stride_h, ring_dt_stride_l, weight_stride_c,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DT: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_RING: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block * BLOCK_C < channels:
        _convolve(
            x, ring, weight, bias, y, ring_x, ring_B, cos, sin, lengths, slots, offset, b, block,
            channels, channels_x, channels_B, first_turned, x_stride_b, x_stride_t, ring_stride_s, ring_stride_r,
            ring_x_stride_s, ring_x_stride_l, ring_B_stride_s, ring_B_stride_l, weight_stride_c,
            T, W, R, L, SILU, HAS_BIAS, HAS_RING, HALF, BLOCK_T, BLOCK_C, PDL,
        )  # fmt: skip
    elif HAS_DT:  # the last program of a row
        _softplus_dt(
            dt, dt_bias, dt_out, ring_dt, lengths, slots, offset, b, heads, dt_stride_b, dt_stride_t,
            ring_dt_stride_s, ring_dt_stride_h, ring_dt_stride_l, T, L, HAS_DT_BIAS, HAS_RING, BLOCK_T, BLOCK_H, PDL,
        )  # fmt: skip


def conv_ring_update(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor,
    slots: Tensor,
    silu: bool,
    offset: int = 0,
    dt: Tensor | None = None,
    dt_bias: Tensor | None = None,
    ring_x: Tensor | None = None,
    ring_B: Tensor | None = None,
    ring_dt: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    first_turned: int = 0,
    *,
    config: dict | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the reference; a program reads and writes its own channels' slots of the rings and no other's."""
    batch, length, channels = x.shape
    assert x.stride(2) == 1 and ring.stride(2) == 1 and weight.stride(1) == 1
    assert ring.shape[1] >= weight.shape[1] - 1 + length and ring.dtype == x.dtype
    assert dt is None or dt.stride(2) == 1
    config = launch_config(batch, length, channels) | (config or {})
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    dt_out = None if dt is None else torch.empty(dt.shape, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(channels, config["BLOCK_C"]) + (dt is not None)
    if ring_x is not None:
        assert ring_B is not None and ring_dt is not None and dt is not None
        assert ring_x[0, 0].is_contiguous() and ring_B[0, 0].is_contiguous()
    heads = 1 if dt is None else dt.shape[2]
    cos, sin = (None, None) if rope is None else rope
    if rope is not None:
        assert all(table.is_contiguous() for table in rope) and first_turned % (2 * rope[0].shape[1]) == 0
    _conv_ring_kernel[(batch, blocks)](
        x, ring, weight, bias, lengths, slots, y, dt, dt_bias, dt_out, ring_x, ring_B, ring_dt, cos, sin, offset,
        channels,
        0 if ring_x is None else ring_x[0, 0].numel(),
        0 if ring_B is None else ring_B[0, 0].numel(),
        first_turned,
        heads,
        *x.stride()[:2],
        *ring.stride()[:2],
        *((0, 0) if dt is None else dt.stride()[:2]),
        *((0, 0) if ring_x is None else ring_x.stride()[:2]),
        *((0, 0) if ring_B is None else ring_B.stride()[:2]),
        *((0, 0, 0) if ring_dt is None else ring_dt.stride()),
        weight.stride(0),
        T=length, W=weight.shape[1], R=ring.shape[1], L=1 if ring_x is None else ring_x.shape[1],
        SILU=silu, HAS_BIAS=bias is not None, HAS_DT=dt is not None, HAS_DT_BIAS=dt_bias is not None,
        HAS_RING=ring_x is not None, HALF=0 if cos is None else cos.shape[1],
        BLOCK_T=triton.next_power_of_2(length), BLOCK_H=triton.next_power_of_2(heads),
        **pdl.launch_options(config, x.device, batch * blocks),
    )  # fmt: skip
    return y, dt_out
