"""The chunked scan and the single step against the recurrence written token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_ext.ssd.reference import ssd_chunked, ssd_sequential

BATCH, RATIO, HEADDIM, STATE = 2, 3, 5, 7
LENGTHS = (1, 63, 65, 130)


def problem(
    length: int, groups: int = 2, device: str = "cpu", headdim: int = HEADDIM, state: int = STATE
) -> dict[str, Tensor]:
    """Arguments of the scan in float32; decays between almost none and strong."""
    random = torch.Generator().manual_seed(length * 10 + groups)
    heads = groups * RATIO

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    arguments = {
        "x": normal(BATCH, length, groups, headdim),
        "dt": torch.nn.functional.softplus(normal(BATCH, length, heads) - 1),
        "A": -torch.exp(normal(heads)),
        "B": normal(BATCH, length, groups, state),
        "C": normal(BATCH, length, heads, state),
        "D": normal(heads),
        "initial_state": normal(BATCH, heads, headdim, state),
    }
    return {name: t.to(device) for name, t in arguments.items()}


def documents(length: int, *boundaries: tuple[int, ...], first: int = 0) -> Tensor:
    """(B, L) document numbers; row b changes document at each of boundaries[b]."""
    seq_idx = torch.full((len(boundaries), length), first, dtype=torch.int32)
    for row, changes in enumerate(boundaries):
        for change in changes:
            seq_idx[row, change:] += 1
    return seq_idx


def outputs_and_gradients(scan, arguments: dict[str, Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """y, final state and the gradient of a fixed random functional of both, in float64."""
    given = {
        n: t.detach().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t
        for n, t in arguments.items()
    }
    y, state = scan(**given)
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.device) for t in (y, state)]
    loss = (y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [t.detach().double() for t in (y, state, *gradients)]


def assert_same(scan, arguments: dict[str, Tensor | None], tolerance: float = 2e-5) -> None:
    fast = outputs_and_gradients(scan, arguments, torch.float32)
    exact = outputs_and_gradients(ssd_sequential, arguments, torch.float64)
    for ours, theirs in zip(fast, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


def test_the_recurrence_by_hand():
    """One head, P = N = 1, dt = 1, A = −ln 2: the state halves at each token."""
    x = torch.tensor([8.0, 4.0, 2.0]).view(1, 3, 1, 1)
    ones = torch.ones(1, 3, 1, 1)
    y, state = ssd_sequential(
        x, torch.ones(1, 3, 1), -torch.log(torch.tensor([2.0])), ones, 3 * ones, torch.tensor([0.5])
    )
    torch.testing.assert_close(y.flatten(), torch.tensor([24.0 + 4, 24.0 + 2, 18.0 + 1], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([6.0], dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_the_recurrence(length, groups):
    arguments = problem(length, groups)
    assert_same(ssd_chunked, arguments)
    assert_same(ssd_chunked, {**arguments, "initial_state": None, "D": None})


@pytest.mark.parametrize("chunk_size", [1, 16, 50, 65, 200])
def test_any_chunk_size(chunk_size):
    arguments = {**problem(65), "seq_idx": documents(65, (16, 50), (64,))}
    assert_same(lambda **given: ssd_chunked(**given, chunk_size=chunk_size), arguments)


@pytest.mark.parametrize(
    "boundaries",
    [((20,), (100,)), ((64,), (128,)), ((63, 64, 65), (1,)), ((64, 128), (129,)), ((), (5, 6, 7, 70, 127))],
    ids=["inside", "on an edge", "beside an edge", "every edge", "many"],
)
def test_documents_do_not_leak(boundaries):
    seq_idx = documents(130, *boundaries, first=3)
    arguments = problem(130)
    assert_same(ssd_chunked, {**arguments, "seq_idx": seq_idx})
    y, _ = ssd_chunked(**arguments, seq_idx=seq_idx)
    for row, changes in enumerate(boundaries):  # each document on its own gives the same
        edges = [0, *changes, 130]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            part = {n: t[row : row + 1, start:end] for n, t in arguments.items() if n in ("x", "dt", "B", "C")}
            state = arguments["initial_state"][row : row + 1] if start == 0 else None
            alone, _ = ssd_chunked(**part, A=arguments["A"], D=arguments["D"], initial_state=state)
            torch.testing.assert_close(y[row : row + 1, start:end], alone, rtol=1e-4, atol=1e-4)


def test_dt_zero_leaves_the_state():
    arguments = problem(65)
    arguments["dt"] = torch.zeros_like(arguments["dt"])
    y, state = ssd_chunked(**arguments)
    torch.testing.assert_close(state, arguments["initial_state"], rtol=0, atol=0)
    x = arguments["x"].repeat_interleave(RATIO, dim=2)
    wanted = torch.einsum("bhpn,blhn->blhp", arguments["initial_state"], arguments["C"]) + arguments["D"][:, None] * x
    torch.testing.assert_close(y, wanted)


def test_two_halves_are_the_whole():
    arguments = problem(130)
    whole, final = ssd_chunked(**arguments)
    sequences = ("x", "dt", "B", "C")
    fixed = {"A": arguments["A"], "D": arguments["D"]}
    first, state = ssd_chunked(
        **{n: arguments[n][:, :37] for n in sequences}, **fixed, initial_state=arguments["initial_state"]
    )
    second, state = ssd_chunked(**{n: arguments[n][:, 37:] for n in sequences}, **fixed, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_the_state_in_float32():
    arguments = problem(65)
    low = {n: t.bfloat16() if n in ("x", "B", "C") else t for n, t in arguments.items()}
    y, state = ssd_chunked(**low)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = ssd_sequential(**low)
    assert (y.double() - exact).norm() / exact.norm() < 2e-2
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("length", LENGTHS)
def test_mamba_ssm_kernel(length):
    pytest.importorskip("mamba_ssm")
    from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm

    arguments = problem(length, device="cuda", headdim=64, state=64)
    # tensor cores round products of float32 to TensorFloat-32
    assert_same(ssd_mamba_ssm, arguments, tolerance=5e-3)
    arguments["seq_idx"] = documents(length, (length // 2,), (length // 3, length - 1)).cuda()
    assert_same(ssd_mamba_ssm, {**arguments, "initial_state": None}, tolerance=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 65, 130])
def test_compiled_scan(length):
    arguments = {**problem(length, device="cuda"), "seq_idx": documents(length, (length // 2,), ()).cuda()}
    assert_same(torch.compile(ssd_chunked, dynamic=False), arguments, tolerance=1e-4)
