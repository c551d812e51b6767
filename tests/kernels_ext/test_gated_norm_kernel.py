from __future__ import annotations

import pytest
import torch

from kernels_ext.gated_norm.reference import gated_rms_norm as reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.gated_norm.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("channels", "group_size"), [(60, 20), (64, 16), (35, 35), (12, 1)])
def test_equals_the_reference(channels, group_size, dtype, nan_filled):
    """z a slice of wider rows; groups that do not fill their block, more groups than one program takes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(7, 3, channels, generator=generator).to(DEVICE, dtype)
    wide = torch.full((7, 3, channels + 9), float("nan"), device=DEVICE, dtype=dtype)
    z = wide[..., 4 : 4 + channels]
    z.copy_(3 * torch.randn(7, 3, channels, generator=generator))
    weight = torch.randn(channels, generator=generator).to(DEVICE, dtype)
    ours = kernel.gated_rms_norm(y, z, weight, group_size, 1e-3, config={"BLOCK_M": 4})
    wanted = reference(y.float(), z.float(), weight.float(), group_size, 1e-3)
    assert ours.dtype == dtype and ours.shape == y.shape
    assert (ours.float() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


def test_default_launch_and_zero_rows():
    y, z = torch.ones(2, 1, 64, device=DEVICE), torch.ones(2, 1, 64, device=DEVICE)
    y[1], z[1] = 0, 0
    ours = kernel.gated_rms_norm(y, z, torch.ones(64, device=DEVICE), 32, 1e-5)
    torch.testing.assert_close(ours, reference(y, z, torch.ones(64, device=DEVICE), 32, 1e-5))
    assert (ours[1] == 0).all()
