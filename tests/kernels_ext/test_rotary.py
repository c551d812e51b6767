"""The rotation of a window's B and C against complex numbers in float64, row by row."""

from __future__ import annotations

import pytest
import torch

from kernels_ext.rotary import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.rotary.kernel")
training_kernel = interpreted("kernels_ext.rotary.training_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
BOTH = pytest.mark.parametrize("ops", [reference, kernel], ids=["reference", "kernel"])
NAN = float("nan")
POSITIONS = 40


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


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


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "groups", "ratio", "headdim", "offset", "has_ring"),
    [(1, 3, 3, 16, 0, False), (2, 4, 1, 8, 3, True), (5, 5, 4, 32, 0, True), (3, 1, 2, 12, 1, True)],
)
def test_turns_b_and_c_by_position(ops, tokens, groups, ratio, headdim, offset, has_ring, dtype, nan_filled):
    """Slots permuted, a padding row, rings that wrap; x, the padding row and the rest of the ring stay bit for bit."""
    slots, lengths, ring_length = [4, 0, -1, 2, 5], [1, 3, 9, 7, 0, 30], 11
    width = (2 + ratio) * groups * headdim
    convolved = draw(len(slots), tokens, width, seed=0, dtype=dtype)
    before = convolved.clone()
    ring_B = torch.full((6, ring_length + 2, groups, headdim), NAN, device=DEVICE, dtype=dtype)[:, 1:-1]
    theta, cos, sin = tables(headdim)
    ops.rotate_window_(convolved, cos, sin, ints(lengths), ints(slots), groups, ring_B if has_ring else None, offset)
    untouched = torch.ones(6, ring_length, dtype=torch.bool)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(convolved[row], before[row])
            continue
        for i in range(tokens):
            position = lengths[slot] + offset + i
            ours, given = convolved[row, i].view(-1, headdim), before[row, i].view(-1, headdim)
            assert torch.equal(ours[:groups], given[:groups])
            assert distance(ours[groups:], turned(given[groups:], position, theta)) < TOLERANCE[dtype]
            if has_ring:
                assert torch.equal(ring_B[slot, position % ring_length], ours[groups : 2 * groups])
                untouched[slot, position % ring_length] = False
    assert ring_B[untouched].isnan().all()


@BOTH
def test_only_padding(ops):
    convolved, ring_B = draw(3, 2, 4 * 16, seed=0), draw(2, 5, 1, 16, seed=1)
    before = convolved.clone(), ring_B.clone()
    _, cos, sin = tables(16)
    ops.rotate_window_(convolved, cos, sin, ints([9, 4]), ints([-1, -1, -1]), 1, ring_B)
    assert torch.equal(convolved, before[0]) and torch.equal(ring_B, before[1])


@BOTH
def test_token_by_token_equals_one_window(ops):
    """A draft reads a round's tokens one by one at growing offsets; the verifier reads them at once."""
    _, cos, sin = tables(16)
    given, lengths, slots = draw(2, 4, 5 * 16, seed=0), ints([6, 3]), ints([1, 0])
    made = []
    for length in (4, 1):
        ring_B = torch.zeros(2, 8, 1, 16, device=DEVICE)
        parts = [part.contiguous() for part in given.clone().split(length, dim=1)]
        for number, part in enumerate(parts):
            ops.rotate_window_(part, cos, sin, lengths, slots, 1, ring_B, number * length)
        made.append((torch.cat(parts, dim=1), ring_B))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


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
