"""What updates the weights of a training stage: AdamW, and Muon for matrices where the configuration wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from steps.config import TrainConfig
from steps.distributed import full

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Newton and Schulz's iteration X ← aX + (bXXᵀ + c(XXᵀ)²)X as Jordan et al. (2024) tuned them: singular
values end within 0.7 … 1.2."""


class Muon(Optimizer):
    """The momentum of each matrix, with all its singular values about 1 (Jordan et al., 2024).

    Times 0.2 √max(rows, columns), so that an update's root mean square is AdamW's and one rate serves both (2502.16982
    §2.2). Matrices of one shape are orthogonalised together, in bfloat16 on a GPU. The momentum is kept as `exp_avg`,
    as AdamW's is. Of weights that are spread over processes, each process works out the whole update.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if bad := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon updates matrices, got parameters of shapes {bad}: give them to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure: make the gradients before the step")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for alike in shapes.values():
                self._step(alike, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, matrices: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        averages = [self.state[p]["exp_avg"] for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov's
        updates = orthogonal(torch.stack([full(update) for update in ahead])).to(matrices[0].dtype)
        if weight_decay:
            torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        scaled = -0.2 * lr * sqrt(max(matrices[0].shape))
        torch._foreach_add_(matrices, [_like(p, u) for p, u in zip(matrices, updates, strict=True)], alpha=scaled)


def orthogonal(matrices: Tensor) -> Tensor:
    """U·S·Vᵀ of each of matrices (n, rows, columns) = U·Σ·Vᵀ, where S is about 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.to(torch.bfloat16) if x.is_cuda else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which all processes have, spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)


def make_optimizers(groups: Sequence[tuple[float, dict[str, Tensor]]], config: TrainConfig) -> list[Optimizer]:
    """For [(peak rate, name → parameter)]. Each of their groups has its `peak_lr`.

    Matrices decay; norms, biases, A_log, dt_bias and D do not, as in mamba-ssm.
    """
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for rate, group in groups:
        parts: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, p in group.items():
            decays = p.ndim > 1 and not name.endswith("A_log")  # Mamba-1's is (D, N)
            by_muon = config.optimizer == "muon" and decays and p.ndim == 2 and ".layers." in name
            parts.setdefault((by_muon, decays), []).append(p)
        for (by_muon, decays), params in parts.items():
            decay = config.weight_decay if decays else 0.0
            (muon if by_muon else adamw).append({"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    optimizers: list[Optimizer] = []
    if adamw:
        optimizers.append(AdamW(adamw, betas=config.betas, fused=True))
    if muon:
        optimizers.append(Muon(muon))
    return optimizers
