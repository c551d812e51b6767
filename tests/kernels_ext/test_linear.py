from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_ext.linear import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.linear.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
REGISTERS = {"DOT": False, "SPLIT": 0, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 1, "num_stages": 1}
TENSOR_CORES = {"DOT": True, "SPLIT": 0, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 1, "num_stages": 3}
WHOLE = {"SPLIT": 2, "WEIGHT_FIRST": False, "BLOCK_N": 16, "num_warps": 2}
WHOLE_WEIGHT_FIRST = WHOLE | {"WEIGHT_FIRST": True}
PATHS = {
    "registers": REGISTERS,
    "tensor_cores": TENSOR_CORES,
    "whole": WHOLE,
    "whole_weight_first": WHOLE_WEIGHT_FIRST,
}

# M, Nout, K: five programs, sizes that no block divides and sizes that all do.
SHAPES = [(1, 77, 45), (2, 80, 64), (3, 77, 101), (5, 65, 96), (16, 77, 45)]


class Inputs:
    def __init__(self, M: int, Nout: int, K: int, dtype: torch.dtype, gated: bool = False) -> None:
        generator = torch.Generator().manual_seed(M * Nout * K)
        self.M, self.Nout, self.dtype = M, Nout, dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        self.wide = draw(M, K + 3)  # x is a view of it, as of a fused projection
        self.x = self.wide[:, :K]
        self.norm_weight = draw(K)
        self.weight = draw(2 * Nout if gated else Nout, K)
        self.bias, self.residual = draw(Nout), draw(M, Nout)

    def normed(self) -> Tensor:
        """RMSNorm(x) in float64."""
        x = self.x.double()
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm_weight.double()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""

    def empty(*shape: int, **kwargs) -> Tensor:
        return torch.full(shape, float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


def check(out: Tensor, wanted: Tensor, inputs: Inputs, tolerance: float | None = None) -> None:
    assert out.shape == (inputs.M, inputs.Nout) and out.dtype == inputs.dtype
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < (tolerance or TOLERANCE[inputs.dtype]), f"relative error {error:.1e}"


def implementations(path: str):
    if path == "reference":
        return reference, {}
    return kernel, {"config": PATHS[path]}


everywhere = pytest.mark.parametrize("path", ["reference", *PATHS])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@everywhere
@dtypes
@shapes
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_linear_and_residual(path, shape, dtype, with_bias):
    module, options = implementations(path)
    inputs = Inputs(*shape, dtype)
    bias = inputs.bias if with_bias else None
    product = inputs.x.double() @ inputs.weight.double().T + (inputs.bias.double() if with_bias else 0)
    check(module.linear(inputs.x, inputs.weight, bias, **options), product, inputs)
    before = inputs.residual.clone()
    out = module.linear_add(inputs.x, inputs.weight, inputs.residual, bias, **options)
    check(out, product + inputs.residual.double(), inputs)
    assert torch.equal(inputs.residual, before)


@everywhere
@dtypes
@shapes
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_norm_linear(path, shape, dtype, with_bias):
    module, options = implementations(path)
    inputs = Inputs(*shape, dtype)
    wanted = inputs.normed() @ inputs.weight.double().T + (inputs.bias.double() if with_bias else 0)
    bias = inputs.bias if with_bias else None
    out = module.norm_linear(inputs.x, inputs.norm_weight, EPS, inputs.weight, bias, **options)
    check(out, wanted, inputs)


@everywhere
@dtypes
@shapes
def test_norm_swiglu(path, shape, dtype):
    module, options = implementations(path)
    inputs = Inputs(*shape, dtype, gated=True)
    gate, up = (inputs.normed() @ inputs.weight.double().T).chunk(2, dim=-1)
    out = module.norm_swiglu(inputs.x, inputs.norm_weight, EPS, inputs.weight, **options)
    # The reference rounds the norm, gate, silu and up before the product, as the layers it stands for do.
    tolerance = 1e-2 if path == "reference" and dtype == torch.bfloat16 else None
    check(out, gate / (1 + torch.exp(-gate)) * up, inputs, tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_eps_counts_where_x_is_small_and_not_where_it_is_large(path, scale):
    inputs = Inputs(3, 20, 45, torch.float32)
    x = inputs.x * scale
    ours = kernel.norm_linear(x, inputs.norm_weight, 1e-3, inputs.weight, config=PATHS[path])
    wanted = reference.norm_linear(x.double(), inputs.norm_weight.double(), 1e-3, inputs.weight.double())
    check(ours, wanted, inputs)


def test_half_precision_norm_does_not_overflow():
    inputs = Inputs(3, 20, 45, torch.float16)
    x = inputs.x * 1e4
    out = kernel.norm_linear(x, inputs.norm_weight * 100, EPS, inputs.weight / 100, config=TENSOR_CORES)
    normed = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    wanted = normed * (inputs.norm_weight * 100).double() @ (inputs.weight / 100).double().T
    check(out, wanted, inputs)


def test_a_residual_keeps_its_type():
    """A float32 mixer in a bfloat16 body."""
    inputs = Inputs(2, 20, 45, torch.float32)
    residual = inputs.residual.bfloat16()
    wanted = (inputs.x.double() @ inputs.weight.double().T + residual.double()).bfloat16()
    for module in (reference, kernel):
        out = module.linear_add(inputs.x, inputs.weight, residual)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("M", [1, 3, 8, 16])
@pytest.mark.parametrize(("Nout", "K"), [(10272, 4096), (4096, 14336), (1545, 576), (7, 3)])
def test_configurations_are_legal(M, Nout, K, gated):
    found = kernel.candidates(M, Nout, K, gated)
    assert 1 <= len(found) <= 24
    assert found[0] == kernel.launch_config(M, Nout, K, torch.bfloat16, gated)
    for config in found:
        assert config["BLOCK_N"] & (config["BLOCK_N"] - 1) == 0 and config["SPLIT"] & (config["SPLIT"] - 1) == 0
        if config["SPLIT"]:
            assert config["BLOCK_N"] >= (16 if config["WEIGHT_FIRST"] else 8) and 16 * config["SPLIT"] < K <= 2048
            continue
        assert config["BLOCK_K"] & (config["BLOCK_K"] - 1) == 0
        assert config["BLOCK_K"] >= 16 and (config["BLOCK_N"] >= 16 or not config["DOT"])
        shared = (config["num_stages"] - 1) * 2 * config["BLOCK_K"] * ((1 + gated) * config["BLOCK_N"] + 16)
        assert not config["DOT"] or shared <= 227 * 1024


@pytest.mark.parametrize("M", [1, 2, 3, 5, 16])
@dtypes
def test_without_a_configuration(M, dtype):
    inputs = Inputs(M, 11, 600, dtype)
    out = kernel.norm_linear(inputs.x, inputs.norm_weight, EPS, inputs.weight, inputs.bias)
    check(out, inputs.normed() @ inputs.weight.double().T + inputs.bias.double(), inputs)
    out = kernel.linear_add(inputs.x, inputs.weight, inputs.residual)
    check(out, inputs.x.double() @ inputs.weight.double().T + inputs.residual.double(), inputs)


def test_candidates_give_the_same_result():
    inputs = Inputs(4, 5, 600, torch.float32)
    found = kernel.candidates(4, 5, 600)
    assert {config["DOT"] for config in found} == {True, False}
    for config in found:
        out = kernel.norm_linear(inputs.x, inputs.norm_weight, EPS, inputs.weight, config=config)
        check(out, inputs.normed() @ inputs.weight.double().T, inputs)


def test_fits_few_rows_of_one_type_without_gradient():
    inputs = Inputs(2, 8, 16, torch.bfloat16)
    x, weight = inputs.x, inputs.weight
    assert kernel.fits(x, weight)
    assert not kernel.fits(x.repeat(9, 1), weight)
    assert not kernel.fits(x[:0], weight)
    assert not kernel.fits(x.float(), weight)
    assert not kernel.fits(x.double(), weight.double())
    assert not kernel.fits(x, weight.T.contiguous().T)
    assert not kernel.fits(x[None], weight)
    trained = weight.clone().requires_grad_()
    assert not kernel.fits(x, trained)
    with torch.no_grad():
        assert kernel.fits(x, trained)


def test_a_large_weight_for_several_rows_is_left_to_the_library():
    assert kernel.pays(2, 128256, 4096) and kernel.pays(16, 1536, 576)
    assert not kernel.pays(3, 49152, 576) and not kernel.pays(3, 4096, 14336)
