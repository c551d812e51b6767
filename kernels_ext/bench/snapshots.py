"""A baseline, not used by the engine: verification that leaves one full state per token, as vLLM's Mamba cache does.

Every window token has a state slot of its own; the next round starts from the slot of the last accepted token. Rolling
back costs nothing, verification one state read and T states written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ({"BLOCK_P": 4, "num_warps": 4}, {"BLOCK_P": 16, "num_warps": 4})
"""vLLM's choice for 128 states, and a wider tile; the bench compares with the faster."""


@triton.jit
def _snapshot_kernel(
    states,
    slots,
    accepted,
    x,
    dt,
    A,
    B,
    C,
    D,
    y,
    heads,
    groups,
    headdim,
    TOKENS: tl.constexpr,
    D_STATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per (channels of a head, head, row)."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    g = h // (heads // groups)
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, D_STATE)
    m_p = o_p < headdim
    m_state = m_p[:, None] & (o_n[None, :] < D_STATE)
    o_state = (h * headdim + o_p[:, None]) * D_STATE + o_n[None, :]
    slot_stride = heads * headdim * D_STATE
    a = tl.load(A + h)
    d = tl.load(D + h)
    last = tl.load(accepted + b) - 1
    start = tl.load(slots + b * TOKENS + last).to(tl.int64)
    state = tl.load(states + start * slot_stride + o_state, mask=m_state, other=0.0).to(tl.float32)  # (BLOCK_P, N)
    for t in tl.static_range(TOKENS):
        token = b * TOKENS + t
        step = tl.load(dt + token * heads + h)
        x_t = tl.load(x + (token * groups + g) * headdim + o_p, mask=m_p, other=0.0).to(tl.float32)
        B_t = tl.load(B + (token * groups + g) * D_STATE + o_n).to(tl.float32)
        C_t = tl.load(C + (token * heads + h) * D_STATE + o_n).to(tl.float32)
        state = state * tl.exp(step * a) + (step * x_t)[:, None] * B_t[None, :]
        y_t = tl.sum(state * C_t[None, :], axis=1) + d * x_t
        tl.store(y + (token * heads + h) * headdim + o_p, y_t.to(y.dtype.element_ty), mask=m_p)
        slot = tl.load(slots + token).to(tl.int64)
        tl.store(states + slot * slot_stride + o_state, state.to(states.dtype.element_ty), mask=m_state)


def snapshot_verify(
    states: Tensor,
    slots: Tensor,
    accepted: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    config: dict | None = None,
) -> Tensor:
    """T tokens of the Mamba-2 recurrence, the state after each of them kept.

    states (S, H, P, N) float32 or bfloat16, written in place; slots (B, T) int32: where the state after token t of row
    b goes, and where that of the previous round lies; accepted (B,) int32: how many tokens of the previous round were
    accepted, 1 to T: the row starts from slots[b, accepted − 1]. x (B, T, G, P), B (B, T, G, N), C (B, T, H, N) in the
    activations' type, dt (B, T, H) float32 after softplus, A and D (H,) float32; all contiguous, N a power of two.
    Returns y (B, T, H, P) in C's type.
    """
    batch, tokens, heads, d_state = C.shape
    groups, headdim = x.shape[2:]
    y = torch.empty(batch, tokens, heads, headdim, dtype=C.dtype, device=C.device)
    chosen = config or CONFIGS[0]
    block = chosen["BLOCK_P"]
    _snapshot_kernel[(triton.cdiv(headdim, block), heads, batch)](
        states,
        slots,
        accepted,
        x,
        dt,
        A,
        B,
        C,
        D,
        y,
        heads,
        groups,
        headdim,
        TOKENS=tokens,
        D_STATE=d_state,
        BLOCK_P=block,
        num_warps=chosen["num_warps"],
    )
    return y
