"""Chooses once, per operator and device, which implementation runs, and logs the choice.

Decoding operators and losses over the vocabulary have a Triton kernel for CUDA and a plain PyTorch twin for everything
else; with TRITON_INTERPRET=1 the kernels run on a CPU, slowly, for tests. Training's scan and convolution
differentiate, decoding's operators do not, and the losses write their gradient down.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from kernels_ext.attention import reference as attention
from kernels_ext.causal_conv import reference as causal_conv_reference
from kernels_ext.causal_conv import ring_reference as causal_conv_ring
from kernels_ext.gated_norm import reference as gated_norm
from kernels_ext.linear import reference as linear
from kernels_ext.rms_norm import reference as rms_norm_reference
from kernels_ext.rotary import reference as rotary
from kernels_ext.sampling import reference as sampling
from kernels_ext.selective_scan import reference as selective
from kernels_ext.speculation import reference as speculation
from kernels_ext.ssd import ring_reference as ssd_ring
from kernels_ext.ssd.reference import CHUNK_SIZE, ssd_chunked
from kernels_ext.swiglu import reference as swiglu
from kernels_ext.vocabulary_loss import reference as vocabulary_loss
from kernels_ext.window import operator as window_operator
from kernels_ext.window import reference as window_reference
from kernels_ext.window import ring_reference as window_ring

__all__ = [
    "accept_greedy",
    "accept_injected",
    "accept_sampled",
    "advance",
    "causal_conv",
    "choose_training_kernels",
    "conv_ring_update",
    "cross_entropy_",
    "decode_attention",
    "divergence_",
    "filtered_probabilities",
    "gated_rms_norm",
    "greedy",
    "linear_add",
    "ngram_propose",
    "norm_linear",
    "norm_swiglu",
    "rms_norm",
    "rope_append",
    "rotate_heads",
    "sample",
    "selective_fold",
    "selective_ring_append",
    "selective_scan",
    "selective_update",
    "selective_verify",
    "silu_mul",
    "ssd",
    "ssd_fold",
    "ssd_update",
    "ssd_verify",
    "uses_kernels",
    "window_attention",
    "window_gate",
]

log = logging.getLogger(__name__)


def uses_kernels(device_type: str) -> bool:
    """Whether operators that have a Triton kernel run it on such a device."""
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_kernels() -> dict[str, Callable[..., Any]]:
    """The operators' Triton kernels by name; none where Triton is not installed."""
    try:
        from kernels_ext.attention import kernel as attention_kernel
        from kernels_ext.causal_conv import kernel as causal_conv_kernel
        from kernels_ext.gated_norm import kernel as gated_norm_kernel
        from kernels_ext.rms_norm import kernel as rms_norm_kernel
        from kernels_ext.sampling import kernel as sampling_kernel
        from kernels_ext.selective_scan import kernel as selective_scan_kernel
        from kernels_ext.speculation import kernel as speculation_kernel
        from kernels_ext.ssd import kernel as ssd_kernel
        from kernels_ext.swiglu import kernel as swiglu_kernel
        from kernels_ext.vocabulary_loss import kernel as vocabulary_loss_kernel
        from kernels_ext.window import kernel as window_kernel
    except ImportError as error:
        log.warning("decoding and losses: plain PyTorch (Triton does not import: %s)", error)
        return {}
    modules = (
        attention_kernel,
        causal_conv_kernel,
        gated_norm_kernel,
        rms_norm_kernel,
        sampling_kernel,
        selective_scan_kernel,
        speculation_kernel,
        ssd_kernel,
        swiglu_kernel,
        vocabulary_loss_kernel,
        window_kernel,
    )
    log.info("decoding and losses: Triton kernels")
    return {name: getattr(module, name) for module in modules for name in __all__ if hasattr(module, name)}


