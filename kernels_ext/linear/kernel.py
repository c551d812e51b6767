"""`reference.py` for 1 to 16 rows as one Triton kernel that reads every weight once and nothing else that counts.

With so few rows a linear layer is a read of its weights, and each program reads BLOCK_N whole rows of them. Up to two
rows of x are multiplied on the plain arithmetic units, from weights loaded straight into registers: many loads in
flight, no shared memory until the final sum over K. More rows go through the tensor cores, x padded to 8 or 16 rows:
block by block over K where weights are large, all of K at once where they are small and only latency counts.

RMSNorm(x)·Wᵀ = (x·norm_weight)·Wᵀ / sqrt(mean(x²) + eps): Σx² is summed along with the product and divides at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _load_weight(rows, k, K: tl.constexpr, EVEN: tl.constexpr):
    """Read once a step, so not to push out of the L2 cache what the next kernels will read."""
    if EVEN:
        return tl.load(rows + k, eviction_policy="evict_first")
    else:
        return tl.load(rows + k, mask=k < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load(rows, k, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(rows + k)
    else:
        return tl.load(rows + k, mask=k < K, other=0.0)


@triton.jit
def _sum_vectors(x, VECTOR: tl.constexpr):
    """Sums over what one thread loaded at once, so without talking to others: (M, N, K) → (M, N, K / VECTOR)."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // VECTOR, VECTOR)), axis=3)


