"""Mamba-1's scan as training has it, as Triton kernels and through mamba-ssm, against the recurrence in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels_ext import dispatch
from kernels_ext.selective_scan import mamba_ssm_kernel, reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.selective_scan.scan_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "state")
SHAPES = {  # (H, G, P, N)
    "grouped": (4, 2, 8, 4),
    "one group": (3, 1, 16, 16),
    "a program has part of a piece": (2, 2, 32, 32),
    "odd": (6, 2, 6, 2),
    "one number of state": (3, 3, 5, 1),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(shape: tuple[int, int, int, int], batch: int, length: int, dtype=torch.float32) -> list[Tensor]:
    """x, dt, A, B, C, D on the device; dt as after softplus, A of the size of mamba-ssm's."""
    heads, groups, headdim, d_state = shape
    random = torch.Generator().manual_seed(length)
    pieces, channels = headdim // d_state, heads * headdim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(DEVICE, dtype)

    return [
        normal(batch, length, groups, headdim),
        torch.nn.functional.softplus(torch.randn(batch, length, channels, generator=random) - 1.0).to(DEVICE),
        (-torch.rand(channels, d_state, generator=random) * 4 - 0.1).to(DEVICE),
        normal(batch, length, groups, pieces, d_state),
        normal(batch, length, heads, pieces, d_state),
        torch.randn(channels, generator=random).to(DEVICE),
    ]


