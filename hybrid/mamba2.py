"""Mamba-2 mixer with attention's grouping: C and dt by head, x and B by key-value group (2408.15237 §2, Algorithm
1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hybrid.cache import SSMCache
from hybrid.config import HybridConfig
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
        counts: Tensor | None = None,
    ) -> Tensor:
        """hidden (B, L, d_model) → (B, L, d_model)."""
        return self.out_proj(self.features(hidden, seq_idx, cache, counts)).to(hidden.dtype)

    def features(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None = None,
        cache: SSMCache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """What enters out_proj: (B, L, d_inner). With a cache, tokens at and after counts (B,) of a row leave no
        trace."""
        if not torch.is_autocast_enabled(hidden.device.type):  # a student may have float32 mixers in a bfloat16 body
            hidden = hidden.to(self.in_proj.weight.dtype)
        z, xBC, dt = self.in_proj(hidden).split(self.sections, dim=-1)
        dt = softplus(dt.float() + self.dt_bias)  # (B, L, H)
        conv_weight = self.conv1d.weight.squeeze(1)
        conv_state = None if cache is None else cache.conv
        convolved = dispatch.causal_conv(xBC, conv_weight, self.conv1d.bias, seq_idx, conv_state, self.config.conv_silu)
        if cache is None:
            y, _ = self._scan(convolved, dt, seq_idx, None)
            return self.norm(y.flatten(-2), z)

        assert counts is not None
        cache.base, base_conv = cache.state, cache.conv
        cache.window = (convolved, dt, torch.cat([base_conv, xBC.to(base_conv.dtype)], dim=1))
        if hidden.shape[1] == 1:
            x, B, C = self._split(convolved)
            live = (counts > 0)[:, None]
            y, cache.state = dispatch.ssd_step(
                x[:, 0], dt[:, 0] * live, -torch.exp(self.A_log), B[:, 0], C[:, 0], self.D, cache.base
            )
            y = y[:, None]
        else:
            y, cache.state = self._scan(convolved, dt * _live(dt, counts), None, cache.base)
        cache.conv = _conv_window(cache.window[2], counts, self.config.d_conv)
        return self.norm(y.flatten(-2), z)

    def replay(self, cache: SSMCache, keep: Tensor) -> None:
        """Set the state to what it was after the first `keep[b]` tokens of the last call: dt = 0 is the identity
        step."""
        assert cache.window is not None and cache.base is not None
        convolved, dt, inputs = cache.window
        _, cache.state = self._scan(convolved, dt * _live(dt, keep), None, cache.base)
        cache.conv = _conv_window(inputs, keep, self.config.d_conv)

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        x, B, C = convolved.split((config.d_xb, config.d_xb, config.d_inner), dim=-1)
        return (  # (B, L, G, P), (B, L, G, N), (B, L, H, N)
            x.unflatten(-1, (config.n_kv_heads, config.head_dim)),
            B.unflatten(-1, (config.n_kv_heads, config.head_dim)),
            C.unflatten(-1, (config.n_heads, config.head_dim)),
        )

    def _scan(
        self, convolved: Tensor, dt: Tensor, seq_idx: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, B, C = self._split(convolved)
        return dispatch.ssd(x.device.type)(x, dt, -torch.exp(self.A_log), B, C, self.D, seq_idx, state)


def _live(dt: Tensor, counts: Tensor) -> Tensor:
    """(B, L, 1) float mask of the first counts[b] tokens."""
    return (torch.arange(dt.shape[1], device=dt.device) < counts[:, None])[..., None].to(dt.dtype)


def _conv_window(inputs: Tensor, counts: Tensor, d_conv: int) -> Tensor:
    """The d_conv − 1 inputs before token counts[b] of row b; `inputs` begins with the d_conv − 1 before the call."""
    index = counts[:, None] + torch.arange(d_conv - 1, device=inputs.device)
    return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[-1]))
