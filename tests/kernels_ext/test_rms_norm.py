from __future__ import annotations

import pytest
import torch

from kernels_ext.rms_norm.reference import rms_norm as reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.rms_norm.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
BOTH = pytest.mark.parametrize("norm", [reference, kernel.rms_norm], ids=["reference", "kernel"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d", [1, 33, 128])
def test_is_the_formula(norm, d, dtype, nan_filled):
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((5, 2, d + 7), float("nan"), device=DEVICE, dtype=dtype)
    x = wide[..., 2 : 2 + d]
    x.copy_(torch.randn(5, 2, d, generator=generator))
    weight = torch.randn(d, generator=generator).to(DEVICE, dtype)
    ours = norm(x, weight, 1e-3)
    exact = x.double()
    exact = exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + 1e-3) * weight.double()
    assert ours.dtype == dtype and ours.shape == x.shape
    assert (ours.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]


@BOTH
def test_a_wider_weight_widens_the_result(norm):
    x, weight = torch.ones(2, 8, device=DEVICE, dtype=torch.bfloat16), torch.full((8,), 1.001, device=DEVICE)
    ours = norm(x, weight, 0.0)
    assert ours.dtype == torch.float32 and torch.equal(ours, weight.expand(2, 8))


@pytest.mark.gpu
def test_kernel_rounds_where_the_reference_does():
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    weight = torch.linspace(0.3, 3, 96, device=DEVICE).bfloat16()
    ours, wanted = kernel.rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5)
    assert (ours != wanted).float().mean() < 0.01  # a sum in another order may tip a rounding now and then
