"""Mamba-1 mixer with attention's grouping: C and dt by head, x and B by key-value group (2408.15237 §2, Algorithm 1;
2312.00752 §3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from hybrid.cache import Cursors, Span, SSMCache
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep
from hybrid.mixer import MambaMixer
from hybrid.rms_norm import RMSNorm
from kernels_ext import dispatch


class Mamba1Mixer(MambaMixer):
    """in_proj rows are z (d_inner), x (d_xb), B (d_xb), C (d_inner) and what dt_proj makes dt from (dt_rank).

    A_log (d_inner, N), dt_bias and D (d_inner,) are float32 whatever the other weights are. The convolution is of x
    alone, before the heads of a group share it, and the gate is y · silu(z) without a norm, as in the paper's code; how
    heads share x and B is `HybridConfig.gqa_mapping`.
    A and D start as in mamba-ssm: A = −1 … −N in every channel, dt log-uniform in [1e-3, 0.1] at a zero input.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, (config.d_inner, config.d_xb, config.d_xb, config.d_inner, config.dt_size))
        self.dt_proj = nn.Linear(config.dt_size, config.d_inner, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(config.dt_size**-0.5), config.dt_size**-0.5)
        dt = torch.empty(config.d_inner, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        A = torch.arange(1, config.state_size + 1, dtype=torch.float32).repeat(config.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(config.d_inner, dtype=torch.float32))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def features(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        z, x, B, C, dt = self.project(hidden)
        x, B = self._shared(x), self._shared(B)
        dt = softplus(self.dt_proj(dt).float() + self.dt_bias)  # (B, L, D)
        x, B, C = self._split(self.convolve(x, seq_idx, cache, span), B, C)
        y = self.scan(dispatch.selective_scan(x.device.type), (x, dt, B, C), seq_idx, cache, span)
        return y.flatten(-2) * silu(z)

    def decode(self, x: Tensor, norm: RMSNorm, cache: SSMCache, step: DecodeStep) -> Tensor:
        """x + mixer(norm(x)) for a window of tokens over the cache; x (B·T, d_model)."""
        cursors = step.cursors
        own, (z, x_in, B, C, dt) = self.enter(x, norm, step)
        x_in, B = self._shared(x_in), self._shared(B)
        dt = softplus(linear(dt, self.dt_proj.weight).float() + self.dt_bias)  # (B, T, D)
        convolved, _ = dispatch.conv_ring_update(
            x_in,
            cache.conv,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            cursors.lengths,
            step.slots,
            self.config.conv_silu,
            step.offset,
        )
        x_new, B, C = self._split(convolved, B, C)
        if cache.ring_x is None:
            y = dispatch.selective_update(
                cache.state, x_new[:, 0], dt[:, 0], cache.A, B[:, 0], C[:, 0], self.D, step.slots
            )
        else:
            assert cache.ring_B is not None and cache.ring_dt is not None
            dispatch.selective_ring_append(
                x_new, B, dt, cache.ring_x, cache.ring_B, cache.ring_dt, cursors.lengths, step.slots, step.offset
            )
            y = dispatch.selective_verify(
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
        gated = y.reshape(step.batch, step.length, -1) * silu(z)
        return self.leave(gated, own, x)

    def fold(self, cache: SSMCache, cursors: Cursors, slots: Tensor) -> None:
        """Write the tokens between `folded` and `lengths` into the state; the caller then moves `folded`."""
        dispatch.selective_fold(
            cache.state, cache.ring_x, cache.ring_B, cache.ring_dt, cache.A, cursors.lengths, cursors.folded, slots
        )

    def _shared(self, projected: Tensor) -> Tensor:
        """x or B (B, L, d_xb) as the scan's groups have it, (B, L, scan_groups·P): the same but under `legacy`."""
        ratio = self.config.scan_groups // self.config.groups
        pieces = projected.unflatten(-1, (-1, self.config.state_size))
        return projected if ratio == 1 else pieces.repeat_interleave(ratio, dim=-2).flatten(-2)

    def _split(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, G, P), (B, L, G, J, N), (B, L, H, J, N): by group or head, B and C by pieces of N of its channels."""
        config = self.config
        pieces = (config.head_dim // config.state_size, config.state_size)
        return (
            x.unflatten(-1, (config.scan_groups, config.head_dim)),
            B.unflatten(-1, (config.scan_groups, *pieces)),
            C.unflatten(-1, (config.n_heads, *pieces)),
        )
