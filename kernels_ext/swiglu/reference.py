"""The gate of a SwiGLU feed-forward block."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (2002.05202 eq. 6), gate_up (…, 2F) being gate | up.

    Computed in float32 and rounded once; returns (…, F) in gate_up's type.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)
