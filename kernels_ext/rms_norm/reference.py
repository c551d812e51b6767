"""RMSNorm over the last dimension, as Llama computes it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) (1910.07467 eq. 4), normalised in float32 and rounded to x's type before the
    weight.

    x (…, d); weight (d,). Returns x's shape in the type that weight · x has.
    """
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
