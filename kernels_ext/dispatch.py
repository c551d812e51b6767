"""Chooses once, per operator and device, which implementation runs, and logs the choice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from kernels_ext.causal_conv.reference import causal_conv
from kernels_ext.gated_norm.reference import gated_rms_norm
from kernels_ext.ssd.reference import ssd_chunked, ssd_step

__all__ = ["causal_conv", "gated_rms_norm", "ssd", "ssd_step"]

log = logging.getLogger(__name__)


@cache
def ssd(device_type: str) -> Callable[..., tuple]:
    """The chunked scan for a device type: mamba-ssm's kernel on CUDA where it imports, plain PyTorch elsewhere."""
    if device_type == "cuda":
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401
        except ImportError as error:
            log.info("ssd on cuda: plain PyTorch, compiled (mamba-ssm does not import: %s)", error)
            return torch.compile(ssd_chunked, dynamic=False)
        else:
            from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm

            log.info("ssd on cuda: mamba-ssm")
            return ssd_mamba_ssm
    return ssd_chunked
