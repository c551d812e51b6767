from __future__ import annotations

import pytest
import torch

from kernels_ext.swiglu.reference import silu_mul as reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.swiglu.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}


@pytest.mark.parametrize("product", [reference, kernel.silu_mul], ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 37, 600])
def test_is_the_formula(product, width, dtype, nan_filled):
    """600 outputs take more than one program; rows are slices of wider ones."""
    wide = torch.full((3, 2, 2 * width + 3), float("nan"), device=DEVICE, dtype=dtype)
    gate_up = wide[..., 1 : 1 + 2 * width]
    gate_up.copy_(4 * torch.randn(3, 2, 2 * width, generator=torch.Generator().manual_seed(0)))
    gate_up[0, 0, 0] = -80.0
    ours = product(gate_up)
    gate, up = gate_up[..., :width].double(), gate_up[..., width:].double()
    exact = gate * torch.sigmoid(gate) * up
    assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
    assert (ours.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]
