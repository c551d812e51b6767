"""Triton kernels of Mamba-1's decoding: `reference`'s update, verify, fold and ring append.

A program holds the state of BLOCK_D channels of one row, (BLOCK_D, N) float32, in registers, reads it once and writes
it at most once; tokens pass through it in order. x, B and C are addressed by group and head, so nothing is repeated in
memory. The loops over tokens have constant length and are unrolled: tokens that a row has not got are masked to dt = 0,
the identity step, so one compiled kernel and one CUDA graph serve every number of accepted tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.selective_scan.reference import check_append, check_groups, check_window

APPEND_BLOCK = 1024


def launch_config(channels: int, d_state: int) -> dict[str, int]:
    """Channels of a program so that each of its 128 threads holds four numbers of state: one 16-byte load."""
    block = max(1, 512 // triton.next_power_of_2(d_state))
    return {"BLOCK_D": min(block, triton.next_power_of_2(channels)), "num_warps": 4}


@triton.jit
def _replay(
    h,
    A,
    x_ptr,
    B_ptr,
    dt_ptr,
    stride_x,
    stride_B,
    stride_dt,
    start,
    end,
    channel,
    x_at,
    B_at,
    is_channel,
    is_cell,
    L: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The state h after the tokens at positions start ≤ p < end, at most COUNT of them, of a slot's rings."""
    for i in tl.static_range(COUNT):
        position = start + i
        is_live = position < end
        at = position % L
        dt = tl.load(dt_ptr + at * stride_dt + channel, mask=is_channel & is_live, other=0.0)
        x = tl.load(x_ptr + at * stride_x + x_at, mask=is_channel & is_live, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + at * stride_B + B_at, mask=is_cell & is_live, other=0.0).to(tl.float32)
        h = h * tl.exp(A * dt[:, None]) + (dt * x)[:, None] * B
    return h


