"""Triton kernels of `ring_reference`: the one-token update, the verification of a window and the fold.

Each program owns BLOCK_P rows of one head's state, reads them once and writes them at most once; x and B are read per
group. `config` of a launcher overrides entries of `launch_config`, as the bench does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl
from kernels_ext.ssd.ring_reference import check_groups, check_window

TILE_BYTES = 16384  # of state that a program of the update has in flight
MULTIPROCESSORS = 132


def launch_config(op: str, batch: int, heads: int, headdim: int, d_state: int, itemsize: int) -> dict:
    """BLOCK_P, num_warps and num_stages of "update", "verify" or "fold" for a state of `itemsize` bytes a number.

    Large tiles, halved while a small batch leaves multiprocessors without work.
    """
    tile = triton.next_power_of_2(headdim)
    if op == "update":
        rows = min(tile, TILE_BYTES // (triton.next_power_of_2(d_state) * itemsize))
        if batch * heads * triton.cdiv(headdim, rows) < 2 * MULTIPROCESSORS:
            return {"BLOCK_P": min(rows, 32), "num_warps": 8, "num_stages": 1}
        return {"BLOCK_P": rows, "num_warps": 4, "num_stages": 1}
    rows = max(16, min(tile, 64))  # a matrix product has 16 or more, and what all tiles of a head repeat pays with many
    while rows > 16 and batch * heads * triton.cdiv(headdim, rows) < MULTIPROCESSORS:
        rows //= 2
    return {"BLOCK_P": rows, "num_warps": 4, "num_stages": 1}


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
    ratio,
    stride_state_slot,
    stride_state_head,
    stride_state_p,
    stride_x_row,
    stride_x_group,
    stride_dt_row,
    stride_B_row,
    stride_B_group,
    stride_C_row,
    stride_C_head,
    P: tl.constexpr,
    N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (⌈P / BLOCK_P⌉, H, B)."""
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = head // ratio
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + (row * tl.num_programs(1) + head) * P + p
    A = tl.load(A_ptr + head)
    if HAS_D:
        D = tl.load(D_ptr + head)
    if PDL:
        gdc_wait()
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(y_ptrs, tl.zeros([BLOCK_P], dtype=tl.float32).to(y_ptr.dtype.element_ty), mask=p < P)
    else:
        mask = (p < P)[:, None] & (n < N)[None, :]
        state_ptrs = state_ptr + slot * stride_state_slot + head * stride_state_head
        state_ptrs = state_ptrs + p[:, None] * stride_state_p + n[None, :]
        state = tl.load(state_ptrs, mask=mask, other=0.0).to(tl.float32)  # (P, N)
        dt = tl.load(dt_ptr + row * stride_dt_row + head)
        decay = tl.exp(dt * A)
        x = tl.load(x_ptr + row * stride_x_row + group * stride_x_group + p, mask=p < P, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * stride_B_row + group * stride_B_group + n, mask=n < N, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + row * stride_C_row + head * stride_C_head + n, mask=n < N, other=0.0).to(tl.float32)
        state = state * decay + (x * dt)[:, None] * B[None, :]
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=mask)
        y = tl.sum(state * C[None, :], axis=1)
        if HAS_D:
            y += x * D
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=p < P)


