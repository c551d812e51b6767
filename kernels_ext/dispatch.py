"""Chooses once, per operator and device, which implementation runs, and logs the choice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels_ext.causal_conv.reference import causal_conv
from kernels_ext.gated_norm.reference import gated_rms_norm
from kernels_ext.ssd.reference import CHUNK_SIZE, ssd_chunked, ssd_step

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
            return _compiled_for_training()
        else:
            from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm

            log.info("ssd on cuda: mamba-ssm")
            return ssd_mamba_ssm
    return ssd_chunked


def _compiled_for_training() -> Callable[..., tuple]:
    """ssd_chunked, compiled where a training stage calls it: with gradients and in whole chunks, so always in one
    shape. Scoring and prefill see many shapes, each of which would cost seconds of compilation."""
    compiled = torch.compile(ssd_chunked, dynamic=False)

    def scan(x: Tensor, *args: Any, **kwargs: Any) -> tuple:
        fixed_shape = x.requires_grad and torch.is_grad_enabled() and x.shape[1] % CHUNK_SIZE == 0
        return (compiled if fixed_shape else ssd_chunked)(x, *args, **kwargs)

    return scan
