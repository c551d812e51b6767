"""How much of a GPU's peak a training stage uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hybrid import HybridForCausalLM

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 FLOP/s by what torch.cuda.get_device_name() contains, the longer name first; NVIDIA's data sheets."""

TRAINED = 6
"""FLOPs per token and weight of a matrix that trains: one pass forward and two backward."""
FORWARD = 2
"""FLOPs per token and weight of a matrix that only runs forward: one multiplication and one addition."""


def matrix_weights(module: nn.Module, trained: bool = False) -> int:
    """N: weights of the linear maps that a token passes in `module`, or of the trained ones among them. The output head
    of a model is one of them, the look-up of embeddings is none."""
    if isinstance(module, HybridForCausalLM):
        head = module.lm_head_weight
        return matrix_weights(module.model.layers, trained) + head.numel() * (head.requires_grad or not trained)
    maps = (part.weight for part in module.modules() if isinstance(part, nn.Linear))
    return sum(weight.numel() for weight in maps if weight.requires_grad or not trained)


def training_flops(model: HybridForCausalLM, called: Sequence[Any] = ()) -> int:
    """FLOPs per token of forward and backward through `model`, or through the mixers `called` on inputs that have no
    gradient: 6 N for weights that train, 4 N for frozen ones, of which no gradient is taken."""
    if called:
        return sum(TRAINED * matrix_weights(mixer) - 2 * matrix_weights(mixer.in_proj) for mixer in called)
    return 4 * matrix_weights(model) + 2 * matrix_weights(model, trained=True)


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU; None for a CPU and for a GPU that is not in the table."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def utilisation(
    flops_per_token: float | None, tokens_per_second: float, peak: float | None, processes: int
) -> float | None:
    """Model-FLOP utilisation (2204.02311 appendix B): FLOPs per token · tokens per second / (peak · processes), the
    tokens being all positions that pass through the model; None where one of them is not known.

    FLOPs per token are 6 N for weights that train, 4 N for frozen ones that gradients pass, 2 N for those that only run
    forward (N: `matrix_weights`). Attention scores, scans, convolutions and norms are left out, and nothing that is
    computed anew in the backward pass counts twice: the figure is a lower bound of what the GPU did.
    """
    if flops_per_token is None or peak is None:
        return None
    return flops_per_token * tokens_per_second / (peak * processes)
