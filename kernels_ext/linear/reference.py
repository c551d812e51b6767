"""Linear layers of a decoding step with what stands around them in a Llama block: the norm, the gate, the residual.

Shapes: M rows (tokens of all sequences together), K inputs, weights (outputs, K) as `nn.Linear` keeps them. Products
run in the weight's type and are summed in float32; results have the weight's type unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_ext.rms_norm.reference import rms_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x·weightᵀ + bias: x (M, K), weight (Nout, K), bias (Nout,) or None. Returns (M, Nout) in out_dtype, the weight's
    type if None: float32 keeps the sums of logits as they are."""
    x = x.to(weight.dtype)
    if out_dtype == torch.float32 and x.is_cuda and bias is None and weight.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=out_dtype)
    return F.linear(x, weight, bias).to(out_dtype or weight.dtype)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm(x)·weightᵀ + bias, RMSNorm(x) = norm_weight · x / sqrt(mean(x²) + eps) (1910.07467 §3).

    x (M, K), norm_weight (K,), weight (Nout, K), bias (Nout,) or None. Returns (M, Nout); out_dtype
    as in `linear`.
    """
    return linear(rms_norm(x, norm_weight, eps), weight, bias, out_dtype)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias + residual: x (M, K), weight (Nout, K), residual (M, Nout), bias (Nout,) or None.

    Returns a new (M, Nout) in the residual's type.
    """
    x = x.to(weight.dtype)
    if bias is not None or residual.dtype != weight.dtype:
        return residual + F.linear(x, weight, bias).to(residual.dtype)
    return torch.addmm(residual, x, weight.t())


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """silu(n·gateᵀ) · (n·upᵀ) with n = RMSNorm(x) (SwiGLU, 2002.05202 §2).

    x (M, K), norm_weight (K,), gate_up (2F, K): first the F rows of gate, then those of up. Returns (M, F).
    """
    gate, up = norm_linear(x, norm_weight, eps, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up
