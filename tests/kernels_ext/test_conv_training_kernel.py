"""The Triton convolution of training and its gradients against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels_ext.causal_conv import reference
from tests.kernels_ext.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = interpreted("kernels_ext.causal_conv.training_kernel")
ROUNDING = 2**-8 if DEVICE == "cuda" else 2**-7  # to bfloat16, relative; the interpreter cuts off


@pytest.fixture(autouse=True)
def poisoned(nan_filled):
    """What a kernel forgets to write is NaN."""


def problem(
    length: int,
    channels: int,
    width: int = 4,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    before: int = 3,
) -> dict[str, Tensor | None]:
    """x is a slice of wider rows, as a projection of several sections gives it; weight and bias are float32."""
    random = torch.Generator().manual_seed(length + channels + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE)

    rows = normal(batch, length, before + channels + 2).to(dtype)
    return {
        "x": rows[..., before : before + channels],
        "weight": normal(channels, width),
        "bias": normal(channels) if bias else None,
    }


def documents(length: int, *boundaries: tuple[int, ...]) -> Tensor:
    """(B, L) document numbers from 3 on; row b changes document at each of boundaries[b]."""
    seq_idx = torch.full((len(boundaries), length), 3, dtype=torch.int32)
    for row, changes in enumerate(boundaries):
        for change in changes:
            seq_idx[row, change:] += 1
    return seq_idx.to(DEVICE)


def outputs_and_gradients(conv, arguments: dict, dtype: torch.dtype | None = None, **rest) -> dict[str, Tensor]:
    """y and the gradients of a fixed random functional of it, in float64; `dtype` is that of the computation."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in arguments.items() if t is not None}
    y = conv(**{**dict.fromkeys(arguments), **leaves}, **rest)
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=random).to(y.device, arguments["x"].dtype)
    gradients = torch.autograd.grad((y * weights.to(y.dtype)).sum(), list(leaves.values()))
    return {n: t.detach().double() for n, t in zip(("y", *leaves), (y, *gradients), strict=True)}


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == exact.keys()
    errors = {n: ((ours[n] - t).norm() / t.norm().clamp(min=1e-3)).item() for n, t in exact.items()}
    assert all(error < tolerance for error in errors.values()), errors


def assert_exact(arguments: dict, tolerance: float = 1e-5, **rest) -> None:
    exact = outputs_and_gradients(reference.causal_conv, arguments, torch.float64, **rest)
    assert_close(outputs_and_gradients(kernel.causal_conv, arguments, **rest), exact, tolerance)


@pytest.mark.parametrize(
    "length, channels, width, bias, silu",
    [
        (37, 70, 4, True, True),
        (70, 5, 3, False, True),  # more than one program in time
        (20, 300, 2, True, False),  # and in channels
        (3, 17, 8, False, False),  # taps reach further than the row is long
        (5, 16, 1, True, True),
        (1, 1, 4, True, True),
    ],
)
def test_the_definition(length, channels, width, bias, silu):
    assert_exact(problem(length, channels, width, bias=bias), silu=silu)


MANY = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 34, 36)


@pytest.mark.parametrize("width, silu", [(2, True), (3, False), (4, True)])
def test_documents_do_not_leak(width, silu):
    assert_exact(problem(37, 70, width), silu=silu, seq_idx=documents(37, MANY, (35,)))


def test_a_document_that_comes_again_is_the_same():
    seq_idx = torch.tensor([[0, 1, 0, 0, 1, 1, 0, -1, 0, -1]] * 2, dtype=torch.int32, device=DEVICE)
    assert_exact(problem(10, 6), silu=True, seq_idx=seq_idx)


def test_another_past_gives_the_same_bits():
    arguments, seq_idx = problem(37, 6), documents(37, (20,), (33,))
    others = {**arguments, "x": arguments["x"].clone()}
    others["x"][0, :20] += 0.5
    others["x"][1, :33] += 0.5
    y, other = (kernel.causal_conv(**given, seq_idx=seq_idx, silu=True) for given in (arguments, others))
    assert torch.equal(y[0, 20:], other[0, 20:])
    assert torch.equal(y[1, 33:], other[1, 33:])


def test_any_strides():
    """Last dimensions that are not contiguous, a broadcast ∂y, bias and seq_idx, which is int64."""
    arguments = problem(20, 6)
    for name in ("x", "weight"):
        arguments[name] = arguments[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    arguments["bias"] = torch.full((1,), 0.3, device=DEVICE).expand(6)
    seq_idx = documents(20, (7, 9)).long().expand(2, -1)
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in arguments.items()}
    kernel.causal_conv(**leaves, seq_idx=seq_idx, silu=True).sum().backward()
    reference.causal_conv(**exact, seq_idx=seq_idx, silu=True).sum().backward()
    assert_close({n: t.grad.double() for n, t in leaves.items()}, {n: t.grad for n, t in exact.items()})


