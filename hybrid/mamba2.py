"""Mamba-2 mixer with attention's grouping: C and dt by head, x and B by key-value group (2408.15237 §2, Algorithm
1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hybrid.cache import Cursors, Span, SSMCache
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep
from hybrid.rms_norm import RMSNorm
from kernels_ext import dispatch


class GatedRMSNorm(nn.Module):
    """RMSNorm(y · silu(z)), head by head."""

    def __init__(self, channels: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.group_size, self.eps = group_size, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return dispatch.gated_rms_norm(y, z, self.weight, self.group_size, self.eps)


class Mamba2Mixer(nn.Module):
    """in_proj rows are z (d_inner), x (d_xb), B (d_xb), C (d_inner), dt (n_heads), in the order of the paper's code.

    A_log, dt_bias and D are float32 whatever the other weights are.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.sections = (config.d_inner, config.conv_channels, config.n_heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.sections), bias=config.proj_bias)
        self.conv1d = nn.Conv1d(
            config.conv_channels, config.conv_channels, config.d_conv, groups=config.conv_channels
        )  # holds weight (channels, 1, d_conv) and bias under mamba-ssm's names
        self.dt_bias = nn.Parameter(torch.zeros(config.n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(config.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(config.n_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(config.d_inner, config.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

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
        if not torch.is_autocast_enabled(hidden.device.type):  # a student may have float32 mixers in a bfloat16 body
            hidden = hidden.to(self.in_proj.weight.dtype)
        z, xBC, dt = self.in_proj(hidden).split(self.sections, dim=-1)
        dt = softplus(dt.float() + self.dt_bias)  # (B, L, H)
        before = None if cache is None or span is None else span.conv_inputs(cache.conv, self.config.d_conv)
        convolved = dispatch.causal_conv(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, before, self.config.conv_silu
        )
        x, B, C = self._split(convolved)
        state = None
        if cache is not None and span is not None:
            assert before is not None
            span.keep_conv_inputs(cache.conv, torch.cat([before, xBC.to(before.dtype)], dim=1), self.config.d_conv)
            dt, state = dt * span.live(dt.shape[1])[..., None], cache.state.float()
        y, state = dispatch.ssd(x.device.type)(x, dt, self.A, B, C, self.D, seq_idx, state)
        if cache is not None:
            cache.state.copy_(state)
        return self.norm(y.flatten(-2), z)

    @property
    def A(self) -> Tensor:
        """(H,) negative."""
        return -torch.exp(self.A_log)

    def decode(self, x: Tensor, norm: RMSNorm, cache: SSMCache, step: DecodeStep) -> Tensor:
        """x + mixer(norm(x)) for a window of tokens over the cache; x (B·T, d_model)."""
        cursors, own = step.cursors, x.to(self.in_proj.weight.dtype)  # mixers may be float32 in a bfloat16 body
        projected = dispatch.norm_linear(
            own, norm.weight.to(own.dtype), norm.eps, self.in_proj.weight, self.in_proj.bias
        )
        z, xBC, dt = projected.view(step.batch, step.length, -1).split(self.sections, dim=-1)
        convolved, dt = dispatch.conv_ring_update(
            xBC,
            cache.conv,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            cursors.lengths,
            step.slots,
            self.config.conv_silu,
            step.offset,
            dt,
            self.dt_bias,
            cache.ring_x,
            cache.ring_B,
            cache.ring_dt,
        )
        x_new, B, C = self._split(convolved)
        if cache.ring_x is None:
            y = dispatch.ssd_update(cache.state, x_new[:, 0], dt[:, 0], cache.A, B[:, 0], C[:, 0], self.D, step.slots)
        else:
            y = dispatch.ssd_verify(
                cache.state,
                cache.ring_x,
                cache.ring_B,
                cache.ring_dt,
                C,
                cache.A,
                self.D,
                cursors.lengths,
                cursors.folded,
                step.slots,
                step.window,
                step.offset,
            )
        gated = self.norm(y.reshape(step.batch, step.length, -1), z)
        return dispatch.linear_add(gated.view(x.shape[0], -1), self.out_proj.weight, own).to(x.dtype)

    def fold(self, cache: SSMCache, cursors: Cursors, slots: Tensor) -> None:
        """Write the tokens between `folded` and `lengths` into the state; the caller then moves `folded`."""
        dispatch.ssd_fold(
            cache.state, cache.ring_x, cache.ring_B, cache.ring_dt, cache.A, cursors.lengths, cursors.folded, slots
        )

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        x, B, C = convolved.split((config.d_xb, config.d_xb, config.d_inner), dim=-1)
        return (  # (B, L, G, P), (B, L, G, N), (B, L, H, N)
            x.unflatten(-1, (config.n_kv_heads, config.head_dim)),
            B.unflatten(-1, (config.n_kv_heads, config.head_dim)),
            C.unflatten(-1, (config.n_heads, config.head_dim)),
        )