@triton.jit
def _tile(row_ptrs, rows, first: tl.constexpr, N: tl.constexpr, CHUNK_N: tl.constexpr):
    """Numbers first … first + CHUNK_N − 1 of the rows at row_ptrs (rows, 1), zeros for rows that are not live."""
    n = first + tl.arange(0, CHUNK_N)
    return tl.load(row_ptrs + n[None, :], mask=rows[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _fold(
    state_ptrs,
    x,
    B_ptrs,
    dt,
    next_dt,
    A,
    rows,
    column,
    history,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_N: tl.constexpr,
    STATE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold columns [0, history) of x (P, L), dt (L,) and B, at B_ptrs (L, 1), into the state at state_ptrs (P, 1).

    next_dt (L,) is dt of the column after. The log-decay between two columns is summed, all its terms ≤ 0: the
    difference of two cumulative sums would cancel.
    """
    between = tl.cumsum(tl.where(column + 1 < history, next_dt * A, 0.0), axis=0, reverse=True)
    weights = tl.where(column < history, dt * tl.exp(between), 0.0)
    decay = tl.exp(tl.sum(tl.where(column < history, dt * A, 0.0), axis=0))
    for first in tl.static_range(0, BLOCK_N, CHUNK_N):
        B = _tile(B_ptrs, column < history, first, N, CHUNK_N).to(tl.float32) * weights[:, None]  # (L, N)
        state = _tile(state_ptrs, rows, first, N, CHUNK_N).to(tl.float32) * decay  # (P, N)
        state = tl.dot(x.to(STATE_DOT), B.to(STATE_DOT), state, input_precision=PRECISION)
        n = first + tl.arange(0, CHUNK_N)
        mask = rows[:, None] & (n < N)[None, :]
        tl.store(state_ptrs + n[None, :], state.to(state_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _factors(scores, dt, next_dt, A, D, column, own, HAS_D: tl.constexpr):
    """What a token of the window, standing in column own (T,), multiplies the state (T,) and each column (T, L) by."""
    visible = column[None, :] <= own[:, None]
    decay = tl.exp(tl.sum(tl.where(visible, (dt * A)[None, :], 0.0), axis=1))
    steps = tl.where(column[None, :] < own[:, None], (next_dt * A)[None, :], 0.0)
    between = tl.cumsum(steps, axis=1, reverse=True)  # as in _fold, up to each token
    weights = tl.where(visible, scores * tl.exp(between) * dt[None, :], 0.0)
    if HAS_D:
        weights += tl.where(column[None, :] == own[:, None], D, 0.0)
    return decay, weights


@triton.jit(do_not_specialize=["tokens", "window", "offset"])
def _verify_kernel(
    state_ptr,
    ring_x_ptr,
    ring_B_ptr,
    ring_dt_ptr,
    C_ptr,
    A_ptr,
    D_ptr,
    y_ptr,
    lengths_ptr,
    folded_ptr,
    slots_ptr,
    tokens,
    window,
    offset,
    ratio,
    stride_state_slot,
    stride_state_head,
    stride_state_p,
    stride_x_slot,
    stride_x_ring,
    stride_x_group,
    stride_B_slot,
    stride_B_ring,
    stride_B_group,
    stride_dt_slot,
    stride_dt_head,
    stride_C_row,
    stride_C_token,
    stride_C_head,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    HAS_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT: tl.constexpr,
    STATE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (⌈P / BLOCK_P⌉, H, B). Column j of the ring is position start + j."""
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = head // ratio
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    t = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_L)
    y_ptrs = y_ptr + ((row * tokens + t[None, :]) * tl.num_programs(1) + head) * P + p[:, None]  # (P, T)
    y_mask = (p < P)[:, None] & (t < tokens)[None, :]
    A = tl.load(A_ptr + head)
    D = A
    if HAS_D:
        D = tl.load(D_ptr + head)
    if PDL:
        gdc_wait()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(y_ptrs, tl.zeros([BLOCK_P, BLOCK_T], dtype=tl.float32).to(y_ptr.dtype.element_ty), mask=y_mask)
    else:
        # Loads that wait for the cursors come last.
        length = tl.load(lengths_ptr + slot)
        start = tl.load(folded_ptr + slot)
        state_ptrs = state_ptr + slot * stride_state_slot + head * stride_state_head + p[:, None] * stride_state_p
        state = _tile(state_ptrs, p < P, 0, N, CHUNK_N)  # (P, N)
        C_ptrs = C_ptr + row * stride_C_row + head * stride_C_head + t[:, None] * stride_C_token
        C = _tile(C_ptrs, t < tokens, 0, N, CHUNK_N)  # (T, N)

        due = length - start + 2 * window > L
        start = tl.where(due & (offset > 0), length, start)  # the first call of the round has folded the history
        history = length - start + offset
        live = history + tokens
        place = (start + column) % L
        dt_ptrs = ring_dt_ptr + slot * stride_dt_slot + head * stride_dt_head
        dt = tl.load(dt_ptrs + place, mask=column < live, other=0.0)  # (L,)
        next_dt = tl.load(dt_ptrs + (start + column + 1) % L, mask=column + 1 < live, other=0.0)
        B_ptrs = ring_B_ptr + slot * stride_B_slot + group * stride_B_group + place[:, None] * stride_B_ring
        B = _tile(B_ptrs, column < live, 0, N, CHUNK_N)  # (L, N)
        x_ptrs = ring_x_ptr + slot * stride_x_slot + group * stride_x_group + p[:, None]
        x_mask = (p < P)[:, None] & (column < live)[None, :]
        x = tl.load(x_ptrs + place[None, :] * stride_x_ring, mask=x_mask, other=0.0)  # (P, L)

        y = tl.zeros([BLOCK_P, BLOCK_T], dtype=tl.float32)
        scores = tl.zeros([BLOCK_T, BLOCK_L], dtype=tl.float32)
        # Selecting once more what the masks have selected keeps the compiler from moving each tile to shared memory,
        # behind a barrier, as soon as it is loaded: so all loads are on their way before the first barrier.
        x = tl.where((column < live)[None, :], x, 0.0)
        B = tl.where((column < live)[:, None], B, 0.0)
        C = tl.where((t < tokens)[:, None], C, 0.0)
        for first in tl.static_range(0, BLOCK_N, CHUNK_N):
            scores = tl.dot(C.to(DOT), tl.trans(B.to(DOT)), scores, input_precision=PRECISION)
            y = tl.dot(state.to(STATE_DOT), tl.trans(C.to(STATE_DOT)), y, input_precision=PRECISION)
            if first + CHUNK_N < BLOCK_N:
                state = _tile(state_ptrs, p < P, first + CHUNK_N, N, CHUNK_N)
                B = _tile(B_ptrs, column < live, first + CHUNK_N, N, CHUNK_N)
                C = _tile(C_ptrs, t < tokens, first + CHUNK_N, N, CHUNK_N)

        decay, weights = _factors(scores, dt, next_dt, A, D, column, history + t, HAS_D)
        y = y * decay[None, :]
        y = tl.dot(x.to(DOT), tl.trans(weights.to(DOT)), y, input_precision=PRECISION)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)

        if due & (offset == 0):
            _fold(
                state_ptrs,
                x,
                B_ptrs,
                dt,
                next_dt,
                A,
                p < P,
                column,
                history,
                N,
                BLOCK_N,
                CHUNK_N,
                STATE_DOT,
                PRECISION,
            )


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
    ratio,
    stride_state_slot,
    stride_state_head,
    stride_state_p,
    stride_x_slot,
    stride_x_ring,
    stride_x_group,
    stride_B_slot,
    stride_B_ring,
    stride_B_group,
    stride_dt_slot,
    stride_dt_head,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STATE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (⌈P / BLOCK_P⌉, H, B)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(1)
    group = head // ratio
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_L)
    slot = tl.load(slots_ptr + tl.program_id(2)).to(tl.int64)
    if slot >= 0:
        start = tl.load(folded_ptr + slot)
        history = tl.load(lengths_ptr + slot) - start
        if history > 0:
            place = (start + column) % L
            state_ptrs = state_ptr + slot * stride_state_slot + head * stride_state_head + p[:, None] * stride_state_p
            B_ptrs = ring_B_ptr + slot * stride_B_slot + group * stride_B_group + place[:, None] * stride_B_ring
            x_ptrs = ring_x_ptr + slot * stride_x_slot + group * stride_x_group + p[:, None]
            dt_ptrs = ring_dt_ptr + slot * stride_dt_slot + head * stride_dt_head
            dt = tl.load(dt_ptrs + place, mask=column < history, other=0.0)  # (L,)
            next_dt = tl.load(dt_ptrs + (start + column + 1) % L, mask=column + 1 < history, other=0.0)
            x = tl.load(
                x_ptrs + place[None, :] * stride_x_ring, mask=(p < P)[:, None] & (column < history)[None, :], other=0.0
            )  # (P, L)
            _fold(
                state_ptrs,
                x,
                B_ptrs,
                dt,
                next_dt,
                tl.load(A_ptr + head),
                p < P,
                column,
                history,
                N,
                BLOCK_N,
                CHUNK_N,
                STATE_DOT,
                PRECISION,
            )


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    config: dict | None = None,
) -> Tensor:
    """See `ring_reference.ssd_update`."""
    batch, groups, headdim = x.shape
    heads, d_state = C.shape[1:]
    check_groups(heads, groups)
    y = torch.empty(batch, heads, headdim, dtype=x.dtype, device=x.device)
    config = launch_config("update", batch, heads, headdim, d_state, state.element_size()) | (config or {})
    tiles = triton.cdiv(headdim, config["BLOCK_P"])
    _update_kernel[(tiles, heads, batch)](
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        slots,
        y,
        heads // groups,
        *state.stride()[:3],
        *x.stride()[:2],
        dt.stride(0),
        *B.stride()[:2],
        *C.stride()[:2],
        P=headdim,
        N=d_state,
        HAS_D=D is not None,
        HAS_SLOTS=slots is not None,
        BLOCK_N=triton.next_power_of_2(d_state),
        **pdl.launch_options(config, y.device, tiles * heads * batch),
    )
    return y


