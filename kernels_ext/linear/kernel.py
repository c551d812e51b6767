"""`reference.py` for 1 to 16 rows as one Triton kernel that reads every weight once and nothing else that counts.

With so few rows a linear layer is a read of its weights, and each program reads BLOCK_N whole rows of them. Up to two
rows of x are multiplied on the plain arithmetic units, from weights loaded straight into registers: many loads in
flight, no shared memory until the final sum over K. More rows go through the tensor cores, x padded to 16 rows.

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
    if PDL:
        gdc_wait()
    addend = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        addend += tl.load(bias + n_read).to(tl.float32)[None, :]
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
            b = tl.load(x_rows + start + w_k).to(tl.float32)  # (BLOCK_M, 1, BLOCK_K)
            if norm_weight is not None:
                squares += _sum_vectors(b * b, VECTOR)
                b = b * tl.load(norm_weight + start + w_k).to(tl.float32)
            acc += _sum_vectors(w.to(tl.float32) * b, VECTOR)
            if GATED:
                acc_up += _sum_vectors(up.to(tl.float32) * b, VECTOR)
            w = w_next
            up = up_next
        b = _load(x_rows, LAST + w_k, K, EVEN).to(tl.float32)
        if norm_weight is not None:
            squares += _sum_vectors(b * b, VECTOR)
            b = b * _load(norm_weight, LAST + w_k, K, EVEN).to(tl.float32)
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


def launch_config(M: int, Nout: int, K: int, dtype: torch.dtype, gated: bool = False) -> dict[str, Any]:
    """How a shape is launched. Nout: outputs, so half of the rows of a gated weight.

    BLOCK_N outputs a program; BLOCK_K columns at a time, a power of two; DOT: by tensor cores (BLOCK_N ≥ 16);
    num_warps, num_stages (depth of the loads' pipeline, DOT alone); launch_pdl: start while the kernel before is still
    running and read the first weights then. With launch_pdl the weights must not be what the kernel before writes.
    """
    if M <= 2 or dtype == torch.float32:
        return _by_registers(M, Nout, K, 2 if gated else 1)
    return _by_tensor_cores(Nout, K, 2 if gated else 1)


def candidates(M: int, Nout: int, K: int, gated: bool = False) -> list[dict[str, Any]]:
    """Up to 24 configurations worth timing for 16-bit weights, the one of `launch_config` first."""
    found = [launch_config(M, Nout, K, torch.bfloat16, gated)]
    weights = 2 if gated else 1
    whole = triton.next_power_of_2(K)
    if M > 2:
        for BLOCK_N, num_warps in ((16, 1), (32, 2), (64, 4)):
            for BLOCK_K in (128, 256):
                for num_stages in (3, 4, 6):
                    if whole >= BLOCK_K and _shared_bytes(BLOCK_N, BLOCK_K, num_stages, weights) <= 112 * 1024:
                        found.append(_config(BLOCK_N, BLOCK_K, True, num_warps, num_stages))
    for num_warps in (4, 2, 8, 1):
        for BLOCK_K in (256, 512, 1024, 2048, 4096):
            for BLOCK_N in (1, 2, 4, 8):
                loads = weights * BLOCK_N * BLOCK_K // (8 * 32 * num_warps)  # of 16 bytes, by one thread
                rows = triton.next_power_of_2(M)
                sums, inputs = rows * weights * BLOCK_N, rows * BLOCK_K // (32 * num_warps)
                if 256 * num_warps <= BLOCK_K <= whole and loads in (4, 8) and sums <= 16 and inputs <= 128:
                    found.append(_config(BLOCK_N, BLOCK_K, False, num_warps, 1))
    unique = [config for i, config in enumerate(found) if config not in found[:i]]
    return unique[:24]


def _by_registers(M: int, Nout: int, K: int, weights: int) -> dict[str, Any]:
    BLOCK_K = min(max(triton.next_power_of_2(K), 16), 4096)
    num_warps = min(max(BLOCK_K // 256, 1), 4)  # 16 bytes of each row a thread, more where rows are long
    BLOCK_N = 4 if Nout >= 8192 else 2
    while BLOCK_N > 1 and triton.next_power_of_2(M) * weights * BLOCK_N > 4:
        BLOCK_N //= 2
    return _config(BLOCK_N, BLOCK_K, False, num_warps, 1)


def _by_tensor_cores(Nout: int, K: int, weights: int) -> dict[str, Any]:
    BLOCK_K = min(max(triton.next_power_of_2(K), 16), 256 // weights)
    BLOCK_N, num_warps = (32, 2) if Nout >= 8192 and weights == 1 else (16, 1)
    return _config(BLOCK_N, BLOCK_K, True, num_warps, 4 if Nout >= 8192 else 6)


def _shared_bytes(BLOCK_N: int, BLOCK_K: int, num_stages: int, weights: int) -> int:
    return (num_stages - 1) * 2 * BLOCK_K * (weights * BLOCK_N + MAX_ROWS)


def _config(BLOCK_N: int, BLOCK_K: int, DOT: bool, num_warps: int, num_stages: int) -> dict[str, Any]:
    return {
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "DOT": DOT,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "launch_pdl": False,
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
    dot_dtype, dot_precision = tl.float32, "ieee"
    if x.dtype == torch.float16:
        dot_precision = "tf32"  # holds every float16 weight, and x·norm_weight cannot overflow
    elif x.dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter's bfloat16 products are wrong
        dot_dtype = tl.bfloat16
    _linear_kernel[(triton.cdiv(N, chosen["BLOCK_N"]),)](
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
        BLOCK_M=MAX_ROWS if chosen["DOT"] else triton.next_power_of_2(M),
        VECTOR=16 // x.element_size(),
        DOT_DTYPE=dot_dtype,
        DOT_PRECISION=dot_precision,
        PDL=launch_pdl,
        **chosen,
    )
    return out
