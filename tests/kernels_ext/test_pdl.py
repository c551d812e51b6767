"""Programmatic dependent launch: when it is on, and that no kernel reads before what it depends on is written."""

from __future__ import annotations

import pytest
import torch

from tests.kernels_ext.interpreted import interpreted

pdl = interpreted("kernels_ext.pdl")
rms_norm = interpreted("kernels_ext.rms_norm.kernel").rms_norm
silu_mul = interpreted("kernels_ext.swiglu.kernel").silu_mul
CPU = torch.device("cpu")


def test_small_launches_start_early_where_the_device_can(monkeypatch):
    assert pdl.launch_options({"num_warps": 4, "launch_pdl": True}, CPU, 1) == {"num_warps": 4, "PDL": False}
    monkeypatch.setattr(pdl, "available", lambda device: True)
    on, off = {"PDL": True, "launch_pdl": True}, {"PDL": False}
    assert pdl.launch_options({}, CPU, pdl.MOST_PROGRAMS) == on
    assert pdl.launch_options({}, CPU, pdl.MOST_PROGRAMS + 1) == off
    config = {"launch_pdl": True}
    assert pdl.launch_options(config, CPU, pdl.MOST_PROGRAMS + 1) == on and config == {"launch_pdl": True}
    assert pdl.launch_options({"launch_pdl": False}, CPU, 1) == off


@pytest.mark.gpu
def test_between_copies_and_plain_kernels():
    """The same memory written by a copy, read by two kernels that start early, and wiped by a plain one, many times."""
    x, weight = torch.zeros(64, 1024, device="cuda"), torch.ones(1024, device="cuda")
    values = torch.randn(32, 64, 1024, device="cuda")
    found = {}
    for early in (False, True):
        config, outputs = {"launch_pdl": early}, []
        for value in values:
            x.copy_(value)
            outputs.append(silu_mul(rms_norm(x, weight, 1e-5, config=config), config=config))
            x.zero_()
        found[early] = torch.stack(outputs)
    assert torch.equal(found[True], found[False]) and found[True].any()