def ssd_verify(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
    *,
    config: dict | None = None,
) -> Tensor:
    """See `ring_reference.ssd_verify`."""
    batch, tokens, heads, d_state = C.shape
    ring, groups, headdim = ring_x.shape[1:]
    check_groups(heads, groups)
    check_window(tokens, offset, window, ring)
    y = torch.empty(batch, tokens, heads, headdim, dtype=C.dtype, device=C.device)
    config = launch_config("verify", batch, heads, headdim, d_state, state.element_size()) | (config or {})
    tiles = triton.cdiv(headdim, config["BLOCK_P"])
    _verify_kernel[(tiles, heads, batch)](
        state,
        ring_x,
        ring_B,
        ring_dt,
        C,
        A,
        D,
        y,
        lengths,
        folded,
        slots,
        tokens,
        window,
        offset,
        heads // groups,
        *state.stride()[:3],
        *ring_x.stride()[:3],
        *ring_B.stride()[:3],
        *ring_dt.stride()[:2],
        *C.stride()[:3],
        P=headdim,
        N=d_state,
        L=ring,
        HAS_D=D is not None,
        BLOCK_L=_block(ring),
        BLOCK_T=_block(tokens),
        **_products(state, C),
        **pdl.launch_options(config, y.device, tiles * heads * batch),
    )
    return y


