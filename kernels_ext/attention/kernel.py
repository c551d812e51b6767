"""Triton twins of `reference.rope_append` and `reference.decode_attention`.

Decoding is bound by the keys and values that it reads, so one program takes all query rows (R heads × T tokens) of a
group and reads each key once. Where the groups of the batch are too few to fill the GPU, the live keys are split over
programs and a second launch joins the parts (flash decoding; online softmax of 1805.02867).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl

PROGRAMS = 264
"""How many programs of `decode_attention` fill the GPU: two for each of an H200's 132 multiprocessors."""
MAX_SPLITS = 64
NO_PDL = {"launch_pdl": False}
"""Dependent launch made a layer of attention slower on an H200, by 1 to 15 %; `config` can still ask for it."""


def rope_config() -> dict:
    """BLOCK_HEADS heads of one token per program."""
    return {"BLOCK_HEADS": 16, "num_warps": 4}


def launch_config(programs: int, block_q: int, headdim: int, itemsize: int) -> dict:
    """BLOCK_K keys per step, as measured on an H200.

    In 16 bits a warp does the arithmetic of 16 query rows, so one is enough for few and short ones; float32 has no
    tensor cores, so its tiles stay small enough for the registers.
    """
    if itemsize == 4:
        return {"BLOCK_K": 16 if headdim * block_q > 2048 else 32, "num_warps": 4, "num_stages": 2}
    if headdim > 64 and programs >= PROGRAMS:
        return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    if block_q * headdim > 4096:
        return {"BLOCK_K": 64, "num_warps": 4 if block_q <= 64 else 8, "num_stages": 2}
    return {"BLOCK_K": 64, "num_warps": 1 if block_q <= 16 and headdim <= 64 else 2, "num_stages": 3}


