"""Triton kernels of the chunked scan and of its gradients; x and B are read per group and never repeated.

The definition is `reference.ssd_chunked` (2405.21060 §6). For one head and one chunk of Q tokens, s and t tokens of it,
a_t = dt_t·A, l_t = Σ_{j≤t} a_j, S the state that enters the chunk (P, N), and [·] one where two tokens are of one
document, or else zero:

    decay from s to t        W_ts = exp(l_t − l_s)·[s ≤ t]·[s, t]
    decay since the start    f_t = exp(l_t)·[t, token before the chunk]
    decay until the end      e_s = exp(l_Q − l_s)·[s, last token]
    decay over the chunk     k = exp(l_Q)·[last token, token before the chunk]

    M_ts = (C_t·B_s) W_ts dt_s      y_t = Σ_s M_ts x_s + f_t·S C_t + D x_t      S′ = k·S + Σ_s e_s dt_s · x_s ⊗ B_s

With G = ∂/∂S′ and dM_ts = ∂y_t·x_s the gradients are

    ∂C_t = Σ_s dM_ts W_ts dt_s B_s + f_t·Sᵀ ∂y_t                 ∂S = k·G + Σ_t f_t·∂y_t ⊗ C_t
    ∂B_s = Σ_t dM_ts W_ts dt_s C_t + e_s dt_s·Gᵀ x_s             ∂D = Σ_t dM_tt
    ∂x_s = Σ_t M_ts ∂y_t + e_s dt_s·G B_s + D ∂y_s
    v_s  = Σ_t dM_ts (C_t·B_s) W_ts + u_s,  u_s = e_s·(x_s·G B_s)      of dt where it is a factor
    ∂l_t = Σ_s dM_ts M_ts + f_t·(∂y_t·S C_t) − dt_t v_t                l_Q has Σ_s dt_s u_s + k·⟨S, G⟩ besides
    ∂a_t = Σ_{j≥t} ∂l_j        ∂dt = A·∂a + v        ∂A = Σ_t dt_t ∂a_t

∂l is the difference of row and column sums of one float32 matrix, which cancel where they should.

Forward is two launches: a walk over the chunks that leaves S of each, then all chunks at once. Backward is three: walks
in both directions side by side, S being computed again and not kept; the gradients that belong to a head; and those of
x and B, where a program loops over the heads of its group. Nothing is added by atomics, so two runs give the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.layout import document_strides, rows_contiguous

CHUNK = 64  # tokens, Q above
SIZES = (16, 32, 64, 128)  # of P and N: matrix products want powers of two from 16 on
LARGEST = {torch.bfloat16: 128, torch.float32: 64}  # of them; float32 needs more registers
MULTIPROCESSORS = 132


def fits(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the kernels serve these shapes and types."""
    sizes = x.shape[-1], B.shape[-1]
    if x.dtype not in LARGEST or not x.dtype == B.dtype == C.dtype or C.shape[2] % x.shape[2]:
        return False
    return all(size in SIZES and size <= LARGEST[x.dtype] for size in sizes)