@triton.jit
def _linear_kernel(
    x,
    weight,
    norm_weight,
    bias,
    residual,
    out,
    M,
    N,
    eps,
    stride_x,
    stride_weight,
    stride_residual,
    stride_out,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    DOT: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Rows past the last are the last again: whole tiles without masks, dropped by the store.
    n_read = tl.minimum(n, N - 1)
    m_read = tl.minimum(m, M - 1)
    w_rows = weight + n_read.to(tl.int64) * stride_weight
    up_rows = weight + (n_read + N).to(tl.int64) * stride_weight
    x_rows = x + m_read * stride_x
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    if DOT:
        w_k = tl.arange(0, BLOCK_K)[None, :]
        w_rows = w_rows[:, None]
        up_rows = up_rows[:, None]
    else:
        w_k = tl.arange(0, BLOCK_K)[None, None, :]
        w_rows = w_rows[None, :, None]
        up_rows = up_rows[None, :, None]
        # The first weights do not wait for x, and later ones are on their way while these are multiplied.
        w = _load_weight(w_rows, w_k, K, EVEN)
        up = w
        if GATED:
            up = _load_weight(up_rows, w_k, K, EVEN)
        norm = w
        if norm_weight is not None:
            norm = _load(norm_weight, w_k, K, EVEN)
    addend = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        addend += tl.load(bias + n_read).to(tl.float32)[None, :]
    if PDL:
        gdc_wait()
    if residual is not None:
        addend += tl.load(residual + m_read[:, None] * stride_residual + n_read[None, :]).to(tl.float32)

    if DOT:
        x_k = tl.arange(0, BLOCK_K)[:, None]
        x_rows = x_rows[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Σx² in every row, by the tensor cores too: its layout is then that of the product.
        squares = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        ones = tl.full((BLOCK_N, BLOCK_K), 1.0, DOT_DTYPE)
        for start in range(0, K, BLOCK_K):
            w = _load_weight(w_rows, start + w_k, K, EVEN).to(DOT_DTYPE)
            b = _load(x_rows, start + x_k, K, EVEN).to(DOT_DTYPE)  # (BLOCK_K, BLOCK_M)
            if norm_weight is not None:
                squares = tl.dot(ones, b * b, squares, input_precision=DOT_PRECISION)
                b = b * _load(norm_weight, start + x_k, K, EVEN).to(DOT_DTYPE)
            acc = tl.dot(w, b, acc, input_precision=DOT_PRECISION)
            if GATED:
                up = _load_weight(up_rows, start + w_k, K, EVEN).to(DOT_DTYPE)
                acc_up = tl.dot(up, b, acc_up, input_precision=DOT_PRECISION)
        if norm_weight is not None:
            scale = tl.rsqrt(squares / K + eps)
            acc = acc * scale
            acc_up = acc_up * scale
        y = tl.trans(acc)  # (BLOCK_M, BLOCK_N)
        y_up = tl.trans(acc_up)
    else:
        x_rows = x_rows[:, None, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
        squares = tl.zeros((BLOCK_M, 1, BLOCK_K // VECTOR), tl.float32)
        for start in range(0, LAST, BLOCK_K):
            w_next = _load_weight(w_rows, start + BLOCK_K + w_k, K, EVEN)
            up_next = w_next
            if GATED:
                up_next = _load_weight(up_rows, start + BLOCK_K + w_k, K, EVEN)
            norm_next = w_next
            if norm_weight is not None:
                norm_next = _load(norm_weight, start + BLOCK_K + w_k, K, EVEN)
            b = tl.load(x_rows + start + w_k).to(tl.float32)  # (BLOCK_M, 1, BLOCK_K)
            if norm_weight is not None:
                squares += _sum_vectors(b * b, VECTOR)
                b = b * norm.to(tl.float32)
            acc += _sum_vectors(w.to(tl.float32) * b, VECTOR)
            if GATED:
                acc_up += _sum_vectors(up.to(tl.float32) * b, VECTOR)
            w = w_next
            up = up_next
            norm = norm_next
        b = _load(x_rows, LAST + w_k, K, EVEN).to(tl.float32)
        if norm_weight is not None:
            squares += _sum_vectors(b * b, VECTOR)
            b = b * norm.to(tl.float32)
        y = tl.sum(acc + _sum_vectors(w.to(tl.float32) * b, VECTOR), axis=2)  # (BLOCK_M, BLOCK_N)
        y_up = y
        if GATED:
            y_up = tl.sum(acc_up + _sum_vectors(up.to(tl.float32) * b, VECTOR), axis=2)
        if norm_weight is not None:
            scale = tl.rsqrt(tl.sum(squares, axis=2) / K + eps)  # (BLOCK_M, 1)
            y = y * scale
            y_up = y_up * scale

    if GATED:
        y = y * tl.sigmoid(y) * y_up
    live = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * stride_out + n[None, :], (y + addend).to(out.dtype.element_ty), mask=live)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_threes(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _products(x, weight, WEIGHT_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """(SPLIT, M, K), (SPLIT, N, K) → (SPLIT, M, N) or, WEIGHT_FIRST, (SPLIT, N, M)."""
    if WEIGHT_FIRST:
        return tl.dot(weight, tl.permute(x, (0, 2, 1)), input_precision=PRECISION)
    else:
        return tl.dot(x, tl.permute(weight, (0, 2, 1)), input_precision=PRECISION)


@triton.jit
def _whole_kernel(
    x,
    weight,
    norm_weight,
    bias,
    residual,
    out,
    M,
    N,
    eps,
    stride_x,
    stride_weight,
    stride_residual,
    stride_out,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """All of K at once, as a block of HEAD columns and one of TAIL. Each is cut into SPLIT products of their own: a
    tensor core's product waits for the one it is added to, so one long sum over K is slow however short the loads."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n_read = tl.minimum(n, N - 1)
    part = tl.arange(0, SPLIT)[:, None, None]
    head_k = part * (HEAD // SPLIT) + tl.arange(0, HEAD // SPLIT)[None, None, :]
    tail_k = HEAD + part * (TAIL // SPLIT) + tl.arange(0, TAIL // SPLIT)[None, None, :]
    TAIL_EVEN: tl.constexpr = HEAD + TAIL == K

    # Everything that the kernel before does not write is read before waiting for it, norm_weight multiplied in.
    w_rows = weight + (n_read.to(tl.int64) * stride_weight)[None, :, None]
    w_head = _load_weight(w_rows, head_k, K, True).to(DOT_DTYPE)
    w_tail = _load_weight(w_rows, tail_k, K, TAIL_EVEN).to(DOT_DTYPE)
    up_head = w_head
    up_tail = w_tail
    if GATED:
        up_rows = weight + ((n_read + N).to(tl.int64) * stride_weight)[None, :, None]
        up_head = _load_weight(up_rows, head_k, K, True).to(DOT_DTYPE)
        up_tail = _load_weight(up_rows, tail_k, K, TAIL_EVEN).to(DOT_DTYPE)
    if norm_weight is not None:
        norm_head = _load(norm_weight, head_k, K, True).to(DOT_DTYPE)
        norm_tail = _load(norm_weight, tail_k, K, TAIL_EVEN).to(DOT_DTYPE)
        w_head = w_head * norm_head
        w_tail = w_tail * norm_tail
        up_head = up_head * norm_head
        up_tail = up_tail * norm_tail
    addend = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        addend += tl.load(bias + n_read).to(tl.float32)[None, :]
    if PDL:
        gdc_wait()
    x_rows = x + (m * stride_x)[None, :, None]
    live = (m < M)[None, :, None]
    x_head = tl.load(x_rows + head_k, mask=live, other=0.0)
    x_tail = tl.load(x_rows + tail_k, mask=live & (tail_k < K), other=0.0)
    if residual is not None:
        read = residual + m[:, None] * stride_residual + n_read[None, :]
        addend += tl.load(read, mask=(m < M)[:, None], other=0.0).to(tl.float32)

    b_head = x_head.to(DOT_DTYPE)
    b_tail = x_tail.to(DOT_DTYPE)
    acc = _products(b_head, w_head, WEIGHT_FIRST, DOT_PRECISION)
    acc += _products(b_tail, w_tail, WEIGHT_FIRST, DOT_PRECISION)
    acc_up = acc
    squares = acc
    if GATED:
        acc_up = _products(b_head, up_head, WEIGHT_FIRST, DOT_PRECISION)
        acc_up += _products(b_tail, up_tail, WEIGHT_FIRST, DOT_PRECISION)
    if norm_weight is not None:
        # Σx² by the tensor cores too: its layout is then that of the product.
        ones_head = tl.full((SPLIT, BLOCK_N, HEAD // SPLIT), 1.0, DOT_DTYPE)
        ones_tail = tl.full((SPLIT, BLOCK_N, TAIL // SPLIT), 1.0, DOT_DTYPE)
        squares = _products(b_head * b_head, ones_head, WEIGHT_FIRST, DOT_PRECISION)
        squares += _products(b_tail * b_tail, ones_tail, WEIGHT_FIRST, DOT_PRECISION)
    if GATED:
        y, y_up, squares = tl.reduce((acc, acc_up, squares), 0, _add_threes)
    elif norm_weight is not None:
        y, squares = tl.reduce((acc, squares), 0, _add_pairs)
        y_up = y
    else:
        y = tl.sum(acc, axis=0)
        y_up = y
    if norm_weight is not None:
        scale = tl.rsqrt(squares / K + eps)
        y = y * scale
        y_up = y_up * scale
    if WEIGHT_FIRST:
        y = tl.trans(y)
        y_up = tl.trans(y_up)
    if GATED:
        y = y * tl.sigmoid(y) * y_up
    live = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * stride_out + n[None, :], (y + addend).to(out.dtype.element_ty), mask=live)


INTERPRETED = not isinstance(_linear_kernel, triton.JITFunction)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel serves x (M, K) and weight (Nout, K): on CUDA, few rows, one type, no gradient wanted."""
    return (
        (x.is_cuda or INTERPRETED)
        and x.dim() == 2
        and 1 <= x.shape[0] <= MAX_ROWS
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and x.stride(1) == 1
        and weight.stride(1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, config: dict[str, Any] | None = None) -> Tensor:
    """See `reference.linear`; `config` as `launch_config` returns."""
    return _launch(x, weight, None, 0.0, bias, None, False, config)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """See `reference.norm_linear`; x·norm_weight is rounded once here, where the reference rounds twice."""
    return _launch(x, weight, norm_weight, eps, bias, None, False, config, out_dtype)


def linear_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """See `reference.linear_add`."""
    return _launch(x, weight, None, 0.0, bias, residual, False, config)


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor, *, config: dict[str, Any] | None = None
) -> Tensor:
    """See `reference.norm_swiglu`; gate and up stay float32 until they are multiplied."""
    return _launch(x, gate_up, norm_weight, eps, None, None, True, config)


def pays(M: int, Nout: int, K: int) -> bool:
    """Whether these kernels beat cuBLAS with a norm, a gate or a residual of their own, as measured on an H200: for one
    or two rows always, for more as long as the weight is small and starting kernels is what costs."""
    return M <= 2 or (Nout < 8192 and K <= 2048)


def launch_config(M: int, Nout: int, K: int, dtype: torch.dtype, gated: bool = False) -> dict[str, Any]:
    """How a shape is launched. Nout: outputs, so half of the rows of a gated weight.

    BLOCK_N outputs a program. SPLIT > 0: all of K at once, in so many products by tensor cores, for small K;
    WEIGHT_FIRST: x padded to 8 rows, where it has no more, instead of 16. SPLIT = 0: BLOCK_K columns at a time;
    DOT: by tensor cores (BLOCK_N ≥ 16), num_stages of loads in flight. launch_pdl: start while the kernel
    before is still running and read the first weights then; they must not be what the kernel before writes.
    """
    rows, weights = triton.next_power_of_2(M), 2 if gated else 1
    if dtype == torch.float32:
        return _by_registers(max(4 // (rows * weights), 1), min(_blocked(K), max(8192 // rows, 256)), 4)
    if M <= 2:
        return _few(rows, Nout, K, gated)
    if 128 <= _head(K) <= 1024 and Nout < 8192:
        square = Nout <= K <= 1024 and not gated
        return _whole(16, 4 if M > 8 or square else 8, 4, True)
    if gated:
        return _by_tensor_cores(32, min(_blocked(K), 128), 2, 6)
    return _by_tensor_cores(64, min(_blocked(K), 128), 4, 6)


def candidates(M: int, Nout: int, K: int, gated: bool = False) -> list[dict[str, Any]]:
    """Up to 24 configurations worth timing for 16-bit weights, the one of `launch_config` first."""
    found = [launch_config(M, Nout, K, torch.bfloat16, gated)]
    weights = 2 if gated else 1
    whole = triton.next_power_of_2(K)
    if 64 < K <= 2048:
        for BLOCK_N, SPLIT, num_warps in ((16, 4, 4), (16, 8, 8), (32, 4, 4), (64, 4, 4)):
            if BLOCK_N * weights * whole <= 64 * 1024 and _head(K) // 16 >= SPLIT:
                found.append(_whole(BLOCK_N, SPLIT, num_warps, True))
                if BLOCK_N <= 32:
                    found.append(_whole(BLOCK_N // 2, SPLIT, num_warps, False))
    if M > 2:
        for BLOCK_N, num_warps in ((16, 1), (32, 2), (64, 4)):
            for BLOCK_K in (128, 256):
                for num_stages in (3, 6):
                    if whole >= BLOCK_K and _shared_bytes(BLOCK_N, BLOCK_K, num_stages, weights) <= 112 * 1024:
                        found.append(_by_tensor_cores(BLOCK_N, BLOCK_K, num_warps, num_stages))
    for num_warps in (4, 2, 8, 1):
        for BLOCK_K in (256, 512, 1024, 2048, 4096):
            for BLOCK_N in (1, 2, 4, 8):
                loads = weights * BLOCK_N * BLOCK_K // (8 * 32 * num_warps)  # of 16 bytes, by one thread
                rows = triton.next_power_of_2(M)
                sums, inputs = rows * weights * BLOCK_N, rows * BLOCK_K // (32 * num_warps)
                if 256 * num_warps <= BLOCK_K <= whole and loads in (4, 8) and sums <= 16 and inputs <= 128:
                    found.append(_by_registers(BLOCK_N, BLOCK_K, num_warps))
    unique = [config for i, config in enumerate(found) if config not in found[:i]]
    return unique[:24]


def _few(rows: int, Nout: int, K: int, gated: bool) -> dict[str, Any]:
    """One or two rows of 16 bits, as measured on an H200: large weights want many loads in flight and few, whole rows a
    program; small ones want the launch hidden, for which many small programs are best."""
    if K > 8192:
        BLOCK_N, BLOCK_K, num_warps = 8, 1024, 4
    elif K >= 2048:
        BLOCK_N, BLOCK_K, num_warps = (2 if gated else 4), (4096 if gated or Nout >= 8192 else 1024), 4
    elif Nout >= 8192:
        BLOCK_N, BLOCK_K, num_warps = 4, 512, 1
    else:
        BLOCK_N, BLOCK_K, num_warps = (2 if K <= 1024 else 1), 1024, 1
    launch_pdl = K <= 8192 and (K >= 2048 or Nout < 8192)
    return _by_registers(max(BLOCK_N // rows, 1), min(_blocked(K), BLOCK_K), num_warps, launch_pdl)


def _blocked(K: int) -> int:
    return min(max(triton.next_power_of_2(K), 16), 4096)


def _head(K: int) -> int:
    """The largest power of two below K."""
    return triton.next_power_of_2(K) // 2


def _shared_bytes(BLOCK_N: int, BLOCK_K: int, num_stages: int, weights: int) -> int:
    return (num_stages - 1) * 2 * BLOCK_K * (weights * BLOCK_N + MAX_ROWS)


def _by_registers(BLOCK_N: int, BLOCK_K: int, num_warps: int, launch_pdl: bool = False) -> dict[str, Any]:
    return _config(BLOCK_N, BLOCK_K, False, 0, False, num_warps, 1, launch_pdl)


def _by_tensor_cores(BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int) -> dict[str, Any]:
    return _config(BLOCK_N, BLOCK_K, True, 0, False, num_warps, num_stages, True)


def _whole(BLOCK_N: int, SPLIT: int, num_warps: int, WEIGHT_FIRST: bool) -> dict[str, Any]:
    return _config(BLOCK_N, 0, True, SPLIT, WEIGHT_FIRST, num_warps, 1, True)


def _config(
    BLOCK_N: int,
    BLOCK_K: int,
    DOT: bool,
    SPLIT: int,
    WEIGHT_FIRST: bool,
    num_warps: int,
    num_stages: int,
    launch_pdl: bool,
) -> dict[str, Any]:
    return {
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "DOT": DOT,
        "SPLIT": SPLIT,
        "WEIGHT_FIRST": WEIGHT_FIRST,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "launch_pdl": launch_pdl,
    }


def _launch(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    config: dict[str, Any] | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    M, K = x.shape
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    out_dtype = out_dtype or (x if residual is None else residual).dtype
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    chosen = launch_config(M, N, K, x.dtype, gated) | (config or {})
    launch_pdl = chosen.pop("launch_pdl") and not INTERPRETED
    if launch_pdl:
        chosen["launch_pdl"] = True
    split, weight_first = chosen.pop("SPLIT"), chosen.pop("WEIGHT_FIRST")
    rows = triton.next_power_of_2(M)
    if split:
        del chosen["BLOCK_K"], chosen["DOT"]
        function = _whole_kernel
        head = _head(K)
        chosen |= {
            "HEAD": head,
            "TAIL": max(triton.next_power_of_2(K - head), 16 * split),
            "SPLIT": split,
            "WEIGHT_FIRST": weight_first,
            "BLOCK_M": max(rows, 8) if weight_first else MAX_ROWS,
        }
    else:
        function = _linear_kernel
        chosen |= {"VECTOR": 16 // x.element_size(), "BLOCK_M": MAX_ROWS if chosen["DOT"] else rows}
    dot_dtype, dot_precision = tl.float32, "ieee"
    if x.dtype == torch.float16:
        dot_precision = "tf32"  # holds every float16 weight, and x·norm_weight cannot overflow
    elif x.dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter's bfloat16 products are wrong
        dot_dtype = tl.bfloat16
    function[(triton.cdiv(N, chosen["BLOCK_N"]),)](
        x,
        weight,
        norm_weight,
        bias,
        residual,
        out,
        M,
        N,
        eps,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        K=K,
        GATED=gated,
        DOT_DTYPE=dot_dtype,
        DOT_PRECISION=dot_precision,
        PDL=launch_pdl,
        **chosen,
    )
    return out
