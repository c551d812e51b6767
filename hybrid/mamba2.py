"""Mamba-2 mixer with attention's grouping: C and dt by head, x and B by key-value group (2408.15237 §2, Algorithm
1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from hybrid.attention import document_positions, rope_frequencies
from hybrid.cache import Cursors, Span, SSMCache
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep
from hybrid.mixer import MambaMixer
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


class ScaledGate(nn.Module):
    """y · silu(z) · weight: unlike a norm it leaves small what is small, as a head's attention is that looks at the
    sink."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return (y.float() * silu(z.float()) * self.weight.float()).to(z.dtype)


class Mamba2Mixer(MambaMixer):
    """in_proj rows are z (d_features), x (d_xb), B (d_xb), C (d_inner), dt (n_heads), in the order of the paper's code.

    With config.mixer_window the scan's output stands beside that of softmax attention over the last tokens with the
    same C, B and x, and a gate of its own for each takes the place of the gated norm; `sink` (2, groups, head_dim) is
    the learned key and value that every token sees. A_log, dt_bias and D are float32 whatever the other weights are.
    """

    norm: GatedRMSNorm | ScaledGate

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, (config.d_features, config.conv_channels, config.n_heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(config.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(config.n_heads, dtype=torch.float32))
        if config.mixer_window:
            self.sink = nn.Parameter(torch.zeros(2, config.groups, config.head_dim))
            self.norm = ScaledGate(config.d_features)
        else:
            self.norm = GatedRMSNorm(config.d_inner, config.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.d_features, config.d_model, bias=False)

    def features(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        z, dt, x, B, C = self.inputs(hidden, seq_idx, cache, span)
        y = self.scan(dispatch.ssd(x.device.type), (x, dt, B, C), seq_idx, cache, span).flatten(-2)
        if self.config.mixer_window:
            attended = self._attended(x, B, C, seq_idx, cache, span).flatten(-2)
            return self.norm(torch.cat([y.to(attended.dtype), attended], dim=-1), z)
        return self.norm(y, z)

    def inputs(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        span: Span | None = None,
    ) -> tuple[Tensor, ...]:
        """z (B, L, d_features), dt (B, L, H), x (B, L, G, P), B (B, L, G, N), C (B, L, H, N) as the scan takes them."""
        z, xBC, dt = self.project(hidden)
        dt = softplus(dt.float() + self.dt_bias)
        x, B, C = self._split(self.convolve(xBC, seq_idx, cache, span))
        if self.config.mixer_rope:
            B, C = self._rotated(B, C, seq_idx, span)
        return z, dt, x, B, C

    def _attended(
        self, x: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None, cache: SSMCache | None, span: Span | None
    ) -> Tensor:
        """(B, L, H, P) of the last tokens; with a cache also of those that it holds, and then it holds these."""
        window, before = self.config.mixer_window, None
        if cache is not None and span is not None:
            assert cache.ring_x is not None and cache.ring_B is not None
            past = []
            for ring, new in ((cache.ring_B, B), (cache.ring_x, x)):
                kept = span.inputs_before(ring.flatten(2), window)
                span.keep_inputs(ring.flatten(2), torch.cat([kept, new.flatten(2).to(kept.dtype)], dim=1), window)
                past.append(kept.unflatten(2, new.shape[2:]))
            places = span.start[:, None] + torch.arange(-window, 0, device=x.device)
            before = (*past, places >= 0)
        return dispatch.window_attention(C, B, x, self.sink, window, seq_idx, before)

    def decode(self, x: Tensor, norm: RMSNorm, cache: SSMCache, step: DecodeStep) -> Tensor:
        """x + mixer(norm(x)) for a window of tokens over the cache; x (B·T, d_model)."""
        cursors = step.cursors
        own, (z, xBC, dt) = self.enter(x, norm, step)
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
            step.rope if self.config.mixer_rope else None,
            self.config.d_xb,
        )
        x_new, B, C = self._split(convolved)
        if step.window == 1:
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
        if not self.config.mixer_window:
            return self.leave(self.norm(y.reshape(step.batch, step.length, -1), z), own, x)
        features = dispatch.window_gate(
            y.view(step.batch, step.length, *y.shape[-2:]),
            C,
            z,
            self.norm.weight,
            self.sink,
            cache.ring_x,
            cache.ring_B,
            cursors.lengths,
            step.slots,
            self.config.mixer_window,
            step.offset,
        )
        return self.leave(features, own, x)

    def fold(self, cache: SSMCache, cursors: Cursors, slots: Tensor) -> None:
        """Write the tokens between `folded` and `lengths` into the state; the caller then moves `folded`."""
        dispatch.ssd_fold(
            cache.state, cache.ring_x, cache.ring_B, cache.ring_dt, cache.A, cursors.lengths, cursors.folded, slots
        )

    def _rotated(self, B: Tensor, C: Tensor, seq_idx: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        """B and C turned by the tokens' positions, as attention turns k and q; in float32, rounded once, which is what
        decoding's kernel does. The tables are made here, on the device: the mixer also runs without a model around it,
        and in CUDA graphs."""
        batch, length = B.shape[:2]
        if span is None:
            positions = document_positions(seq_idx, batch, length, B.device)
        else:
            positions = span.start[:, None] + torch.arange(length, device=B.device)
        angles = positions[..., None].float() * rope_frequencies(self.config, B.device)  # (B, L, N / 2)
        cos, sin = angles.cos(), angles.sin()
        return dispatch.rotate_heads(B, cos, sin), dispatch.rotate_heads(C, cos, sin)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        x, B, C = convolved.split((config.d_xb, config.d_xb, config.d_inner), dim=-1)
        return (  # (B, L, G, P), (B, L, G, N), (B, L, H, N)
            x.unflatten(-1, (config.groups, config.head_dim)),
            B.unflatten(-1, (config.groups, config.head_dim)),
            C.unflatten(-1, (config.n_heads, config.head_dim)),
        )