def test_half_precision_is_rounded_once():
    """Sums run in float32 with float32 weights: only y and ∂x are rounded, ∂weight and ∂bias are not."""
    arguments, seq_idx = problem(37, 70, dtype=torch.bfloat16), documents(37, (5,), (20, 21))
    ours = outputs_and_gradients(kernel.causal_conv, arguments, silu=True, seq_idx=seq_idx)
    exact = outputs_and_gradients(reference.causal_conv, arguments, torch.float64, silu=True, seq_idx=seq_idx)
    for name in ("y", "x"):
        torch.testing.assert_close(ours.pop(name), exact.pop(name), rtol=ROUNDING, atol=1e-5)
    assert_close(ours, exact)
    assert kernel.causal_conv(**arguments).dtype == torch.bfloat16


def test_gradients_have_the_types_of_their_inputs():
    arguments = {n: t.bfloat16().requires_grad_() for n, t in problem(5, 6).items()}
    kernel.causal_conv(**arguments).sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in arguments.values())


@pytest.mark.parametrize("optional", [True, False])
def test_the_operator_is_registered_rightly(optional):
    """Shapes, strides and types without data, no hidden mutation or aliasing, gradients under torch.compile."""
    arguments = {n: t.requires_grad_() for n, t in problem(9, 6).items()}
    rest = (arguments["bias"], documents(9, (5,), (8,))) if optional else (None, None)
    torch.library.opcheck(
        torch.ops.mamballama.causal_conv_train, (arguments["x"], arguments["weight"], *rest, optional)
    )


def test_what_fits():
    x, weight = torch.zeros(1, 5, 6), torch.zeros(6, 4)
    assert kernel.fits(x, weight) and kernel.fits(x.bfloat16(), weight) and kernel.fits(x, torch.zeros(6, 8))
    assert not kernel.fits(x.double(), weight)
    with pytest.raises(ValueError, match=r"torch.float32 and a convolution over 9 tokens.*reference.causal_conv"):
        kernel.causal_conv(x, torch.zeros(6, 9))


def test_small_batches_have_shorter_programs():
    tokens = [kernel.launch_config("backward", batch, 512, 960)["BLOCK_T"] for batch in (1, 32, 256)]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
    for config in (kernel.launch_config("backward", 1, 1, 1), kernel.launch_config("backward", 64, 4096, 4096)):
        assert config["BLOCK_T"] % config["STEPS"] == 0, "a program's last step must end where its block does"


class Convolving(nn.Module):
    """What is around the convolution in a mixer: it is given a slice of one tensor, and slices of it are used."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels)

    def forward(self, projected: Tensor, seq_idx: Tensor) -> Tensor:
        x = torch.sin(projected)[..., 3 : 3 + len(self.conv1d.weight)]
        y = kernel.causal_conv(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, True)
        left, right = y.chunk(2, dim=-1)
        return left * torch.cos(right)


def compiled_like_eager(channels: int, projected: Tensor, seq_idx: Tensor, backend: str) -> list[float]:
    """Relative differences of the outputs and gradients of a module and of its compiled form."""
    torch.manual_seed(0)
    convolving = Convolving(channels).to(DEVICE)
    results = []
    for module in (torch.compile(convolving, fullgraph=True, dynamic=False, backend=backend), convolving):
        leaf = projected.detach().requires_grad_()
        y = module(leaf, seq_idx)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [leaf, *convolving.parameters()])])
    return [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results, strict=True)]


def test_compiles_as_one_graph():
    found = compiled_like_eager(6, torch.randn(2, 9, 12, device=DEVICE), documents(9, (5,), (8,)), "aot_eager")
    assert all(difference < 1e-6 for difference in found), found


REAL = [(32, 512, 960, 576), (32, 512, 960, 585), (2, 2048, 6144, 4096)]  # B, L, C, channels before x


def real_problem(batch: int, length: int, channels: int, before: int) -> tuple[dict, Tensor]:
    edges = [tuple(range(97 + row, length, 301)) for row in range(batch)]
    arguments = problem(length, channels, batch=batch, dtype=torch.bfloat16, before=before)
    return arguments, documents(length, *edges)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_in_half_precision(shape):
    arguments, seq_idx = real_problem(*shape)
    assert_exact(arguments, tolerance=4e-3, silu=True, seq_idx=seq_idx)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    arguments, seq_idx = real_problem(*REAL[0])
    first, second = (outputs_and_gradients(kernel.causal_conv, arguments, silu=True, seq_idx=seq_idx) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    projected = torch.randn(32, 512, 1545, device="cuda", dtype=torch.bfloat16)
    _, seq_idx = real_problem(*REAL[0])
    found = compiled_like_eager(960, projected, seq_idx, "inductor")
    assert all(difference < 1e-2 for difference in found), found


@pytest.mark.gpu
def test_memory_of_training_is_what_goes_in_and_out():
    """No copy of x and no pre-activation outlives the forward pass."""
    arguments, seq_idx = real_problem(*REAL[0])
    leaves = {n: t.requires_grad_() for n, t in arguments.items()}
    before = torch.cuda.memory_allocated()
    y = kernel.causal_conv(**leaves, seq_idx=seq_idx, silu=True)
    assert torch.cuda.memory_allocated() - before <= 1.05 * y.nbytes
