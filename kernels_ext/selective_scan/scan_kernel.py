"""Triton kernels of Mamba-1's scan and of its gradients; x, B and C are read by group and head, never repeated.

The definition is `reference.selective_scan` (2312.00752 §3.2). For one channel d, with its head's C_t and its group's
B_t and x_t, and k_t zero at the first token of a document, one elsewhere:

    a_t = k_t·exp(dt_t A)      h_t = a_t h_{t−1} + dt_t x_t B_t      y_t = C_t·h_t + D x_t

With g_t = ∂/∂h_t = ∂y_t C_t + a_{t+1} g_{t+1} and e_t = a_t h_{t−1}·g_t by state number, the gradients are

    ∂x_t = dt_t (g_t·B_t) + D ∂y_t      ∂dt_t = x_t (g_t·B_t) + Σ_n A e_t      ∂A = Σ_t dt_t e_t      ∂h_0 = a_1 g_1
    ∂B_t = dt_t x_t g_t                 ∂C_t = ∂y_t h_t                        ∂D = Σ_t ∂y_t x_t

x belongs to the channels of a group's heads, B and C to the channels of a piece, so their gradients are sums over
channels.

A program has BLOCK_D channels of one row and walks through its tokens, the state (BLOCK_D, N) in registers. Backward is
one launch: a walk forward that leaves the state before each chunk of Q tokens, then the chunks from the last on, each
walked forward once more, which leaves the state before each of its tokens, and then back. What is summed over other
programs' channels (heads of a group) is written apart and added after, nothing by atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.layout import document_strides
from kernels_ext.selective_scan.reference import check_groups

CHUNK = 32  # tokens, Q above: their states and those of as many chunks are what backward keeps at 1024 tokens
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of N
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the kernels serve these shapes and types."""
    return x.dtype in DTYPES and x.dtype == B.dtype == C.dtype and B.shape[-1] in SIZES