def ssd_fold(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    *,
    config: dict | None = None,
) -> None:
    """See `ring_reference.ssd_fold`."""
    ring, groups, headdim = ring_x.shape[1:]
    heads, d_state = state.shape[1], state.shape[3]
    check_groups(heads, groups)
    batch = slots.shape[0]
    products = _products(state, ring_x)
    del products["DOT"]
    config = launch_config("fold", batch, heads, headdim, d_state, state.element_size()) | (config or {})
    tiles = triton.cdiv(headdim, config["BLOCK_P"])
    _fold_kernel[(tiles, heads, batch)](
        state,
        ring_x,
        ring_B,
        ring_dt,
        A,
        lengths,
        folded,
        slots,
        heads // groups,
        *state.stride()[:3],
        *ring_x.stride()[:3],
        *ring_B.stride()[:3],
        *ring_dt.stride()[:2],
        P=headdim,
        N=d_state,
        L=ring,
        BLOCK_L=_block(ring),
        **products,
        **pdl.launch_options(config, state.device, tiles * heads * batch),
    )


def _block(size: int) -> int:
    """A dimension of a matrix product: a power of two from 16 on."""
    return max(16, triton.next_power_of_2(size))


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _products(state: Tensor, activations: Tensor) -> dict:
    """How matrices are multiplied: DOT is the type between activations, STATE_DOT that with the state and the factors.

    float32 activations are multiplied exactly, without tensor cores, so by chunks of N that fit in registers. Half
    precision has exact products with itself and goes through TensorFloat-32 where the state is float32. The interpreter
    (on a CPU) multiplies in float32: it keeps bfloat16 as bits.
    """
    block = _block(state.shape[-1])
    if activations.dtype == torch.float32 or not activations.is_cuda:
        exact = {"DOT": tl.float32, "STATE_DOT": tl.float32, "PRECISION": "ieee"}
        return {"BLOCK_N": block, "CHUNK_N": min(block, 32), **exact}
    dot = _TRITON_TYPES[activations.dtype]
    state_dot = dot if state.dtype == activations.dtype else tl.float32
    return {"BLOCK_N": block, "CHUNK_N": block, "DOT": dot, "STATE_DOT": state_dot, "PRECISION": "tf32"}
