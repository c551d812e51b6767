"""Triton twin of `ring_reference.window_gate`: one program per token and head, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels_ext import pdl


def launch_config(window: int, headdim: int) -> dict:
    """About 16 numbers of the ring a thread: one pass, and enough loads in flight."""
    numbers = triton.next_power_of_2(window) * triton.next_power_of_2(headdim)
    return {"num_warps": max(1, min(8, numbers // 512))}


@triton.jit(do_not_specialize=["offset"])
def _window_gate_kernel(
    y, C, z, weight, sink, ring_x, ring_B, lengths, slots, out, offset, scale,
    C_stride_b, C_stride_t, C_stride_h, z_stride_b, z_stride_t,
    ring_x_stride_s, ring_x_stride_l, ring_B_stride_s, ring_B_stride_l,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    b, i = token // T, token % T
    g = h // (H // G)
    d = tl.arange(0, BLOCK_P)
    in_p = d < P
    of_scan, of_window = h * P + d, (H + h) * P + d
    scan_weight = tl.load(weight + of_scan, mask=in_p, other=0.0).to(tl.float32)
    window_weight = tl.load(weight + of_window, mask=in_p, other=0.0).to(tl.float32)
    sink_key = tl.load(sink + g * P + d, mask=in_p, other=0.0).to(tl.float32)
    sink_value = tl.load(sink + (G + g) * P + d, mask=in_p, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    slot = tl.load(slots + b).to(tl.int64)
    live = slot >= 0
    position = tl.load(lengths + slot, mask=live, other=0) + offset + i.to(tl.int32)
    q = tl.load(C + b * C_stride_b + i * C_stride_t + h * C_stride_h + d, mask=in_p, other=0.0).to(tl.float32) * scale
    gates = z + b * z_stride_b + i * z_stride_t
    scan_gate = tl.load(gates + of_scan, mask=in_p, other=0.0).to(tl.float32)
    window_gate = tl.load(gates + of_window, mask=in_p, other=0.0).to(tl.float32)
    scanned = tl.load(y + (token * H + h) * P + d, mask=in_p, other=0.0).to(tl.float32)

    back = tl.arange(0, BLOCK_W)
    place = position - back
    seen = (back < W) & (place >= 0) & live
    row = (place % L)[:, None]
    tile = seen[:, None] & in_p[None, :]
    inside = g * P + d[None, :]
    keys = tl.load(ring_B + slot * ring_B_stride_s + row * ring_B_stride_l + inside, mask=tile, other=0.0)
    values = tl.load(ring_x + slot * ring_x_stride_s + row * ring_x_stride_l + inside, mask=tile, other=0.0)
    scores = tl.where(seen, tl.sum(keys.to(tl.float32) * q[None, :], 1), float("-inf"))
    sink_score = tl.sum(sink_key * q, 0)
    highest = tl.maximum(tl.max(scores, 0), sink_score)
    weights, sink_share = tl.exp(scores - highest), tl.exp(sink_score - highest)
    total = tl.sum(weights, 0) + sink_share
    attended = (tl.sum(weights[:, None] * values.to(tl.float32), 0) + sink_share * sink_value) / total

    scanned = tl.where(live, scanned * scan_gate * tl.sigmoid(scan_gate) * scan_weight, 0.0)
    attended = tl.where(live, attended * window_gate * tl.sigmoid(window_gate) * window_weight, 0.0)
    to = out + token * (2 * H * P)
    tl.store(to + of_scan, scanned.to(out.dtype.element_ty), mask=in_p)
    tl.store(to + of_window, attended.to(out.dtype.element_ty), mask=in_p)


def window_gate(
    y: Tensor,
    C: Tensor,
    z: Tensor,
    weight: Tensor,
    sink: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    lengths: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
    *,
    config: dict | None = None,
) -> Tensor:
    """As the reference."""
    batch, length, heads, headdim = C.shape
    groups = ring_x.shape[2]
    assert y.is_contiguous() and y.shape == C.shape and C.stride(3) == z.stride(2) == 1
    assert weight.is_contiguous() and sink.is_contiguous() and sink.shape == (2, groups, headdim)
    assert ring_x[0, 0].is_contiguous() and ring_B[0, 0].is_contiguous() and heads % groups == 0
    assert ring_x.shape[1] >= window + length - 1
    out = torch.empty(batch, length, 2 * heads * headdim, dtype=ring_x.dtype, device=C.device)
    config = launch_config(window, headdim) | (config or {})
    _window_gate_kernel[(batch * length, heads)](
        y, C, z, weight, sink, ring_x, ring_B, lengths, slots, out, offset, headdim**-0.5,
        *C.stride()[:3], *z.stride()[:2], *ring_x.stride()[:2], *ring_B.stride()[:2],
        T=length, H=heads, G=groups, P=headdim, L=ring_x.shape[1], W=window,
        BLOCK_W=triton.next_power_of_2(window), BLOCK_P=triton.next_power_of_2(headdim),
        **pdl.launch_options(config, C.device, batch * length * heads),
    )  # fmt: skip
    return out