def launch_config(d_state: int) -> dict[str, int]:
    """BLOCK_D so that each of 128 threads has four numbers of state, more where that would be less than 16 channels."""
    return {"BLOCK_D": min(128, max(512 // d_state, 16)), "num_warps": 4}


@triton.jit
def _is_kept(seq_idx_base, t, stride, HAS_SEQ_IDX: tl.constexpr):
    """k_t: 0.0 where token t begins a document, but for a row's first, which the initial state belongs to."""
    kept = 1.0
    if HAS_SEQ_IDX:
        document = tl.load(seq_idx_base + t * stride)
        before = tl.load(seq_idx_base + tl.maximum(t - 1, 0) * stride)
        kept = tl.where(document == before, 1.0, 0.0)
    return kept


@triton.jit
def _step(
    h,
    A,
    x_at,
    dt_at,
    B_at,
    seq_idx_base,
    t,
    stride_x,
    stride_dt,
    stride_B,
    stride_seq_idx,
    is_channel,
    is_cell,
    HAS_SEQ_IDX: tl.constexpr,
):
    """The state after token t, and its x, dt (BLOCK_D,), B and what is left of the state before it (BLOCK_D, N)."""
    dt = tl.load(dt_at + t * stride_dt, mask=is_channel, other=0.0).to(tl.float32)
    x = tl.load(x_at + t * stride_x, mask=is_channel, other=0.0).to(tl.float32)
    B = tl.load(B_at + t * stride_B, mask=is_cell, other=0.0).to(tl.float32)
    left = h * tl.exp(A * dt[:, None]) * _is_kept(seq_idx_base, t, stride_seq_idx, HAS_SEQ_IDX)
    return left + (dt * x)[:, None] * B, x, dt, B, left


@triton.jit
def _forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    seq_idx_ptr,
    initial_ptr,
    y_ptr,
    final_ptr,
    length,
    stride_x_batch,
    stride_x,
    stride_dt_batch,
    stride_dt,
    stride_B_batch,
    stride_B,
    stride_C_batch,
    stride_C,
    stride_seq_idx_batch,
    stride_seq_idx,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    is_channel = channel < CHANNELS
    is_cell = is_channel[:, None] & (n < N)[None, :]
    cell = channel[:, None] * N + n[None, :]
    shared = channel // (P * R) * P + channel % P  # of x and B
    x_at = x_ptr + row * stride_x_batch + shared
    dt_at = dt_ptr + row * stride_dt_batch + channel
    B_at = B_ptr + row * stride_B_batch + (shared // N * N)[:, None] + n[None, :]
    C_at = C_ptr + row * stride_C_batch + (channel // N * N)[:, None] + n[None, :]
    y_at = y_ptr + row * length * CHANNELS + channel
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    state_at = row * (CHANNELS * N) + cell
    A = tl.load(A_ptr + cell, mask=is_cell, other=0.0)
    D = tl.load(D_ptr + channel, mask=is_channel, other=0.0)
    h = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + state_at, mask=is_cell, other=0.0)
    for t in range(length):
        C = tl.load(C_at + t * stride_C, mask=is_cell, other=0.0).to(tl.float32)
        h, x, _dt, _B, _left = _step(
            h, A, x_at, dt_at, B_at, seq_idx_base, t,
            stride_x, stride_dt, stride_B, stride_seq_idx, is_channel, is_cell, HAS_SEQ_IDX,
        )  # fmt: skip
        y = tl.sum(h * C, axis=1) + D * x
        tl.store(y_at + t * CHANNELS, y.to(y_ptr.dtype.element_ty), mask=is_channel)
    tl.store(final_ptr + state_at, h, mask=is_cell)


@triton.jit
def _backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    seq_idx_ptr,
    initial_ptr,
    dy_ptr,
    d_final_ptr,
    chunk_states_ptr,
    token_states_ptr,
    dx_ptr,
    ddt_ptr,
    dB_ptr,
    dC_ptr,
    dA_ptr,
    dD_ptr,
    d_initial_ptr,
    length,
    stride_x_batch,
    stride_x,
    stride_dt_batch,
    stride_dt,
    stride_B_batch,
    stride_B,
    stride_C_batch,
    stride_C,
    stride_seq_idx_batch,
    stride_seq_idx,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH: channels of a piece that a program has, whose ∂B and ∂C are one sum."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    is_channel = channel < CHANNELS
    is_cell = is_channel[:, None] & (n < N)[None, :]
    cell = channel[:, None] * N + n[None, :]
    shared = channel // (P * R) * P + channel % P
    x_at = x_ptr + row * stride_x_batch + shared
    dt_at = dt_ptr + row * stride_dt_batch + channel
    B_at = B_ptr + row * stride_B_batch + (shared // N * N)[:, None] + n[None, :]
    C_at = C_ptr + row * stride_C_batch + (channel // N * N)[:, None] + n[None, :]
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    state_at = row * (CHANNELS * N) + cell
    chunks = tl.cdiv(length, Q)
    chunk_at = chunk_states_ptr + row * chunks * (CHANNELS * N) + cell
    token_at = token_states_ptr + row * (Q * CHANNELS * N) + cell

    A = tl.load(A_ptr + cell, mask=is_cell, other=0.0)
    D = tl.load(D_ptr + channel, mask=is_channel, other=0.0)
    h = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + state_at, mask=is_cell, other=0.0)
    for chunk in range(chunks):
        tl.store(chunk_at + chunk * (CHANNELS * N), h, mask=is_cell)
        for t in range(chunk * Q, tl.minimum((chunk + 1) * Q, length)):
            h, _x, _dt, _B, _left = _step(
                h, A, x_at, dt_at, B_at, seq_idx_base, t,
                stride_x, stride_dt, stride_B, stride_seq_idx, is_channel, is_cell, HAS_SEQ_IDX,
            )  # fmt: skip
    tl.debug_barrier()

    part = tl.program_id(0) * (BLOCK_D // WIDTH) + tl.arange(0, BLOCK_D // WIDTH)
    parts = CHANNELS // WIDTH
    is_part = (part < parts)[:, None] & (n < N)[None, :]
    part_at = row * length * (parts * N) + part[:, None] * N + n[None, :]
    out_at = row * length * CHANNELS + channel
    g = tl.zeros([BLOCK_D, N], dtype=tl.float32)  # a_{t+1} g_{t+1}
    if HAS_FINAL:
        g = tl.load(d_final_ptr + state_at, mask=is_cell, other=0.0)
    dA = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    dD = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i
        first = chunk * Q
        count = tl.minimum(Q, length - first)
        h = tl.load(chunk_at + chunk * (CHANNELS * N), mask=is_cell, other=0.0)
        for q in range(count):
            tl.store(token_at + q * (CHANNELS * N), h, mask=is_cell)
            h, _x, _dt, _B, _left = _step(
                h, A, x_at, dt_at, B_at, seq_idx_base, first + q,
                stride_x, stride_dt, stride_B, stride_seq_idx, is_channel, is_cell, HAS_SEQ_IDX,
            )  # fmt: skip
        tl.debug_barrier()
        for j in range(count):
            q = count - 1 - j
            t = first + q
            before = tl.load(token_at + q * (CHANNELS * N), mask=is_cell, other=0.0)
            dy = tl.load(dy_ptr + out_at + t * CHANNELS, mask=is_channel, other=0.0).to(tl.float32)
            C = tl.load(C_at + t * stride_C, mask=is_cell, other=0.0).to(tl.float32)
            h, x, dt, B, left = _step(
                before, A, x_at, dt_at, B_at, seq_idx_base, t,
                stride_x, stride_dt, stride_B, stride_seq_idx, is_channel, is_cell, HAS_SEQ_IDX,
            )  # fmt: skip
            g = dy[:, None] * C + g
            along_B = tl.sum(g * B, axis=1)
            of_decay = left * g
            dx = dt * along_B + D * dy
            ddt = x * along_B + tl.sum(A * of_decay, axis=1)
            dA += dt[:, None] * of_decay
            dD += dy * x
            dB = tl.sum(tl.reshape((dt * x)[:, None] * g, [BLOCK_D // WIDTH, WIDTH, N]), axis=1)
            dC = tl.sum(tl.reshape(dy[:, None] * h, [BLOCK_D // WIDTH, WIDTH, N]), axis=1)
            tl.store(dx_ptr + out_at + t * CHANNELS, dx, mask=is_channel)
            tl.store(ddt_ptr + out_at + t * CHANNELS, ddt, mask=is_channel)
            tl.store(dB_ptr + part_at + t * (parts * N), dB, mask=is_part)
            tl.store(dC_ptr + part_at + t * (parts * N), dC, mask=is_part)
            g = g * tl.exp(A * dt[:, None]) * _is_kept(seq_idx_base, t, stride_seq_idx, HAS_SEQ_IDX)
        tl.debug_barrier()
    tl.store(dA_ptr + state_at, dA, mask=is_cell)
    tl.store(dD_ptr + row * CHANNELS + channel, dD, mask=is_channel)
    if HAS_INITIAL:
        tl.store(d_initial_ptr + state_at, g, mask=is_cell)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.selective_scan`; differentiates in all but seq_idx, through torch.compile as well.

    x, B and C are all bfloat16, all float16 or all float32; N is a power of two up to 128. Keeps nothing for the
    backward pass but its arguments.
    """
    if not fits(x, B, C):
        raise ValueError(
            f"x {x.dtype}, B {B.dtype} and C {C.dtype} with {B.shape[-1]} state numbers: the kernels take one type for "
            f"all, {DTYPES}, and {SIZES} state numbers: call reference.selective_scan for others"
        )
    check_groups(x.shape[2], C.shape[2])
    return torch.ops.mamballama.selective_scan(x, dt, A, B, C, D, seq_idx, initial_state)


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? seq_idx, Tensor? initial_state"


@torch.library.custom_op(
    "mamballama::selective_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor y, Tensor final_state)"
)
def _scan(x, dt, A, B, C, D, seq_idx, initial_state):
    y, final = _outputs(x, dt, A, B, C, D, seq_idx, initial_state)
    channels, d_state = A.shape
    tensors, strides, constants = _as_kernels_take(x, dt, A, B, C, D, seq_idx, initial_state)
    launch = launch_config(d_state)
    _forward_kernel[(triton.cdiv(channels, launch["BLOCK_D"]), len(x))](
        *tensors, y, final, x.shape[1], *strides, **constants, **launch
    )
    return y, final


@_scan.register_fake
def _outputs(x, dt, A, B, C, D, seq_idx, initial_state):
    batch, length, _, headdim = x.shape
    return (
        x.new_empty(batch, length, C.shape[2], headdim),
        x.new_empty(batch, *A.shape, dtype=torch.float32),
    )


@torch.library.custom_op(
    "mamballama::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? d_final_state, {_INPUTS}) -> "
    "(Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor d_initial_state)",
)
def _scan_backward(dy, d_final, x, dt, A, B, C, D, seq_idx, initial_state):
    batch, length, groups, headdim = x.shape
    (channels, d_state), heads = A.shape, C.shape[2]
    tensors, strides, constants = _as_kernels_take(x, dt, A, B, C, D, seq_idx, initial_state)
    launch = launch_config(d_state)
    width = min(d_state, launch["BLOCK_D"])

    def empty(*shape: int) -> Tensor:
        return x.new_empty(batch, *shape, dtype=torch.float32)

    by_channel, ddt = (empty(length, channels) for _ in range(2))
    dA, dD = empty(channels, d_state), empty(channels)
    by_part = [empty(length, channels // width, d_state) for _ in range(2)]
    d_initial = empty(*(() if initial_state is None else (channels, d_state)))
    _backward_kernel[(triton.cdiv(channels, launch["BLOCK_D"]), batch)](
        *tensors,
        dy.contiguous(),
        None if d_final is None else d_final.contiguous(),
        empty(triton.cdiv(length, CHUNK), channels, d_state),
        empty(CHUNK, channels, d_state),
        by_channel,
        ddt,
        *by_part,
        dA,
        dD,
        d_initial,
        length,
        *strides,
        **constants,
        Q=CHUNK,
        HAS_FINAL=d_final is not None,
        WIDTH=width,
        **launch,
    )
    dB, dC = (t.view(batch, length, groups, heads // groups, *C.shape[3:4], -1, d_state) for t in by_part)
    return (
        by_channel.view(batch, length, groups, -1, headdim).sum(3).to(x.dtype),
        ddt.to(dt.dtype),
        dA.sum(0),
        dB.sum((3, 5)).to(B.dtype),
        dC.sum(5).flatten(2, 3).to(C.dtype),
        dD.sum(0),
        d_initial,
    )


@_scan_backward.register_fake
def _gradients(dy, d_final, x, dt, A, B, C, D, seq_idx, initial_state):
    float32 = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        A.new_empty(A.shape, **float32),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        D.new_empty(D.shape, **float32),
        x.new_empty(len(x) if initial_state is None else initial_state.shape, **float32),
    )


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, d_final):
    x, dt, A, B, C, D, seq_idx, initial_state = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(*C.shape[:3], x.shape[-1])
    inputs = x, dt, A, B, C, D, seq_idx, initial_state
    dx, ddt, dA, dB, dC, dD, d_initial = torch.ops.mamballama.selective_scan_backward(dy, d_final, *inputs)
    d_initial = None if initial_state is None else d_initial.to(initial_state.dtype)
    return dx, ddt, dA.to(A.dtype), dB, dC, dD.to(D.dtype), None, d_initial


_scan.register_autograd(_differentiate, setup_context=_remember)


def _as_kernels_take(x, dt, A, B, C, D, seq_idx, initial_state) -> tuple[tuple, tuple[int, ...], dict]:
    """Tensors, strides and constants of both kernels: channels of a token side by side, decays and states float32."""
    groups, headdim = x.shape[2:]
    x, B, C = (_flat(t) for t in (x, B, C))
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    A, D = A.float().contiguous(), D.float().contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    strides = (*x.stride()[:2], *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2], *document_strides(seq_idx))
    channels, d_state = A.shape
    constants = {
        "CHANNELS": channels,
        "P": headdim,
        "N": d_state,
        "R": channels // (groups * headdim),
        "HAS_SEQ_IDX": seq_idx is not None,
        "HAS_INITIAL": initial_state is not None,
    }
    return (x, dt, A, B, C, D, seq_idx, initial_state), strides, constants


def _flat(t: Tensor) -> Tensor:
    """(B, L, ·): a view where a token's channels are contiguous, as slices of a projection's output are."""
    flat = t.flatten(2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