@triton.jit
def _update_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    slots_ptr,
    y_ptr,
    stride_state,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = channel < CHANNELS
    y_at = y_ptr + row * CHANNELS + channel
    slot = tl.load(slots_ptr + row).to(tl.int64) if HAS_SLOTS else row
    if slot < 0:
        tl.store(y_at, tl.zeros((BLOCK_D,), dtype=tl.float32).to(y_ptr.dtype.element_ty), mask=is_channel)
        return

    n = tl.arange(0, BLOCK_N)
    is_cell = is_channel[:, None] & (n < N)[None, :]
    cell = channel[:, None] * N + n[None, :]
    x_at = channel // (P * R) * P + channel % P
    B_at = (x_at // N * N)[:, None] + n[None, :]
    C_at = (channel // N * N)[:, None] + n[None, :]

    h_at = state_ptr + slot * stride_state + cell
    h = tl.load(h_at, mask=is_cell, other=0.0).to(tl.float32)  # (BLOCK_D, N)
    A = tl.load(A_ptr + cell, mask=is_cell, other=0.0)
    dt = tl.load(dt_ptr + row * stride_dt + channel, mask=is_channel, other=0.0)
    x = tl.load(x_ptr + row * stride_x + x_at, mask=is_channel, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + row * stride_B + B_at, mask=is_cell, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + row * stride_C + C_at, mask=is_cell, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + channel, mask=is_channel, other=0.0)
    h = h * tl.exp(A * dt[:, None]) + (dt * x)[:, None] * B
    tl.store(h_at, h.to(state_ptr.dtype.element_ty), mask=is_cell)
    y = tl.sum(h * C, axis=1) + D * x
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=["offset"])
def _verify_kernel(
    state_ptr,
    ring_x_ptr,
    ring_B_ptr,
    ring_dt_ptr,
    C_ptr,
    A_ptr,
    D_ptr,
    lengths_ptr,
    folded_ptr,
    slots_ptr,
    y_ptr,
    offset,
    stride_state,
    stride_x_slot,
    stride_x,
    stride_B_slot,
    stride_B,
    stride_dt_slot,
    stride_dt,
    stride_C_row,
    stride_C,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = channel < CHANNELS
    y_at = y_ptr + row * (TOKENS * CHANNELS) + channel
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        zeros = tl.zeros((BLOCK_D,), dtype=tl.float32).to(y_ptr.dtype.element_ty)
        for t in tl.static_range(TOKENS):
            tl.store(y_at + t * CHANNELS, zeros, mask=is_channel)
        return

    n = tl.arange(0, BLOCK_N)
    is_cell = is_channel[:, None] & (n < N)[None, :]
    cell = channel[:, None] * N + n[None, :]
    x_at = channel // (P * R) * P + channel % P
    B_at = (x_at // N * N)[:, None] + n[None, :]
    C_at = (channel // N * N)[:, None] + n[None, :]

    length = tl.load(lengths_ptr + slot)
    base = tl.load(folded_ptr + slot)
    is_due = length - base + 2 * WINDOW > L
    start = base if IS_FIRST else tl.where(is_due, length, base)
    first = length + offset

    h_at = state_ptr + slot * stride_state + cell
    h = tl.load(h_at, mask=is_cell, other=0.0).to(tl.float32)  # (BLOCK_D, N)
    A = tl.load(A_ptr + cell, mask=is_cell, other=0.0)
    D = tl.load(D_ptr + channel, mask=is_channel, other=0.0)
    x_slot = ring_x_ptr + slot * stride_x_slot
    B_slot = ring_B_ptr + slot * stride_B_slot
    dt_slot = ring_dt_ptr + slot * stride_dt_slot
    h = _replay(
        h,
        A,
        x_slot,
        B_slot,
        dt_slot,
        stride_x,
        stride_B,
        stride_dt,
        start,
        first,
        channel,
        x_at,
        B_at,
        is_channel,
        is_cell,
        L,
        L - WINDOW,
    )
    if IS_FIRST:
        tl.store(h_at, h.to(state_ptr.dtype.element_ty), mask=is_cell & is_due)

    C_row = C_ptr + row * stride_C_row
    for t in tl.static_range(TOKENS):
        at = (first + t) % L
        dt = tl.load(dt_slot + at * stride_dt + channel, mask=is_channel, other=0.0)
        x = tl.load(x_slot + at * stride_x + x_at, mask=is_channel, other=0.0).to(tl.float32)
        B = tl.load(B_slot + at * stride_B + B_at, mask=is_cell, other=0.0).to(tl.float32)
        C = tl.load(C_row + t * stride_C + C_at, mask=is_cell, other=0.0).to(tl.float32)
        h = h * tl.exp(A * dt[:, None]) + (dt * x)[:, None] * B
        y = tl.sum(h * C, axis=1) + D * x
        tl.store(y_at + t * CHANNELS, y.to(y_ptr.dtype.element_ty), mask=is_channel)


@triton.jit
def _fold_kernel(
    state_ptr,
    ring_x_ptr,
    ring_B_ptr,
    ring_dt_ptr,
    A_ptr,
    lengths_ptr,
    folded_ptr,
    slots_ptr,
    stride_state,
    stride_x_slot,
    stride_x,
    stride_B_slot,
    stride_B,
    stride_dt_slot,
    stride_dt,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot = tl.load(slots_ptr + tl.program_id(1)).to(tl.int64)
    if slot < 0:
        return
    length = tl.load(lengths_ptr + slot)
    base = tl.load(folded_ptr + slot)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = channel < CHANNELS
    n = tl.arange(0, BLOCK_N)
    is_cell = is_channel[:, None] & (n < N)[None, :]
    cell = channel[:, None] * N + n[None, :]
    x_at = channel // (P * R) * P + channel % P
    B_at = (x_at // N * N)[:, None] + n[None, :]
    h_at = state_ptr + slot * stride_state + cell
    h = tl.load(h_at, mask=is_cell, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + cell, mask=is_cell, other=0.0)
    h = _replay(
        h,
        A,
        ring_x_ptr + slot * stride_x_slot,
        ring_B_ptr + slot * stride_B_slot,
        ring_dt_ptr + slot * stride_dt_slot,
        stride_x,
        stride_B,
        stride_dt,
        base,
        length,
        channel,
        x_at,
        B_at,
        is_channel,
        is_cell,
        L,
        L,
    )
    tl.store(h_at, h.to(state_ptr.dtype.element_ty), mask=is_cell & (base < length))


@triton.jit(do_not_specialize=["offset"])
def _append_kernel(
    x_ptr,
    B_ptr,
    dt_ptr,
    ring_x_ptr,
    ring_B_ptr,
    ring_dt_ptr,
    lengths_ptr,
    slots_ptr,
    offset,
    stride_x_row,
    stride_x,
    stride_B_row,
    stride_B,
    stride_dt_row,
    stride_dt,
    stride_ring_x_slot,
    stride_ring_x,
    stride_ring_B_slot,
    stride_ring_B,
    stride_ring_dt_slot,
    stride_ring_dt,
    CHANNELS: tl.constexpr,
    SHARED: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    at = (tl.load(lengths_ptr + slot) + offset + t) % L
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < CHANNELS
    is_shared = channel < SHARED
    dt = tl.load(dt_ptr + row * stride_dt_row + t * stride_dt + channel, mask=is_channel, other=0.0)
    x = tl.load(x_ptr + row * stride_x_row + t * stride_x + channel, mask=is_shared, other=0.0)
    B = tl.load(B_ptr + row * stride_B_row + t * stride_B + channel, mask=is_shared, other=0.0)
    tl.store(ring_dt_ptr + slot * stride_ring_dt_slot + at * stride_ring_dt + channel, dt, mask=is_channel)
    tl.store(ring_x_ptr + slot * stride_ring_x_slot + at * stride_ring_x + channel, x, mask=is_shared)
    tl.store(ring_B_ptr + slot * stride_ring_B_slot + at * stride_ring_B + channel, B, mask=is_shared)


def selective_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    slots: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """As `reference.selective_update`; config overrides `launch_config`."""
    check_groups(x.shape[1], C.shape[1])
    batch, headdim = len(x), x.shape[-1]
    channels, d_state = A.shape
    x, B, C = (_flat(t, 1) for t in (x, B, C))
    dt, A, state_rows = _flat(dt, 1), A.contiguous(), state.view(len(state), -1)
    y = torch.empty(batch, C.shape[1] // headdim, headdim, dtype=C.dtype, device=C.device)
    launch = launch_config(channels, d_state) | (config or {})
    _update_kernel[(triton.cdiv(channels, launch["BLOCK_D"]), batch)](
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        state if slots is None else slots,
        y,
        state_rows.stride(0),
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        CHANNELS=channels,
        P=headdim,
        N=d_state,
        R=channels // x.shape[1],
        HAS_SLOTS=slots is not None,
        BLOCK_N=triton.next_power_of_2(d_state),
        **launch,
    )
    return y


def selective_verify(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """As `reference.selective_verify`; config overrides `launch_config`."""
    check_groups(ring_x.shape[2], C.shape[2])
    check_window(C.shape[1], window, offset, ring_x.shape[1])
    (batch, tokens, heads), headdim = C.shape[:3], ring_x.shape[-1]
    channels, d_state = A.shape
    C, A = _flat(C, 2), A.contiguous()
    y = torch.empty(batch, tokens, heads, headdim, dtype=C.dtype, device=C.device)
    launch = launch_config(channels, d_state) | (config or {})
    _verify_kernel[(triton.cdiv(channels, launch["BLOCK_D"]), batch)](
        state,
        ring_x,
        ring_B,
        ring_dt,
        C,
        A,
        D,
        lengths,
        folded,
        slots,
        y,
        offset,
        state.view(len(state), -1).stride(0),
        *_ring_strides(ring_x, ring_B, ring_dt),
        C.stride(0),
        C.stride(1),
        CHANNELS=channels,
        P=headdim,
        N=d_state,
        R=heads // ring_x.shape[2],
        L=ring_x.shape[1],
        WINDOW=window,
        TOKENS=tokens,
        IS_FIRST=offset == 0,
        BLOCK_N=triton.next_power_of_2(d_state),
        **launch,
    )
    return y


def selective_fold(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    config: dict[str, Any] | None = None,
) -> None:
    """As `reference.selective_fold`; config overrides `launch_config`."""
    channels, d_state = A.shape
    groups, headdim = ring_x.shape[2:]
    launch = launch_config(channels, d_state) | (config or {})
    _fold_kernel[(triton.cdiv(channels, launch["BLOCK_D"]), len(slots))](
        state,
        ring_x,
        ring_B,
        ring_dt,
        A.contiguous(),
        lengths,
        folded,
        slots,
        state.view(len(state), -1).stride(0),
        *_ring_strides(ring_x, ring_B, ring_dt),
        CHANNELS=channels,
        P=headdim,
        N=d_state,
        R=channels // (groups * headdim),
        L=ring_x.shape[1],
        BLOCK_N=triton.next_power_of_2(d_state),
        **launch,
    )


def selective_ring_append(
    x: Tensor,
    B: Tensor,
    dt: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    lengths: Tensor,
    slots: Tensor,
    offset: int = 0,
    config: dict[str, Any] | None = None,
) -> None:
    """As `reference.selective_ring_append`; config may set BLOCK (channels of a program) and num_warps."""
    check_append(x.shape[1], ring_x.shape[1])
    batch, tokens = x.shape[:2]
    x, B, dt = (_flat(t, 2) for t in (x, B, dt))
    channels = dt.shape[2]
    launch = {"BLOCK": min(APPEND_BLOCK, triton.next_power_of_2(channels)), "num_warps": 4} | (config or {})
    _append_kernel[(triton.cdiv(channels, launch["BLOCK"]), tokens, batch)](
        x,
        B,
        dt,
        ring_x,
        ring_B,
        ring_dt,
        lengths,
        slots,
        offset,
        x.stride(0),
        x.stride(1),
        B.stride(0),
        B.stride(1),
        dt.stride(0),
        dt.stride(1),
        *_ring_strides(ring_x, ring_B, ring_dt),
        CHANNELS=channels,
        SHARED=x.shape[2],
        L=ring_x.shape[1],
        **launch,
    )


def _flat(t: Tensor, lead: int) -> Tensor:
    """The dimensions from `lead` on as one contiguous one: a view where t's rows are contiguous, as slices of a
    projection's output are, a copy otherwise."""
    flat = t.flatten(lead)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _ring_strides(*rings: Tensor) -> tuple[int, ...]:
    """Strides of slot and token of each ring; a ring whose tokens are not contiguous is refused by `view`."""
    return tuple(stride for ring in rings for stride in ring.view(*ring.shape[:2], -1).stride()[:2])
