"""What a Mamba-1 and a Mamba-2 mixer have in common: projections, convolution, and the state of a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from hybrid.cache import Span, SSMCache
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep
from hybrid.rms_norm import RMSNorm
from kernels_ext import dispatch

ALIGNED = 8
"""Numbers of 16 bits in the 16 bytes that a load or copy of tensor-core kernels takes at a time."""


class MambaMixer(nn.Module):
    """A subclass makes its own parameters after these, `out_proj` the last, and has `features` and `decode`.

    sections: what the rows of in_proj are, by size.
    """

    A_log: nn.Parameter
    D: nn.Parameter
    out_proj: nn.Linear

    def __init__(self, config: HybridConfig, sections: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.sections = config, sections
        self.in_proj = nn.Linear(config.d_model, sum(sections), bias=config.proj_bias)
        self.conv1d = nn.Conv1d(
            config.conv_channels, config.conv_channels, config.d_conv, groups=config.conv_channels
        )  # holds weight (channels, 1, d_conv) and bias under mamba-ssm's names

    def forward(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """hidden (B, L, d_model) → (B, L, d_model)."""
        return self.out_proj(self.features(hidden, seq_idx, cache, span)).to(hidden.dtype)

    def features(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """What enters out_proj: (B, L, d_inner). With a cache, the tokens of `span` are appended to its state."""
        raise NotImplementedError

    @property
    def A(self) -> Tensor:
        """Negative decays, of A_log's shape."""
        return -torch.exp(self.A_log)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """in_proj's sections of hidden (B, L, d_model).

        In training the product has rows of zeros besides, as many as make its own rows aligned: others keep matrix
        products, three in number there, from their fast kernels.
        """
        if not torch.is_autocast_enabled(hidden.device.type):  # a student may have float32 mixers in a bfloat16 body
            hidden = hidden.to(self.in_proj.weight.dtype)
        missing = -sum(self.sections) % ALIGNED
        if not self.training:
            return self.in_proj(hidden).split(self.sections, dim=-1)
        weight = pad(self.in_proj.weight, (0, 0, 0, missing)) if missing else self.in_proj.weight
        sections = linear(hidden, weight).split((*self.sections, missing), dim=-1)[: len(self.sections)]
        if self.in_proj.bias is None:
            return sections
        # Section by section, where compiled code adds it on the way: a product with a bias writes that out first.
        biases = self.in_proj.bias.to(sections[0].dtype).split(self.sections)
        return tuple(section + bias for section, bias in zip(sections, biases, strict=True))

    def convolve(self, inputs: Tensor, seq_idx: Tensor | None, cache: SSMCache | None, span: Span | None) -> Tensor:
        """Causal convolution of inputs (B, L, channels), after the cache's last inputs, which it then keeps anew."""
        before, count = None, self.config.d_conv - 1
        if cache is not None and span is not None:
            before = span.inputs_before(cache.conv, count)
            span.keep_inputs(cache.conv, torch.cat([before, inputs.to(before.dtype)], dim=1), count)
        weight = self.conv1d.weight.squeeze(1)
        return dispatch.causal_conv(inputs, weight, self.conv1d.bias, seq_idx, before, self.config.conv_silu)

    def scan(
        self,
        operator: Callable[..., tuple[Tensor, Tensor]],
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        seq_idx: Tensor | None,
        cache: SSMCache | None,
        span: Span | None,
    ) -> Tensor:
        """y (B, L, H, P) of inputs x, dt, B, C from the cache's state on, which then is what it is after them."""
        x, dt, B, C = inputs
        state = None
        if cache is not None and span is not None:
            dt, state = dt * span.live(dt.shape[1])[..., None], cache.state.float()
        y, state = operator(x, dt, self.A, B, C, self.D, seq_idx, state)
        if cache is not None:
            cache.state.copy_(state)
        return y

    def enter(self, x: Tensor, norm: RMSNorm, step: DecodeStep) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B·T, d_model) in the mixer's own type, and in_proj's sections (B, T, ·) of norm(x), for decoding."""
        own = x.to(self.in_proj.weight.dtype)  # mixers may be float32 in a bfloat16 body
        projected = dispatch.norm_linear(
            own, norm.weight.to(own.dtype), norm.eps, self.in_proj.weight, self.in_proj.bias
        )
        return own, projected.view(step.batch, step.length, -1).split(self.sections, dim=-1)

    def leave(self, features: Tensor, own: Tensor, x: Tensor) -> Tensor:
        """x + out_proj(features (B, T, d_inner)), `own` being x as `enter` gave it."""
        return dispatch.linear_add(features.view(x.shape[0], -1), self.out_proj.weight, own).to(x.dtype)