def launch_config(op: str, batch: int, heads: int, headdim: int, d_state: int, itemsize: int) -> dict:
    """num_warps, num_stages and more of "states", "outputs", "head_gradients" or "group_gradients".

    itemsize: bytes of a number of x. Four warps are what a product of CHUNK rows keeps busy. BLOCK_P: rows of the state
    that a program of "states" has, fewer while a small batch leaves multiprocessors without work.
    """
    if op == "states":
        rows = min(headdim, 64)
        while rows > 16 and batch * heads * (headdim // rows) < MULTIPROCESSORS:
            rows //= 2
        return {"BLOCK_P": rows, "num_warps": 4, "num_stages": 3}
    config = {"num_warps": 4, "num_stages": 1}
    if max(headdim, d_state) <= 64 and itemsize == 2:
        config["maxnreg"] = 168  # three programs fit on a multiprocessor, and all but a few numbers into registers
    return config


@triton.jit
def _rows(base, token, stride, length, WIDTH: tl.constexpr):
    """(Q, WIDTH) numbers of the tokens, zeros past the end."""
    columns = tl.arange(0, WIDTH)[None, :]
    return tl.load(base + token[:, None] * stride + columns, mask=(token < length)[:, None], other=0.0)


@triton.jit
def _decays(dt_base, A, token, stride, length, Q: tl.constexpr):
    """dt (Q,), log decay (Q,) from the chunk's start and over the whole chunk; dt = 0 past the end."""
    dt = tl.load(dt_base + token * stride, mask=token < length, other=0.0).to(tl.float32)
    log_decay = tl.cumsum(dt * A, axis=0)
    return dt, log_decay, tl.sum(tl.where(tl.arange(0, Q) == Q - 1, log_decay, 0.0), axis=0)


@triton.jit
def _documents(seq_idx_base, first, token, stride, length, Q: tl.constexpr, HAS_SEQ_IDX: tl.constexpr):
    """Documents of the chunk's tokens (Q,), of the token before it and of its last token."""
    if HAS_SEQ_IDX:
        document = tl.load(seq_idx_base + token * stride, mask=token < length, other=0)
        before = tl.load(seq_idx_base + tl.maximum(first - 1, 0) * stride)
        last = tl.load(seq_idx_base + (tl.minimum(first + Q, length) - 1) * stride)
    else:
        document = tl.zeros([Q], dtype=tl.int32)
        before = 0
        last = 0
    return document, before, last


@triton.jit
def _walk(
    left_base,
    right_base,
    dt_base,
    A,
    seq_idx_base,
    edge_ptrs,
    states_ptrs,
    end_ptrs,
    length,
    stride_left,
    stride_right,
    stride_dt,
    stride_seq_idx,
    stride_states,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    HAS_END: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry BLOCK_P rows of the state (left x, right B), or of its gradient (∂y and C, from the end), over the chunks.

    Starts from what is at edge_ptrs (BLOCK_P, N), writes what meets each chunk to states_ptrs and what is left to
    end_ptrs.
    """
    state = tl.zeros([BLOCK_P, N], dtype=tl.float32)
    if HAS_EDGE:
        state = tl.load(edge_ptrs).to(tl.float32)
    chunks = tl.cdiv(length, Q)
    for i in range(chunks):
        chunk = i
        if REVERSE:
            chunk = chunks - 1 - i
        first = chunk * Q
        token = first + tl.arange(0, Q)
        left = _rows(left_base, token, stride_left, length, BLOCK_P)
        right = _rows(right_base, token, stride_right, length, N)
        dt, log_decay, total = _decays(dt_base, A, token, stride_dt, length, Q)
        document, before, last = _documents(seq_idx_base, first, token, stride_seq_idx, length, Q, HAS_SEQ_IDX)
        if REVERSE:
            weights = tl.where(document == before, tl.exp(log_decay), 0.0)
        else:
            weights = tl.where(document == last, tl.exp(total - log_decay) * dt, 0.0)
        tl.store(states_ptrs + chunk * stride_states, state.to(states_ptrs.dtype.element_ty))
        state = state * tl.where(last == before, tl.exp(total), 0.0)
        weighted = (left.to(tl.float32) * weights[:, None]).to(DOT)
        state = tl.dot(tl.trans(weighted), right.to(DOT), state, input_precision=PRECISION)
    if HAS_END:
        tl.store(end_ptrs, state)


@triton.jit(do_not_specialize=["length"])
def _states_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dy_ptr,
    seq_idx_ptr,
    initial_ptr,
    d_final_ptr,
    states_ptr,
    d_states_ptr,
    final_ptr,
    d_initial_ptr,
    length,
    batch,
    ratio,
    stride_x_batch,
    stride_x_token,
    stride_x_group,
    stride_dt_batch,
    stride_dt_token,
    stride_dt_head,
    stride_B_batch,
    stride_B_token,
    stride_B_group,
    stride_C_batch,
    stride_C_token,
    stride_C_head,
    stride_dy_batch,
    stride_dy_token,
    stride_dy_head,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_D_FINAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P / BLOCK_P, H, B); in backward (P / BLOCK_P, H, 2 B), the second half for the way back.

    states and d_states (B, chunks, H, P, N): S and G of each chunk. Forward alone writes the final state.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    place = tl.program_id(2)
    row = (place % batch).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P
    tile = (p + tl.arange(0, BLOCK_P))[:, None] * N + tl.arange(0, N)[None, :]  # in a state
    edge = (row * heads + head) * (P * N) + tile
    inner = (row * tl.cdiv(length, Q) * heads + head) * (P * N) + tile
    dt_base = dt_ptr + row * stride_dt_batch + head * stride_dt_head
    A = tl.load(A_ptr + head).to(tl.float32)
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    if place < batch:
        group = head // ratio
        _walk(
            x_ptr + row * stride_x_batch + group * stride_x_group + p,
            B_ptr + row * stride_B_batch + group * stride_B_group,
            dt_base,
            A,
            seq_idx_base,
            initial_ptr + edge if HAS_INITIAL else None,
            states_ptr + inner,
            None if BACKWARD else final_ptr + edge,
            length,
            stride_x_token,
            stride_B_token,
            stride_dt_token,
            stride_seq_idx_token,
            heads.to(tl.int64) * (P * N),
            N,
            Q,
            BLOCK_P,
            HAS_SEQ_IDX,
            HAS_INITIAL,
            not BACKWARD,
            False,
            DOT,
            PRECISION,
        )
    elif BACKWARD:
        _walk(
            dy_ptr + row * stride_dy_batch + head * stride_dy_head + p,
            C_ptr + row * stride_C_batch + head * stride_C_head,
            dt_base,
            A,
            seq_idx_base,
            d_final_ptr + edge if HAS_D_FINAL else None,
            d_states_ptr + inner,
            d_initial_ptr + edge if HAS_INITIAL else None,
            length,
            stride_dy_token,
            stride_C_token,
            stride_dt_token,
            stride_seq_idx_token,
            heads.to(tl.int64) * (P * N),
            N,
            Q,
            BLOCK_P,
            HAS_SEQ_IDX,
            HAS_D_FINAL,
            HAS_INITIAL,
            True,
            DOT,
            PRECISION,
        )


@triton.jit(do_not_specialize=["length"])
def _outputs_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    seq_idx_ptr,
    states_ptr,
    y_ptr,
    length,
    ratio,
    stride_x_batch,
    stride_x_token,
    stride_x_group,
    stride_dt_batch,
    stride_dt_token,
    stride_dt_head,
    stride_B_batch,
    stride_B_token,
    stride_B_group,
    stride_C_batch,
    stride_C_token,
    stride_C_head,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (H, chunks, B): heads of a group run at a time and find x and B in the cache. y (B, L, H, P)."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = head // ratio
    first = chunk * Q
    q = tl.arange(0, Q)
    token = first + q
    C = _rows(C_ptr + row * stride_C_batch + head * stride_C_head, token, stride_C_token, length, N).to(DOT)
    B = _rows(B_ptr + row * stride_B_batch + group * stride_B_group, token, stride_B_token, length, N).to(DOT)
    x = _rows(x_ptr + row * stride_x_batch + group * stride_x_group, token, stride_x_token, length, P).to(DOT)
    tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]
    state = tl.load(states_ptr + ((row * tl.num_programs(1) + chunk) * heads + head) * (P * N) + tile).to(DOT)
    A = tl.load(A_ptr + head).to(tl.float32)
    dt_base = dt_ptr + row * stride_dt_batch + head * stride_dt_head
    dt, log_decay, total = _decays(dt_base, A, token, stride_dt_token, length, Q)
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    document, before, last = _documents(seq_idx_base, first, token, stride_seq_idx_token, length, Q, HAS_SEQ_IDX)

    y = tl.dot(C, tl.trans(state), input_precision=PRECISION)  # (Q, P)
    y *= tl.where(document == before, tl.exp(log_decay), 0.0)[:, None]
    visible = (q[None, :] <= q[:, None]) & (document[None, :] == document[:, None])
    decay = tl.exp(tl.where(visible, log_decay[:, None] - log_decay[None, :], float("-inf")))  # (Q, Q)
    mixed = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay * dt[None, :]
    y = tl.dot(mixed.to(DOT), x, y, input_precision=PRECISION)
    if HAS_D:
        y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
    y_ptrs = y_ptr + ((row * length + token[:, None]) * heads + head) * P + tl.arange(0, P)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit(do_not_specialize=["length"])
def _head_gradients_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    dy_ptr,
    seq_idx_ptr,
    states_ptr,
    d_states_ptr,
    ddt_ptr,
    dC_ptr,
    by_chunk_ptr,
    length,
    ratio,
    stride_x_batch,
    stride_x_token,
    stride_x_group,
    stride_dt_batch,
    stride_dt_token,
    stride_dt_head,
    stride_B_batch,
    stride_B_token,
    stride_B_group,
    stride_C_batch,
    stride_C_token,
    stride_C_head,
    stride_dy_batch,
    stride_dy_token,
    stride_dy_head,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (H, chunks, B). Gradients of dt and C, and by_chunk (B, chunks, 2 or 1, H): what each chunk adds to that of
    A and to that of D, if there is one."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + chunk
    group = head // ratio
    first = chunk * Q
    q = tl.arange(0, Q)
    token = first + q
    tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]
    state = tl.load(states_ptr + (place * heads + head) * (P * N) + tile)
    d_state = tl.load(d_states_ptr + (place * heads + head) * (P * N) + tile)
    overlap = tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
    C = _rows(C_ptr + row * stride_C_batch + head * stride_C_head, token, stride_C_token, length, N).to(DOT)
    B = _rows(B_ptr + row * stride_B_batch + group * stride_B_group, token, stride_B_token, length, N).to(DOT)
    dy = _rows(dy_ptr + row * stride_dy_batch + head * stride_dy_head, token, stride_dy_token, length, P).to(DOT)
    x = _rows(x_ptr + row * stride_x_batch + group * stride_x_group, token, stride_x_token, length, P).to(DOT)
    A = tl.load(A_ptr + head).to(tl.float32)
    dt_base = dt_ptr + row * stride_dt_batch + head * stride_dt_head
    dt, log_decay, total = _decays(dt_base, A, token, stride_dt_token, length, Q)
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    document, before, last = _documents(seq_idx_base, first, token, stride_seq_idx_token, length, Q, HAS_SEQ_IDX)

    # Through the state that leaves.
    written = tl.sum(tl.dot(x, d_state.to(DOT), input_precision=PRECISION) * B.to(tl.float32), axis=1)
    written *= tl.where(document == last, tl.exp(total - log_decay), 0.0)  # u
    d_total = tl.sum(dt * written, axis=0) + tl.where(last == before, tl.exp(total), 0.0) * overlap

    # Through the state that enters.
    dC = tl.dot(dy, state.to(DOT), input_precision=PRECISION)  # (Q, N)
    dC *= tl.where(document == before, tl.exp(log_decay), 0.0)[:, None]
    d_log = tl.sum(dC * C.to(tl.float32), axis=1)

    # Through the pairs (t, s) of tokens.
    visible = (q[None, :] <= q[:, None]) & (document[None, :] == document[:, None])
    decay = tl.exp(tl.where(visible, log_decay[:, None] - log_decay[None, :], float("-inf")))  # (Q, Q)
    d_mixed = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
    if HAS_D:
        dD = tl.sum(tl.sum(tl.where(q[None, :] == q[:, None], d_mixed, 0.0), axis=1), axis=0)
        tl.store(by_chunk_ptr + (place * 2 + 1) * heads + head, dD)
    d_scores = d_mixed * decay  # without dt
    products = tl.dot(C, tl.trans(B), input_precision=PRECISION) * d_scores
    direct = tl.sum(products, axis=0) + written  # v
    d_log += tl.sum(products * dt[None, :], axis=1)
    dC = tl.dot((d_scores * dt[None, :]).to(DOT), B, dC, input_precision=PRECISION)

    d_decay = tl.cumsum(d_log - dt * direct, axis=0, reverse=True) + d_total
    tl.store(by_chunk_ptr + place * (2 if HAS_D else 1) * heads + head, tl.sum(dt * d_decay, axis=0))
    ddt_ptrs = ddt_ptr + (row * length + token) * heads + head
    tl.store(ddt_ptrs, (A * d_decay + direct).to(ddt_ptr.dtype.element_ty), mask=token < length)
    dC_ptrs = dC_ptr + ((row * length + token[:, None]) * heads + head) * N + tl.arange(0, N)[None, :]
    tl.store(dC_ptrs, dC.to(dC_ptr.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit
def _sum_over_heads(
    key_base,
    query_base,
    value_base,
    dt_base,
    A_ptrs,
    D_ptrs,
    seq_idx_base,
    d_state_ptrs,
    out_base,
    chunk,
    length,
    groups,
    stride_key,
    stride_query,
    stride_query_head,
    stride_value,
    stride_value_head,
    stride_dt,
    stride_dt_head,
    stride_seq_idx,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    RATIO: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ over a group's heads of dt_s (Σ_t (key_s·query_t) W_ts value_t + e_s·(key_s of d_state)) + D value_s, (Q, V).

    keys are the group's (Q, K), queries (Q, K), values (Q, V) and d_state (K, V) those of its first head.
    """
    first = chunk * Q
    q = tl.arange(0, Q)
    token = first + q
    key = _rows(key_base, token, stride_key, length, K).to(DOT)
    document, before, last = _documents(seq_idx_base, first, token, stride_seq_idx, length, Q, HAS_SEQ_IDX)
    out = tl.zeros([Q, V], dtype=tl.float32)
    for r in range(RATIO):
        query = _rows(query_base + r * stride_query_head, token, stride_query, length, K).to(DOT)
        value = _rows(value_base + r * stride_value_head, token, stride_value, length, V).to(DOT)
        d_state = tl.load(d_state_ptrs + r * (K * V)).to(DOT)
        A = tl.load(A_ptrs + r).to(tl.float32)
        dt, log_decay, total = _decays(dt_base + r * stride_dt_head, A, token, stride_dt, length, Q)
        visible = (q[None, :] >= q[:, None]) & (document[None, :] == document[:, None])
        decay = tl.exp(tl.where(visible, log_decay[None, :] - log_decay[:, None], float("-inf")))  # (s, t)
        pairs = tl.dot(key, tl.trans(query), input_precision=PRECISION) * decay * dt[:, None]
        out = tl.dot(pairs.to(DOT), value, out, input_precision=PRECISION)
        to_end = tl.where(document == last, tl.exp(total - log_decay) * dt, 0.0)
        out += tl.dot(key, d_state, input_precision=PRECISION) * to_end[:, None]
        if HAS_D:
            out += value.to(tl.float32) * tl.load(D_ptrs + r).to(tl.float32)
    out_ptrs = out_base + token[:, None] * (groups * V) + tl.arange(0, V)[None, :]
    tl.store(out_ptrs, out.to(out_base.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit(do_not_specialize=["length"])
def _group_gradients_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dy_ptr,
    seq_idx_ptr,
    d_states_ptr,
    dx_ptr,
    dB_ptr,
    length,
    batch,
    stride_x_batch,
    stride_x_token,
    stride_x_group,
    stride_dt_batch,
    stride_dt_token,
    stride_dt_head,
    stride_B_batch,
    stride_B_token,
    stride_B_group,
    stride_C_batch,
    stride_C_token,
    stride_C_head,
    stride_dy_batch,
    stride_dy_token,
    stride_dy_head,
    stride_seq_idx_batch,
    stride_seq_idx_token,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    RATIO: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (G, chunks, 2 B): gradients of x and, by the second half, of B."""
    group = tl.program_id(0)
    groups = tl.num_programs(0)
    chunk = tl.program_id(1)
    row = (tl.program_id(2) % batch).to(tl.int64)
    head = group * RATIO
    C_base = C_ptr + row * stride_C_batch + head * stride_C_head
    dy_base = dy_ptr + row * stride_dy_batch + head * stride_dy_head
    dt_base = dt_ptr + row * stride_dt_batch + head * stride_dt_head
    seq_idx_base = seq_idx_ptr
    if HAS_SEQ_IDX:
        seq_idx_base += row * stride_seq_idx_batch
    d_state_base = d_states_ptr + ((row * tl.num_programs(1) + chunk) * groups + group) * (RATIO * P * N)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    if tl.program_id(2) < batch:
        _sum_over_heads(
            B_ptr + row * stride_B_batch + group * stride_B_group,
            C_base,
            dy_base,
            dt_base,
            A_ptr + head,
            D_ptr + head if HAS_D else None,
            seq_idx_base,
            d_state_base + n[:, None] + p[None, :] * N,
            dx_ptr + (row * length * groups + group) * P,
            chunk,
            length,
            groups,
            stride_B_token,
            stride_C_token,
            stride_C_head,
            stride_dy_token,
            stride_dy_head,
            stride_dt_token,
            stride_dt_head,
            stride_seq_idx_token,
            N,
            P,
            Q,
            RATIO,
            HAS_D,
            HAS_SEQ_IDX,
            DOT,
            PRECISION,
        )
    else:
        _sum_over_heads(
            x_ptr + row * stride_x_batch + group * stride_x_group,
            dy_base,
            C_base,
            dt_base,
            A_ptr + head,
            None,
            seq_idx_base,
            d_state_base + p[:, None] * N + n[None, :],
            dB_ptr + (row * length * groups + group) * N,
            chunk,
            length,
            groups,
            stride_x_token,
            stride_dy_token,
            stride_dy_head,
            stride_C_token,
            stride_C_head,
            stride_dt_token,
            stride_dt_head,
            stride_seq_idx_token,
            P,
            N,
            Q,
            RATIO,
            False,
            HAS_SEQ_IDX,
            DOT,
            PRECISION,
        )


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.ssd_chunked`; differentiates in all but seq_idx, through torch.compile as well.

    x, B and C are all bfloat16 or all float32; P and N are 16, 32, 64 or, in bfloat16, 128. Matrix products run in that
    type (float32 as three products of TensorFloat-32), states are carried in float32 and rounded to it where they
    enter a product. Keeps nothing for the backward pass but its arguments.
    """
    if not fits(x, B, C):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, B {tuple(B.shape)} {B.dtype} and C {tuple(C.shape)} {C.dtype}: the kernels "
            f"take one type for all, last dimensions of {SIZES} up to {LARGEST} by type, and heads in multiples of the "
            "groups: call ssd_chunked for others"
        )
    return torch.ops.mamballama.ssd_scan(x, dt, A, B, C, D, seq_idx, initial_state)


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? seq_idx, Tensor? initial_state"


@torch.library.custom_op(
    "mamballama::ssd_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor y, Tensor final_state)"
)
def _scan(x, dt, A, B, C, D, seq_idx, initial_state):
    x, B, C = (rows_contiguous(t) for t in (x, B, C))
    A, D, initial_state = (_contiguous(t) for t in (A, D, initial_state))
    batch, length, groups, headdim = x.shape
    heads, d_state = C.shape[2:]
    chunks = triton.cdiv(length, CHUNK)
    y, final = _scan_outputs(x, dt, A, B, C, D, seq_idx, initial_state)
    states = x.new_empty(batch, chunks, heads, headdim, d_state)
    _launch_states(x, dt, A, B, C, None, seq_idx, initial_state, None, states, None, final, None)
    _outputs_kernel[(heads, chunks, batch)](
        x,
        dt,
        A,
        B,
        C,
        D,
        seq_idx,
        states,
        y,
        length,
        heads // groups,
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        *document_strides(seq_idx),
        P=headdim,
        N=d_state,
        Q=CHUNK,
        HAS_D=D is not None,
        HAS_SEQ_IDX=seq_idx is not None,
        **_products(x),
        **launch_config("outputs", batch, heads, headdim, d_state, x.element_size()),
    )
    return y, final


@_scan.register_fake
def _scan_outputs(x, dt, A, B, C, D, seq_idx, initial_state):
    batch, length, _, headdim = x.shape
    heads, d_state = C.shape[2:]
    return (
        x.new_empty(batch, length, heads, headdim),
        x.new_empty(batch, heads, headdim, d_state, dtype=torch.float32),
    )


@torch.library.custom_op(
    "mamballama::ssd_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? d_final_state, {_INPUTS}) -> "
    "(Tensor dx, Tensor ddt, Tensor dB, Tensor dC, Tensor dA_dD, Tensor d_initial_state)",
)
def _scan_backward(dy, d_final, x, dt, A, B, C, D, seq_idx, initial_state):
    dy, x, B, C = (rows_contiguous(t) for t in (dy, x, B, C))
    A, D, initial_state, d_final = (_contiguous(t) for t in (A, D, initial_state, d_final))
    batch, length, groups, headdim = x.shape
    heads, d_state = C.shape[2:]
    chunks = triton.cdiv(length, CHUNK)
    dx, ddt, dB, dC, dA_dD, d_initial = _gradients(dy, d_final, x, dt, A, B, C, D, seq_idx, initial_state)
    states = x.new_empty(batch, chunks, heads, headdim, d_state)
    d_states = torch.empty_like(states)
    _launch_states(x, dt, A, B, C, dy, seq_idx, initial_state, d_final, states, d_states, None, d_initial)
    by_chunk = x.new_empty(batch, chunks, *dA_dD.shape, dtype=torch.float32)
    strides = (
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        *dy.stride()[:3],
        *document_strides(seq_idx),
    )
    constants = {"P": headdim, "N": d_state, "Q": CHUNK, "HAS_D": D is not None, "HAS_SEQ_IDX": seq_idx is not None}
    constants |= _products(x)
    _head_gradients_kernel[(heads, chunks, batch)](
        x,
        dt,
        A,
        B,
        C,
        dy,
        seq_idx,
        states,
        d_states,
        ddt,
        dC,
        by_chunk,
        length,
        heads // groups,
        *strides,
        **constants,
        **launch_config("head_gradients", batch, heads, headdim, d_state, x.element_size()),
    )
    _group_gradients_kernel[(groups, chunks, 2 * batch)](
        x,
        dt,
        A,
        B,
        C,
        D,
        dy,
        seq_idx,
        d_states,
        dx,
        dB,
        length,
        batch,
        *strides,
        RATIO=heads // groups,
        **constants,
        **launch_config("group_gradients", batch, heads, headdim, d_state, x.element_size()),
    )
    torch.sum(by_chunk, dim=(0, 1), out=dA_dD)
    return dx, ddt, dB, dC, dA_dD, d_initial


@_scan_backward.register_fake
def _gradients(dy, d_final, x, dt, A, B, C, D, seq_idx, initial_state):
    return (
        *(t.new_empty(t.shape) for t in (x, dt, B, C)),
        x.new_empty(1 if D is None else 2, A.shape[0], dtype=torch.float32),
        x.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32),
    )


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_final):
    x, dt, A, B, C, D, seq_idx, initial_state = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(*C.shape[:3], x.shape[-1])
    inputs = x, dt, A, B, C, D, seq_idx, initial_state
    dx, ddt, dB, dC, dA_dD, d_initial = torch.ops.mamballama.ssd_scan_backward(dy, d_final, *inputs)
    dA = dA_dD[0].to(A.dtype)
    dD = None if D is None else dA_dD[1].to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, None, None if initial_state is None else d_initial.to(initial_state.dtype)


_scan.register_autograd(_backward, setup_context=_remember)


def _launch_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor | None,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    d_final: Tensor | None,
    states: Tensor,
    d_states: Tensor | None,
    final: Tensor | None,
    d_initial: Tensor | None,
) -> None:
    """The walk over the chunks; with dy, the walk back as well."""
    batch, _, heads, headdim, d_state = states.shape
    length, groups = x.shape[1:3]
    directions = 1 if dy is None else 2
    config = launch_config("states", directions * batch, heads, headdim, d_state, x.element_size())
    _states_kernel[(headdim // config["BLOCK_P"], heads, directions * batch)](
        x,
        dt,
        A,
        B,
        C,
        dy,
        seq_idx,
        initial,
        d_final,
        states,
        d_states,
        final,
        d_initial,
        length,
        batch,
        heads // groups,
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        *((0, 0, 0) if dy is None else dy.stride()[:3]),
        *document_strides(seq_idx),
        P=headdim,
        N=d_state,
        Q=CHUNK,
        HAS_SEQ_IDX=seq_idx is not None,
        HAS_INITIAL=initial is not None,
        HAS_D_FINAL=d_final is not None,
        BACKWARD=dy is not None,
        **_products(x),
        **config,
    )


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _products(x: Tensor) -> dict:
    """The type of matrix products' factors and how float32 is multiplied.

    The interpreter (on a CPU) multiplies in float32: it keeps bfloat16 as bits.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return {"DOT": tl.bfloat16, "PRECISION": "tf32"}  # exact products, whatever the precision says
    return {"DOT": tl.float32, "PRECISION": "tf32x3" if x.is_cuda else "ieee"}
