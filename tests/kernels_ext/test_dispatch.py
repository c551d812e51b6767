"""Which implementation runs; what has no GPU to run on is replaced by a stand-in of the same signature."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from kernels_ext import dispatch
from kernels_ext.ssd.reference import ssd_chunked, ssd_sequential


@pytest.fixture(autouse=True)
def fresh_choice():
    dispatch.ssd.cache_clear()
    yield
    dispatch.ssd.cache_clear()


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
    with caplog.at_level(logging.INFO):
        scan = dispatch.ssd("cuda")
    assert dispatch.ssd("cuda") is scan
    assert [r.message[:27] for r in caplog.records if r.name == dispatch.log.name] == ["ssd on cuda: plain PyTorch,"]

    def run(length: int, gradients: bool) -> int:
        x, B, C = (torch.ones(1, length, heads, 2) for heads in (1, 1, 2))
        arguments = x.requires_grad_(gradients), torch.ones(1, length, 2), -torch.ones(2), B, C
        torch.testing.assert_close(scan(*arguments), ssd_chunked(*arguments))
        return len(calls)

    assert run(128, gradients=False) == run(100, gradients=True) == 0
    assert run(128, gradients=True) == 1
    with torch.no_grad():
        assert run(128, gradients=True) == 1


def test_the_kernel_is_given_repeated_groups(mamba_ssm, caplog):
    with caplog.at_level(logging.INFO):
        scan = dispatch.ssd("cuda")
    assert "ssd on cuda: mamba-ssm" in caplog.text
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