def documents(batch: int, length: int) -> Tensor:
    """Rows with different numbers of documents, the last row with one; two boundaries lie side by side."""
    boundaries = torch.zeros(batch, length, dtype=torch.int32)
    for row in range(batch - 1):
        for at in (length // 3, length // 3 + 1, length // 2 + row, length - 1)[row:]:
            boundaries[row, at] = 1
    return boundaries.cumsum(1).to(torch.int32).to(DEVICE)


def gradients(scan: Callable, given: list[Tensor], seq_idx: Tensor | None, with_state: bool) -> list[Tensor]:
    """y, the final state, and the gradients of a loss that has y and, `with_state`, both states."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y, end = scan(*leaves[:6], seq_idx, leaves[6] if with_state else None)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss = (y.double() * weights).sum() + (end.square().sum() if with_state else 0.0)
    return [y, end, *torch.autograd.grad(loss, leaves[: 7 if with_state else 6])]


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, by Frobenius norm; NaN anywhere makes it NaN, which no bound holds."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def compare(scan: Callable, given: list[Tensor], seq_idx: Tensor | None, with_state: bool, bound: float) -> None:
    ours = gradients(scan, given, seq_idx, with_state)
    exact = gradients(reference.selective_scan_sequential, [t.double() for t in given], seq_idx, with_state)
    for name, found, wanted, like in zip(("y", "end", *NAMES), ours, exact, (given[0], None, *given), strict=False):
        assert error(found, wanted) < bound, name
        assert found.dtype == (torch.float32 if like is None else like.dtype), name


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("length", "with_state"), [(1, True), (7, False), (13, True)])
def test_kernels_are_the_recurrence(monkeypatch, shape, length, with_state):
    monkeypatch.setattr(kernel, "CHUNK", 4)
    monkeypatch.setattr(kernel, "launch_config", lambda d_state: {"BLOCK_D": 16, "num_warps": 1})
    given = draw(shape, 3, length)
    given.append(torch.randn(3, *given[2].shape, device=DEVICE))
    compare(kernel.selective_scan, given, documents(3, length) if length > 7 else None, with_state, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("d_state", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_at_training_sizes(d_state, dtype):
    """As they are launched, over many programs and chunks."""
    compare(kernel.selective_scan, draw((9, 3, 64, d_state), 4, 300, dtype), documents(4, 300), False, TOLERANCE[dtype])


@pytest.mark.usefixtures("nan_filled")
def test_kernels_read_views_of_a_projection(monkeypatch):
    """Of bfloat16, as training has them, with gradients in bfloat16 too."""
    monkeypatch.setattr(kernel, "launch_config", lambda d_state: {"BLOCK_D": 32, "num_warps": 1})
    x, dt, A, B, C, D = draw(SHAPES["grouped"], 2, 9, torch.bfloat16)
    projected = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
    views = [v.view_as(t) for v, t in zip(projected.split((16, 16, 32), dim=2), (x, B, C), strict=True)]
    compare(kernel.selective_scan, [views[0], dt, A, *views[1:], D], documents(2, 9), False, TOLERANCE[torch.bfloat16])
    y, end = kernel.selective_scan(views[0], dt.transpose(1, 2).contiguous().transpose(1, 2), A, *views[1:], D)
    again = kernel.selective_scan(x, dt, A, B, C, D)
    assert torch.equal(y, again[0]) and torch.equal(end, again[1])


def test_kernels_in_a_compiled_graph():
    given = draw(SHAPES["grouped"], 1, 5)
    given = [*(t.requires_grad_() for t in given), documents(1, 5)]
    compiled = torch.compile(lambda *own: 2 * kernel.selective_scan(*own)[0], fullgraph=True, backend="aot_eager")
    found, wanted = (scan(*given) for scan in (compiled, lambda *own: 2 * kernel.selective_scan(*own)[0]))
    assert torch.equal(found, wanted)
    ours, exact = (torch.autograd.grad(y.square().sum(), given[:6]) for y in (found, wanted))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 6, 3), (4, 3, 8, 4)], ids=["three numbers of state", "heads are no multiple"])
def test_kernels_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match="call reference.selective_scan for others|n_heads 4 is not a multiple"):
        kernel.selective_scan(*draw(shape, 1, 3))
    assert kernel.fits(*(draw(SHAPES["grouped"], 1, 3)[i] for i in (0, 3, 4)))


# mamba-ssm's, which exists on CUDA alone: a stand-in of its signature and its rules.


@pytest.fixture
def mamba_ssm(monkeypatch) -> list[tuple[int, ...]]:
    """Returns the shapes of u that its `selective_scan_fn` was called with."""
    calls = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert z is None and delta_bias is None and not delta_softplus and return_last_state
        assert u.dtype == delta.dtype == B.dtype == C.dtype, "inputs of one type"
        assert A.dtype == D.dtype == torch.float32
        assert u.shape == delta.shape and B.shape == C.shape and u.stride(-1) == B.stride(-1) == 1
        calls.append(tuple(u.shape))
        channels_of_one = u.shape[1] // B.shape[1]
        state, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            B_t, C_t = (m[..., t].repeat_interleave(channels_of_one, dim=1) for m in (B, C))
            state = torch.exp(delta[:, :, t, None] * A) * state + (delta[..., t] * u[..., t])[..., None] * B_t
            ys.append((state * C_t).sum(-1) + D * u[..., t])
        return torch.stack(ys, dim=-1), state

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_fn
    return calls


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_ssm_is_the_recurrence(mamba_ssm, shape, packed):
    """With documents there are as many tokens more as the fullest row has boundaries."""
    seq_idx = documents(3, 12) if packed else None
    compare(mamba_ssm_kernel.selective_scan_mamba_ssm, draw(shape, 3, 12), seq_idx, False, 1e-5)
    assert mamba_ssm == [(3, shape[0] * shape[2], 16 if packed else 12)]


def test_mamba_ssm_leaves_nothing_of_a_document(mamba_ssm):
    """Whatever its states were, decays near none included: to the bit."""
    x, dt, A, B, C, D = draw(SHAPES["grouped"], 1, 12)
    A = -torch.logspace(-6, 3, A.numel(), device=DEVICE).view_as(A)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32, device=DEVICE)
    scan = mamba_ssm_kernel.selective_scan_mamba_ssm
    y, end = scan(x, dt, A, B, C, D, seq_idx)
    x, dt = (torch.cat([1e6 * t[:, :5], t[:, 5:]], dim=1) for t in (x, dt))
    other, other_end = scan(x, dt, A, B, C, D, seq_idx)
    assert not torch.equal(y[:, :5], other[:, :5])
    assert torch.equal(y[:, 5:], other[:, 5:]) and torch.equal(end, other_end)


def test_mamba_ssm_has_no_initial_state(mamba_ssm):
    given = [*draw(SHAPES["grouped"], 2, 6), documents(2, 6), torch.randn(2, 32, 4, device=DEVICE)]
    for ours, plain in zip(
        mamba_ssm_kernel.selective_scan_mamba_ssm(*given), reference.selective_scan(*given), strict=True
    ):
        assert torch.equal(ours, plain)
    assert mamba_ssm == []


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_ssm_itself_is_the_recurrence(packed):
    pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
    seq_idx = documents(3, 200) if packed else None
    compare(mamba_ssm_kernel.selective_scan_mamba_ssm, draw((4, 2, 32, 16), 3, 200), seq_idx, False, 1e-4)


# Which of them runs.


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    dispatch._selective_scan_of_any_shape.cache_clear()
    yield
    dispatch._selective_scan_of_any_shape.cache_clear()


def test_plain_pytorch_on_the_cpu():
    assert dispatch.selective_scan("cpu") is reference.selective_scan


def test_on_cuda_each_serves_what_it_can(fresh_choice, monkeypatch):
    scan = dispatch.selective_scan("cuda")
    given = draw(SHAPES["grouped"], 1, 5)
    assert torch.equal(scan(*given)[0], kernel.selective_scan(*given)[0])
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    odd = draw((2, 1, 6, 3), 1, 5)
    assert torch.equal(scan(*odd)[0], reference.selective_scan(*odd)[0])
    compiled = torch.compile(lambda *own: 2 * scan(*own)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*odd), 2 * scan(*odd)[0])


def test_other_shapes_go_to_mamba_ssm_where_it_is(fresh_choice, mamba_ssm, caplog):
    caplog.set_level("INFO")
    odd = draw((2, 1, 6, 3), 1, 5)
    compare(dispatch.selective_scan("cuda"), odd, None, False, 1e-5)
    assert mamba_ssm == [(1, 12, 5)]
    assert "selective scan on cuda, any shape: mamba-ssm" in caplog.text
