"""The rotation of heads against complex numbers in float64, token by token."""

from __future__ import annotations

import pytest
import torch

from kernels_ext.rotary import reference
from tests.kernels_ext.interpreted import interpreted

training_kernel = interpreted("kernels_ext.rotary.training_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
POSITIONS = 40


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius; NaN anywhere fails every comparison."""
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def tables(headdim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """θ (P / 2,), and cos and sin by position."""
    theta = 100.0 ** -torch.linspace(0, 1, headdim // 2, device=DEVICE, dtype=torch.float64)
    angles = torch.arange(POSITIONS, device=DEVICE)[:, None] * theta
    return theta, angles.cos().float(), angles.sin().float()


def turned(x: torch.Tensor, position: int, theta: torch.Tensor) -> torch.Tensor:
    """x (heads, P): pairs (x_j, x_{j + P/2}) turned by position · θ_j, in float64."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * position * theta)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("ops", [reference, training_kernel], ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "length", "heads", "headdim"), [(2, 9, 3, 16), (1, 70, 1, 12), (3, 5, 4, 64)])
def test_turns_heads_of_packed_rows(ops, batch, length, heads, headdim, dtype, nan_filled):
    """A strided view of wider rows; positions that start anew; the gradient is turned back by the same angles."""
    wide = draw(batch, length, (heads + 2) * headdim, seed=0, dtype=dtype)
    x = wide.unflatten(-1, (-1, headdim))[:, :, 1:-1].detach().requires_grad_()
    positions = torch.arange(batch * length, device=DEVICE).view(batch, length) % 7
    theta, cos, sin = tables(headdim)
    y = ops.rotate_heads(x, cos[positions], sin[positions])
    dy = draw(batch, length, heads, headdim, seed=1, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.is_contiguous() and y.dtype == dx.dtype == dtype
    for row in range(batch):
        for token in range(length):
            position = int(positions[row, token])
            assert distance(y[row, token].detach(), turned(x[row, token].detach(), position, theta)) < TOLERANCE[dtype]
            assert distance(dx[row, token], turned(dy[row, token], -position, theta)) < TOLERANCE[dtype]
