"""Chooses once, per operator and device, which implementation runs, and logs the choice.

Decoding operators have a Triton kernel for CUDA and a plain PyTorch twin for everything else; with TRITON_INTERPRET=1
the kernels run on a CPU, slowly, for tests. Training's scan and convolution differentiate, decoding's operators do not.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels_ext.causal_conv.reference import causal_conv
from kernels_ext.gated_norm import reference as gated_norm_reference
from kernels_ext.ssd.reference import CHUNK_SIZE, ssd_chunked

__all__ = [
    "accept_greedy",
    "accept_injected",
    "accept_sampled",
    "advance",
    "causal_conv",
    "conv_ring_update",
    "decode_attention",
    "filtered_probabilities",
    "gated_rms_norm",
    "greedy",
    "linear_add",
    "ngram_propose",
    "norm_linear",
    "norm_swiglu",
    "rms_norm",
    "rope_append",
    "sample",
    "selective_fold",
    "selective_ring_append",
    "selective_update",
    "selective_verify",
    "silu_mul",
    "ssd",
    "ssd_fold",
    "ssd_update",
    "ssd_verify",
    "uses_kernels",
]

log = logging.getLogger(__name__)


def uses_kernels(device_type: str) -> bool:
    """Whether decoding operators on such a device are Triton kernels."""
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _operator(name: str, package: str, reference: str = "reference") -> Callable[..., Any]:
    """The decoding operator `name` of a package: its `kernel` module's, or that of the plain PyTorch module."""

    @cache
    def choose(kernels: bool) -> Callable[..., Any]:
        if kernels:
            try:
                module = importlib.import_module(f"kernels_ext.{package}.kernel")
            except ImportError as error:
                log.warning("%s: plain PyTorch (Triton does not import: %s)", name, error)
            else:
                log.debug("%s: Triton", name)
                return getattr(module, name)
        return getattr(importlib.import_module(f"kernels_ext.{package}.{reference}"), name)

    def operator(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return choose(uses_kernels(first.device.type))(first, *args, **kwargs)

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = f"See kernels_ext/{package}/{reference}.py."
    return operator


conv_ring_update = _operator("conv_ring_update", "causal_conv", "ring_reference")
decode_attention = _operator("decode_attention", "attention")
rope_append = _operator("rope_append", "attention")
rms_norm = _operator("rms_norm", "rms_norm")
silu_mul = _operator("silu_mul", "swiglu")
ssd_update = _operator("ssd_update", "ssd", "ring_reference")
ssd_verify = _operator("ssd_verify", "ssd", "ring_reference")
ssd_fold = _operator("ssd_fold", "ssd", "ring_reference")
selective_ring_append = _operator("selective_ring_append", "selective_scan")
selective_update = _operator("selective_update", "selective_scan")
selective_verify = _operator("selective_verify", "selective_scan")
selective_fold = _operator("selective_fold", "selective_scan")
filtered_probabilities = _operator("filtered_probabilities", "sampling")
greedy = _operator("greedy", "sampling")
sample = _operator("sample", "sampling")
accept_greedy = _operator("accept_greedy", "speculation")
accept_injected = _operator("accept_injected", "speculation")
accept_sampled = _operator("accept_sampled", "speculation")
advance = _operator("advance", "speculation")
ngram_propose = _operator("ngram_propose", "speculation")


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """See `gated_norm.reference`, which differentiates; the kernel serves where nothing does."""
    if uses_kernels(y.device.type) and not (torch.is_grad_enabled() and (y.requires_grad or weight.requires_grad)):
        from kernels_ext.gated_norm import kernel

        return kernel.gated_rms_norm(y, z, weight, group_size, eps)
    return gated_norm_reference.gated_rms_norm(y, z, weight, group_size, eps)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See kernels_ext/linear/reference.py."""
    if (few := _few_rows(x, weight)) is not None:
        return few.norm_linear(x, norm_weight, eps, weight, bias, out_dtype)
    if not uses_kernels(x.device.type):
        return linear.norm_linear(x, norm_weight, eps, weight, bias, out_dtype)
    normed = rms_norm(x, norm_weight, eps)
    if out_dtype == torch.float32 and bias is None and x.dtype != torch.float32:
        return torch.mm(normed, weight.t(), out_dtype=out_dtype)
    return linear.linear(normed, weight, bias).to(out_dtype or x.dtype)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See kernels_ext/linear/reference.py."""
    if (few := _few_rows(x, weight)) is not None:
        return few.linear_add(x, weight, residual)
    return linear.linear_add(x, weight, residual)


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """See kernels_ext/linear/reference.py."""
    if (few := _few_rows(x, gate_up)) is not None:
        return few.norm_swiglu(x, norm_weight, eps, gate_up)
    if not uses_kernels(x.device.type):
        return linear.norm_swiglu(x, norm_weight, eps, gate_up)
    return silu_mul(linear.linear(rms_norm(x, norm_weight, eps), gate_up))


def _few_rows(x: Tensor, weight: Tensor) -> Any:
    """The kernels for few rows, where a product is the reading of its weight, if they serve these."""
    if not uses_kernels(x.device.type):
        return None
    try:
        from kernels_ext.linear import kernel
    except ImportError:
        return None
    return kernel if kernel.fits(x, weight) else None


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
