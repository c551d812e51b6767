from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels_ext.gated_norm.reference import gated_rms_norm

EPS = 1e-3


def formula(y: np.ndarray, z: np.ndarray, weight: np.ndarray, group: int) -> np.ndarray:
    gated = y * z / (1 + np.exp(-z))
    out = np.empty_like(gated)
    for start in range(0, y.shape[-1], group):
        part = gated[..., start : start + group]
        out[..., start : start + group] = part / np.sqrt((part**2).mean(-1, keepdims=True) + EPS)
    return out * weight


@pytest.mark.parametrize("group", [1, 5, 15])
def test_is_the_formula(group):
    rng = np.random.default_rng(0)
    y, z, weight = rng.normal(size=(2, 7, 15)), rng.normal(size=(2, 7, 15)), rng.normal(size=15)
    ours = gated_rms_norm(*(torch.tensor(t, dtype=torch.float32) for t in (y, z, weight)), group, EPS)
    np.testing.assert_allclose(ours.numpy(), formula(y, z, weight, group), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_formula():
    """Central differences of the float64 formula along random directions."""
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(3, 10)), rng.normal(size=(3, 10)), rng.normal(size=10)]
    weights = rng.normal(size=(3, 10))
    leaves = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in arrays]
    (gated_rms_norm(*leaves, 5, EPS) * torch.tensor(weights)).sum().backward()
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=arrays[i].shape)
        values = []
        for sign in (1, -1):
            moved = [a + sign * 1e-6 * direction if j == i else a for j, a in enumerate(arrays)]
            values.append((formula(*moved, 5) * weights).sum())
        assert (leaf.grad.double().numpy() * direction).sum() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_half_precision_is_normed_in_float32():
    y = torch.full((1, 8), 3e-3, dtype=torch.bfloat16)
    z = torch.full((1, 8), 2.0, dtype=torch.bfloat16)
    out = gated_rms_norm(y, z, torch.ones(8), 8, 1e-5)
    assert out.dtype == torch.bfloat16
    wanted = gated_rms_norm(y.float(), z.float(), torch.ones(8), 8, 1e-5)
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=0)