def default_splits(batch: int, groups: int, positions: int) -> int:
    """Splits of the keys that fill the GPU, each of 128 or, in long caches, 256 positions: more cost more to join."""
    wanted = triton.cdiv(positions, 128) if positions <= 2048 else positions // 256
    return max(1, min(PROGRAMS // (batch * groups), wanted, MAX_SPLITS))


@triton.jit(do_not_specialize=["offset"])
def _rope_append_kernel(
    qkv, k_cache, v_cache, cos, sin, lengths, slots, q_norm, k_norm, q, offset, eps,
    qkv_stride_b, qkv_stride_t, k_stride_s, k_stride_g, k_stride_m, v_stride_s, v_stride_g, v_stride_m,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, BLOCK_HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    i = (token % T).to(tl.int32)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, HALF)
    q_at = q + (token * H + head[:, None]) * P + d[None, :]
    is_q = (head < H)[:, None] & (d < HALF)[None, :]
    slot = tl.load(slots + b).to(tl.int64)
    source = qkv + b * qkv_stride_b + i * qkv_stride_t + head[:, None] * P + d[None, :]
    present = (head < H + 2 * G)[:, None] & (d < HALF)[None, :]
    first = tl.load(source, mask=present, other=0.0).to(tl.float32)  # on their way before the slot is looked at
    second = tl.load(source + HALF, mask=present, other=0.0).to(tl.float32)
    if slot < 0:
        zero = tl.zeros((BLOCK_HEADS, HALF), dtype=q.dtype.element_ty)
        tl.store(q_at, zero, mask=is_q)
        tl.store(q_at + HALF, zero, mask=is_q)
        return

    position = tl.load(lengths + slot) + offset + i
    is_v = (head >= H + G)[:, None]
    if NORMS:
        power = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / P
        scale = tl.rsqrt(power + eps)[:, None]
        kind = qkv.dtype.element_ty  # what RMSNorm rounds to before its gain, and after
        is_query = (head < H)[:, None]
        gain = tl.where(is_query, tl.load(q_norm + d)[None, :], tl.load(k_norm + d)[None, :]).to(tl.float32)
        first = tl.where(is_v, first, (gain * (first * scale).to(kind)).to(kind).to(tl.float32))
        gain = tl.where(is_query, tl.load(q_norm + HALF + d)[None, :], tl.load(k_norm + HALF + d)[None, :])
        gain = gain.to(tl.float32)
        second = tl.where(is_v, second, (gain * (second * scale).to(kind)).to(kind).to(tl.float32))
    if ROTATES:
        c = tl.load(cos + position * HALF + d)[None, :]
        s = tl.load(sin + position * HALF + d)[None, :]
        turned = second * c + first * s
        first = tl.where(is_v, first, first * c - second * s)
        second = tl.where(is_v, second, turned)
    first_out, second_out = first.to(q.dtype.element_ty), second.to(q.dtype.element_ty)

    tl.store(q_at, first_out, mask=is_q)
    tl.store(q_at + HALF, second_out, mask=is_q)
    k_at = k_cache + slot * k_stride_s + (head - H)[:, None] * k_stride_g + position * k_stride_m + d[None, :]
    is_k = (head >= H)[:, None] & (head < H + G)[:, None] & (d < HALF)[None, :]
    tl.store(k_at, first_out, mask=is_k)
    tl.store(k_at + HALF, second_out, mask=is_k)
    v_at = v_cache + slot * v_stride_s + (head - H - G)[:, None] * v_stride_g + position * v_stride_m + d[None, :]
    tl.store(v_at, first_out, mask=is_v & present)
    tl.store(v_at + HALF, second_out, mask=is_v & present)


def rope_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    slots: Tensor,
    n_heads: int,
    offset: int = 0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    *,
    config: dict | None = None,
) -> Tensor:
    """As the reference, in one launch."""
    batch, length, width = qkv.shape
    groups, headdim = k_cache.shape[1], k_cache.shape[3]
    assert width == (n_heads + 2 * groups) * headdim and qkv.stride(2) == 1
    assert k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    assert all(t is None or t.is_contiguous() for t in (cos, sin, q_norm, k_norm))
    config = rope_config() | (config or {})
    q = torch.empty(batch, length, n_heads, headdim, dtype=qkv.dtype, device=qkv.device)
    grid = (batch * length, triton.cdiv(n_heads + 2 * groups, config["BLOCK_HEADS"]))
    _rope_append_kernel[grid](
        qkv, k_cache, v_cache, cos, sin, lengths, slots, q_norm, k_norm, q, offset, eps,
        *qkv.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        T=length, H=n_heads, G=groups, P=headdim, HALF=headdim // 2, ROTATES=cos is not None,
        NORMS=q_norm is not None,
        **pdl.launch_options(NO_PDL | config, qkv.device, grid[0] * grid[1]),
    )  # fmt: skip
    return q


def _dot_type(q: Tensor) -> tl.dtype:
    """What the products take: q's own type, but float32 in the interpreter, whose bfloat16 products are wrong."""
    if not q.is_cuda:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(q.dtype, tl.float32)


@triton.jit(do_not_specialize=["offset"])
def _decode_attention_kernel(
    q, k_cache, v_cache, lengths, slots, out, part, part_max, part_sum, offset, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_s, k_stride_g, k_stride_m, v_stride_s, v_stride_g, v_stride_m,
    T: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0) // G
    g = tl.program_id(0) % G
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_Q)  # query rows: the R heads of the group for token 0, then for token 1, …
    t = row // R
    head = g * R + row % R
    p = tl.arange(0, BLOCK_P)
    q_mask = (t < T)[:, None] & (p < P)[None, :]
    out_row = (b * T + t) * (G * R) + head
    slot = tl.load(slots + b).to(tl.int64)
    q_at = q + b * q_stride_b + t[:, None] * q_stride_t + head[:, None] * q_stride_h + p[None, :]
    queries = tl.load(q_at, mask=q_mask, other=0.0).to(DOT)  # (BLOCK_Q, BLOCK_P), loaded while the slot is
    if slot < 0:
        if SPLITS == 1:  # with more, the second launch does it
            zero = tl.zeros((BLOCK_Q, BLOCK_P), dtype=out.dtype.element_ty)
            tl.store(out + out_row[:, None] * P + p[None, :], zero, mask=q_mask)
        return

    n_keys = tl.load(lengths + slot) + offset + T
    last = n_keys - T + t  # the last position that a query row sees
    oldest = tl.maximum(n_keys - T + 1 - WINDOW, 0) if WINDOW > 0 else 0  # the first position that any row sees
    steps = tl.cdiv(tl.cdiv(n_keys - oldest, SPLITS), BLOCK_K)
    begin = oldest + split * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, n_keys)
    k_base = k_cache + slot * k_stride_s + g * k_stride_g + p[None, :]
    v_base = v_cache + slot * v_stride_s + g * v_stride_g + p[None, :]
    # A row that sees no key of this split keeps a finite maximum, so that no ∞ − ∞ arises: its weights are all 0.
    # Keys past the end are past every query's `last` too, but for rows that pad BLOCK_Q: those see zeros.
    top = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_P), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        kv_mask = (key < end)[:, None]
        if P < BLOCK_P:
            kv_mask = kv_mask & (p < P)[None, :]
        k = tl.load(k_base + key[:, None] * k_stride_m, mask=kv_mask, other=0.0).to(DOT)  # (BLOCK_K, BLOCK_P)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_K), to base 2
        seen = key[None, :] <= last[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > last[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_base + key[:, None] * v_stride_m, mask=kv_mask, other=0.0).to(DOT)  # (BLOCK_K, BLOCK_P)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
        top = new_top

    if SPLITS == 1:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + out_row[:, None] * P + p[None, :], result, mask=q_mask)
    else:
        part_row = out_row * SPLITS + split
        tl.store(part + part_row[:, None] * P + p[None, :], acc, mask=q_mask)
        tl.store(part_max + part_row, top, mask=t < T)
        tl.store(part_sum + part_row, total, mask=t < T)