def _operator(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of that name: its kernel, or `reference`, which is its plain PyTorch twin."""
    name = reference.__name__

    @wraps(reference)
    def operator(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = triton_kernels().get(name, reference) if uses_kernels(first.device.type) else reference
        return chosen(first, *args, **kwargs)

    return operator


conv_ring_update = _operator(causal_conv_ring.conv_ring_update)
decode_attention = _operator(attention.decode_attention)
rope_append = _operator(attention.rope_append)
rms_norm = _operator(rms_norm_reference.rms_norm)
silu_mul = _operator(swiglu.silu_mul)
ssd_update = _operator(ssd_ring.ssd_update)
ssd_verify = _operator(ssd_ring.ssd_verify)
ssd_fold = _operator(ssd_ring.ssd_fold)
selective_ring_append = _operator(selective.selective_ring_append)
selective_update = _operator(selective.selective_update)
selective_verify = _operator(selective.selective_verify)
selective_fold = _operator(selective.selective_fold)
filtered_probabilities = _operator(sampling.filtered_probabilities)
greedy = _operator(sampling.greedy)
sample = _operator(sampling.sample)
accept_greedy = _operator(speculation.accept_greedy)
accept_injected = _operator(speculation.accept_injected)
accept_sampled = _operator(speculation.accept_sampled)
advance = _operator(speculation.advance)
ngram_propose = _operator(speculation.ngram_propose)
divergence_ = _operator(vocabulary_loss.divergence_)
cross_entropy_ = _operator(vocabulary_loss.cross_entropy_)
window_gate = _operator(window_ring.window_gate)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """See kernels_ext/gated_norm/reference.py, which differentiates; the kernel serves where nothing does. Compiled
    code has the plain form, which is fused with what stands around it."""
    plain = gated_norm.gated_rms_norm
    if torch.compiler.is_compiling():
        return plain(y, z, weight, group_size, eps)
    if uses_kernels(y.device.type) and not (torch.is_grad_enabled() and (y.requires_grad or weight.requires_grad)):
        return triton_kernels().get("gated_rms_norm", plain)(y, z, weight, group_size, eps)
    return plain(y, z, weight, group_size, eps)


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
    return linear.linear(rms_norm(x, norm_weight, eps), weight, bias, out_dtype)


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
    return kernel if kernel.fits(x, weight) and kernel.pays(x.shape[0], *weight.shape) else None


def ssd(device_type: str) -> Callable[..., tuple]:
    """The chunked scan for a device type: Triton kernels on CUDA for the shapes that they serve, plain PyTorch
    elsewhere."""
    return _ssd_on_cuda if device_type == "cuda" else ssd_chunked


def _ssd_on_cuda(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any) -> tuple:
    if _has_training_kernels():
        from kernels_ext.ssd import scan_kernel

        if scan_kernel.fits(x, B, C):
            return scan_kernel.ssd_scan(x, dt, A, B, C, *args, **kwargs)
    scan = ssd_chunked if torch.compiler.is_compiling() else _ssd_of_any_shape()
    return scan(x, dt, A, B, C, *args, **kwargs)


def selective_scan(device_type: str) -> Callable[..., tuple]:
    """Mamba-1's scan for a device type: Triton kernels on CUDA for the shapes that they serve, plain PyTorch
    elsewhere."""
    return _selective_scan_on_cuda if device_type == "cuda" else selective.selective_scan


def _selective_scan_on_cuda(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    if _has_training_kernels():
        from kernels_ext.selective_scan import scan_kernel

        if scan_kernel.fits(x, B, C):
            return scan_kernel.selective_scan(x, dt, A, B, C, *args, **kwargs)
    scan = selective.selective_scan if torch.compiler.is_compiling() else _selective_scan_of_any_shape()
    return scan(x, dt, A, B, C, *args, **kwargs)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """See kernels_ext/causal_conv/reference.py; the kernel serves whole rows on CUDA, as training has them."""
    if x.device.type == "cuda" and initial_state is None and _has_training_kernels():
        from kernels_ext.causal_conv import training_kernel

        if training_kernel.fits(x, weight):
            return training_kernel.causal_conv(x, weight, bias, seq_idx, silu)
    return causal_conv_reference.causal_conv(x, weight, bias, seq_idx, initial_state, silu)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: int,
    seq_idx: Tensor | None = None,
    before: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """See kernels_ext/window/reference.py; the operator serves whole rows on CUDA, as training has them."""
    if q.device.type == "cuda" and before is None:
        return window_operator.window_attention(q, k, v, sink, window, seq_idx)
    return window_reference.window_attention(q, k, v, sink, window, seq_idx, before)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels_ext/rotary/reference.py."""
    if x.device.type == "cuda" and _has_training_kernels():
        from kernels_ext.rotary import training_kernel

        return training_kernel.rotate_heads(x, cos, sin)
    return rotary.rotate_heads(x, cos, sin)


def _has_training_kernels() -> bool:
    return choose_training_kernels() if _chosen is None else _chosen


_chosen: bool | None = None


def choose_training_kernels() -> bool:
    """Whether the training kernels import. Whoever compiles code that uses them calls this first: a compiled block
    cannot trace the attempt and its log, but reads what was found."""
    global _chosen
    if _chosen is None:
        _chosen = _training_kernels_import()
    return _chosen


def _training_kernels_import() -> bool:
    try:
        from kernels_ext.causal_conv import training_kernel  # noqa: F401
        from kernels_ext.rotary import training_kernel as rotary_training_kernel  # noqa: F401
        from kernels_ext.selective_scan import scan_kernel as selective_scan_kernel  # noqa: F401
        from kernels_ext.ssd import scan_kernel  # noqa: F401
    except ImportError as error:
        log.info("scans, convolution and rotation on cuda: no Triton kernels (Triton does not import: %s)", error)
        return False
    log.info("scans, convolution and rotation on cuda: Triton kernels")
    return True


@cache
def _ssd_of_any_shape() -> Callable[..., tuple]:
    """What serves the other shapes on CUDA: mamba-ssm's kernel where it imports, or else plain PyTorch, compiled."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401
    except ImportError as error:
        log.info("ssd on cuda, any shape: plain PyTorch, compiled (mamba-ssm does not import: %s)", error)
        return _compiled_for_training()
    from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm

    log.info("ssd on cuda, any shape: mamba-ssm")
    return ssd_mamba_ssm


@cache
def _selective_scan_of_any_shape() -> Callable[..., tuple]:
    """What serves the other shapes of Mamba-1 on CUDA: mamba-ssm's kernel where it imports, or else plain PyTorch."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except ImportError as error:
        log.info("selective scan on cuda, any shape: plain PyTorch (mamba-ssm does not import: %s)", error)
        return selective.selective_scan
    from kernels_ext.selective_scan.mamba_ssm_kernel import selective_scan_mamba_ssm

    log.info("selective scan on cuda, any shape: mamba-ssm")
    return selective_scan_mamba_ssm


def _compiled_for_training() -> Callable[..., tuple]:
    """ssd_chunked, compiled where a training stage calls it: with gradients and in whole chunks, so always in one
    shape. Scoring and prefill see many shapes, each of which would cost seconds of compilation."""
    compiled = torch.compile(ssd_chunked, dynamic=False)

    def scan(x: Tensor, *args: Any, **kwargs: Any) -> tuple:
        fixed_shape = x.requires_grad and torch.is_grad_enabled() and x.shape[1] % CHUNK_SIZE == 0
        return (compiled if fixed_shape else ssd_chunked)(x, *args, **kwargs)

    return scan
