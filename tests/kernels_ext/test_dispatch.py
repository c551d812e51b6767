"""Which implementation runs; what has no GPU to run on is replaced by a stand-in of the same signature."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels_ext import dispatch
from kernels_ext.causal_conv import reference as causal_conv_reference
from kernels_ext.gated_norm.reference import gated_rms_norm
from kernels_ext.ssd.reference import ssd_chunked, ssd_sequential
from tests.kernels_ext.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
scan_kernel = interpreted("kernels_ext.ssd.scan_kernel")
conv_kernel = interpreted("kernels_ext.causal_conv.training_kernel")


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    dispatch._ssd_of_any_shape.cache_clear()
    yield
    dispatch._ssd_of_any_shape.cache_clear()


@pytest.fixture
def mamba_ssm(monkeypatch) -> list[tuple]:
    """A mamba-ssm whose kernel is the recurrence; returns the shapes that it was called with."""
    calls = []

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, seq_idx=None, initial_states=None, return_final_states=False
    ):
        assert return_final_states
        assert x.shape[2] == A.shape[0], "the kernel wants one x per head"
        assert B.shape == C.shape, "the kernel wants as many B as C"
        assert chunk_size & (chunk_size - 1) == 0
        assert seq_idx is None or seq_idx.dtype == torch.int32
        calls.append((x.shape, B.shape))
        return ssd_sequential(x, dt, A, B, C, D, seq_idx, initial_states)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = mamba_chunk_scan_combined
    return calls


def test_plain_pytorch_on_the_cpu():
    assert dispatch.ssd("cpu") is ssd_chunked


def test_compiled_on_cuda_without_mamba_ssm(monkeypatch, caplog):
    """Only for whole chunks with gradients, as training calls it; every other shape would be compiled anew."""
    calls = []

    def compiles(function, **options):
        assert function is ssd_chunked
        return lambda *arguments, **named: calls.append("compiled") or function(*arguments, **named)

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setattr(torch, "compile", compiles)
    caplog.set_level(logging.INFO)
    scan = dispatch.ssd("cuda")

    def run(length: int, gradients: bool) -> int:
        x, B, C = (torch.ones(1, length, heads, 2) for heads in (1, 1, 2))
        arguments = x.requires_grad_(gradients), torch.ones(1, length, 2), -torch.ones(2), B, C
        torch.testing.assert_close(scan(*arguments), ssd_chunked(*arguments))
        return len(calls)

    assert run(128, gradients=False) == run(100, gradients=True) == 0
    assert run(128, gradients=True) == 1
    with torch.no_grad():
        assert run(128, gradients=True) == 1
    chosen = [r.message for r in caplog.records if r.name == dispatch.log.name]
    assert [line[:38] for line in chosen] == [
        "scans, convolution and rotation on cud",
        "ssd on cuda, any shape: plain PyTorch,",
    ], "each choice is made and logged once"


def test_triton_on_cuda():
    """What the kernels serve, through them, in one graph with the code around it."""
    random = torch.Generator().manual_seed(0)
    x, B = (torch.randn(1, 20, 1, 16, generator=random).to(DEVICE) for _ in range(2))
    C, dt = torch.randn(1, 20, 2, 16, generator=random).to(DEVICE), torch.rand(1, 20, 2, generator=random).to(DEVICE)
    arguments = x, dt, -torch.ones(2, device=DEVICE), B, C
    ours, state = dispatch.ssd("cuda")(*arguments)
    assert torch.equal(ours, scan_kernel.ssd_scan(*arguments)[0])
    assert torch.equal(state, scan_kernel.ssd_scan(*arguments)[1])
    compiled = torch.compile(lambda *given: 2 * dispatch.ssd("cuda")(*given)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), 2 * ours)
    odd = *arguments[:3], B[..., :5], C[..., :5]  # plain PyTorch is traced along
    torch.testing.assert_close(compiled(*odd), 2 * ssd_chunked(*odd)[0])


@pytest.mark.parametrize(
    "device, dtype, width, initial_state, chosen",
    [
        ("cuda", torch.bfloat16, 4, False, "kernel"),
        ("cuda", torch.bfloat16, 4, True, "plain"),
        ("cuda", torch.float64, 4, False, "plain"),
        ("cuda", torch.float32, 9, False, "plain"),
        ("cpu", torch.bfloat16, 4, False, "plain"),
    ],
)
def test_convolution(monkeypatch, device, dtype, width, initial_state, chosen):
    """The kernel serves whole rows on CUDA; tensors without data stand in for those of a GPU."""
    calls = []
    monkeypatch.setattr(conv_kernel, "causal_conv", lambda *given: calls.append(("kernel", given)))
    monkeypatch.setattr(causal_conv_reference, "causal_conv", lambda *given: calls.append(("plain", given)))
    with FakeTensorMode():
        x = torch.empty(2, 5, 6, dtype=dtype, device=device)
        weight, bias = torch.empty(6, width, device=device), torch.empty(6, device=device)
        state = torch.empty(2, width - 1, 6, device=device) if initial_state else None
        dispatch.causal_conv(x, weight, bias, None, state, True)
    given = (x, weight, bias, None, True) if chosen == "kernel" else (x, weight, bias, None, state, True)
    assert calls == [(chosen, given)]


def test_convolution_is_the_same_either_way():
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random).to(DEVICE) for shape in ((2, 9, 6), (6, 4), (6,)))
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]] * 2, dtype=torch.int32, device=DEVICE)
    ours = conv_kernel.causal_conv(x, weight, bias, seq_idx, True)
    torch.testing.assert_close(dispatch.causal_conv(x, weight, bias, seq_idx, silu=True), ours)


def test_mamba_ssm_is_given_repeated_groups(mamba_ssm, caplog):
    caplog.set_level(logging.INFO)
    scan = dispatch.ssd("cuda")
    random = torch.Generator().manual_seed(0)
    x, B = (torch.randn(2, 9, 2, 4, generator=random) for _ in range(2))
    C = torch.randn(2, 9, 6, 4, generator=random)
    dt, A, D = torch.rand(2, 9, 6, generator=random), -torch.rand(6, generator=random), torch.rand(6, generator=random)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]] * 2)
    state = torch.randn(2, 6, 4, 4, generator=random)
    y, final = scan(x, dt, A, B, C, D, seq_idx, state)
    wanted, wanted_final = ssd_sequential(x, dt, A, B, C, D, seq_idx, state)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(final, wanted_final)
    assert mamba_ssm == [((2, 9, 6, 4), (2, 9, 6, 4))]
    assert "ssd on cuda, any shape: mamba-ssm" in caplog.text


def test_a_frozen_gated_norm_is_compiled_without_a_break(monkeypatch):
    """A student that is only read while another model trains: there the choice of a kernel must not be traced."""
    monkeypatch.setattr(dispatch, "uses_kernels", lambda device_type: True)
    y, z = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    weight = torch.rand(8, device=DEVICE)
    compiled = torch.compile(dispatch.gated_rms_norm, fullgraph=True, backend="aot_eager")
    dispatch.triton_kernels.cache_clear()  # the first call logs, which cannot be traced
    with torch.no_grad():
        ours = compiled(y, z, weight, 4, 1e-5)
    torch.testing.assert_close(ours, gated_rms_norm(y, z, weight, 4, 1e-5))