@triton.jit
def _join_splits_kernel(
    part, part_max, part_sum, slots, out,
    ROWS: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)  # of (B, T, H); a slot has ROWS of them
    s = tl.arange(0, BLOCK_S)
    p = tl.arange(0, BLOCK_P)
    slot = tl.load(slots + row // ROWS)
    live = (s < SPLITS) & (slot >= 0)
    part_at = part + (row * SPLITS + s[:, None]) * P + p[None, :]
    acc = tl.load(part_at, mask=live[:, None] & (p < P)[None, :], other=0.0)
    top = tl.load(part_max + row * SPLITS + s, mask=live, other=-1e30)
    totals = tl.load(part_sum + row * SPLITS + s, mask=live, other=0.0)
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(totals * share, 0)
    mixed = tl.sum(acc * share[:, None], 0) / tl.where(slot >= 0, total, 1.0)  # zero for padding
    tl.store(out + row * P + p, mixed.to(out.dtype.element_ty), mask=p < P)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    slots: Tensor,
    offset: int = 0,
    splits: int | None = None,
    sliding_window: int | None = None,
    *,
    config: dict | None = None,
) -> Tensor:
    """As the reference; keys before the sliding window are not read. `splits`: in how many parts the live keys are read
    side by side, by default as many as fill the GPU; ValueError if R·T > 128 query rows share a group."""
    batch, length, heads, headdim = q.shape
    groups, positions = k_cache.shape[1:3]
    ratio = heads // groups
    assert q.stride(3) == 1 and k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    if ratio * length > 128:
        raise ValueError(
            f"{length} tokens × {ratio} heads per group are {ratio * length} query rows, more than 128: "
            "lower the window (K + 1)"
        )
    if sliding_window is not None:
        positions = min(positions, sliding_window + length - 1)
    splits = default_splits(batch, groups, positions) if splits is None else splits
    block_q, block_p = max(16, triton.next_power_of_2(ratio * length)), max(16, headdim)
    programs = batch * groups * splits
    config = launch_config(programs, block_q, headdim, q.element_size()) | (config or {})
    out = torch.empty(batch, length, heads, headdim, dtype=q.dtype, device=q.device)
    part = part_max = part_sum = None
    if splits > 1:
        part = torch.empty(batch, length, heads, splits, headdim, dtype=torch.float32, device=q.device)
        part_max, part_sum = torch.empty(2, *part.shape[:-1], dtype=torch.float32, device=q.device)
    _decode_attention_kernel[(batch * groups, splits)](
        q, k_cache, v_cache, lengths, slots, out, part, part_max, part_sum, offset, math.log2(math.e) / headdim**0.5,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        T=length, G=groups, R=ratio, P=headdim, WINDOW=sliding_window or 0, SPLITS=splits, BLOCK_Q=block_q,
        BLOCK_P=block_p, DOT=_dot_type(q), **pdl.launch_options(NO_PDL | config, q.device, programs),
    )  # fmt: skip
    if splits > 1:
        block_s = triton.next_power_of_2(splits)
        join = {"num_warps": max(1, min(block_s * block_p // 2048, 4)), "launch_pdl": config.get("launch_pdl", False)}
        _join_splits_kernel[(batch * length * heads,)](
            part, part_max, part_sum, slots, out,
            ROWS=length * heads, P=headdim, SPLITS=splits, BLOCK_S=block_s, BLOCK_P=block_p,
            **pdl.launch_options(join, q.device, batch * length * heads),
        )  # fmt: skip
    return out
