"""Closed-form start: every mixer's out_proj by ridge regression onto the attention that it replaces.

With F (T, d_features) what enters out_proj and O (T, d_model) the attention's output over T tokens of the teacher's own
pass,
W = argmin ‖F Wᵀ − O‖² + λ‖W‖², from the normal equations. No gradient, one pass, all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from hybrid.attention import document_positions
from hybrid.init_map import new_mixers
from hybrid.mamba2 import Mamba2Mixer
from hybrid.model import HybridForCausalLM


@torch.no_grad()
def calibrate_out_proj(
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    batches: Iterable[tuple[Tensor, Tensor]],
    ridge: float,
    autocast: torch.dtype | None = None,
) -> dict[int, float]:
    """Replace out_proj of every mixer that stands where `teacher` has attention; returns layer → ‖F Wᵀ − O‖² / ‖O‖² on
    the same tokens.

    teacher: the model whose attention was replaced, an earlier student too. batches: (tokens, seq_idx), both (B, L).
    ridge: λ as a fraction of the mean diagonal of FᵀF. Where mixers have windows their sinks are measured before, on
    the first batch, and their features scaled to RMS 1, head by head.
    """
    layers = new_mixers(teacher, student)
    width, d_model = student.config.d_features, student.config.d_model
    device = student.device
    gram = {i: torch.zeros(width, width, device=device) for i in layers}
    cross = {i: torch.zeros(width, d_model, device=device) for i in layers}
    energy = dict.fromkeys(layers, 0.0)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for number, (tokens, seq_idx) in enumerate(batches):
            for i, (given, wanted) in teacher.mixing(tokens, seq_idx, layers).items():
                if student.config.mixer_window and not number:
                    measure_window(cast(Mamba2Mixer, student.blocks[i].mamba), given, seq_idx)
                features = student.blocks[i].mamba.features(given, seq_idx).float().flatten(0, 1)  # (T, width)
                target = wanted.float().flatten(0, 1)
                with torch.autocast(device.type, enabled=False):
                    gram[i] += features.T @ features
                    cross[i] += features.T @ target
                energy[i] += target.pow(2).sum().item()
    errors = {}
    for i in layers:
        weight = solve_ridge(gram[i], cross[i], ridge)
        residual = energy[i] - 2 * (weight * cross[i]).sum() + (weight * (gram[i] @ weight)).sum()
        errors[i] = float(residual / energy[i])
        out_proj = student.blocks[i].mamba.out_proj
        out_proj.weight.copy_(weight.T)
    return errors


def measure_window(mixer: Mamba2Mixer, hidden: Tensor, seq_idx: Tensor) -> None:
    """Set the sink to the mean key and value of documents' first tokens, and the gates' weights so that every head's
    features have mean square 1; hidden (B, L, d_model)."""
    _, _, x, B, _ = mixer.inputs(hidden, seq_idx)
    first = document_positions(seq_idx, hidden.shape[0], hidden.shape[1], hidden.device) == 0
    mixer.sink.copy_(torch.stack([B[first].float().mean(0), x[first].float().mean(0)]))
    weight = mixer.norm.weight
    weight.fill_(1.0)
    power = mixer.features(hidden, seq_idx).float().pow(2).mean((0, 1)).unflatten(0, (-1, mixer.config.head_dim))
    weight.copy_(torch.rsqrt(power.mean(1, keepdim=True).clamp(min=1e-12)).expand_as(power).flatten())


def solve_ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(FᵀF + λI)⁻¹ FᵀO in float64, λ = ridge · mean diagonal; (d_inner, d_model)."""
    gram, cross = gram.double(), cross.double()
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).float()
