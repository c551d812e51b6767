"""Grouped-query attention with rotary positions, as transformers computes it for the families of teachers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hybrid.cache import KVCache
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep, joined
from hybrid.rms_norm import RMSNorm
from kernels_ext import dispatch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask | None
    """(B, 1, L, S) bool, True = visible; the same by blocks of 128 × 128, for compiled code alone; None: causal."""


def rope_frequencies(config: HybridConfig, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies (head_dim / 2,) for the `default`, `linear` and `llama3` types of transformers, computed on
    the device, which nothing is copied to."""
    rope = config.rope
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inv_freq = 1.0 / (rope["rope_theta"] ** half)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        wavelength = 2 * math.pi / inv_freq
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        blended = (1 - smooth) * inv_freq / rope["factor"] + smooth * inv_freq
        scaled = torch.where(wavelength > low, inv_freq / rope["factor"], inv_freq)
        return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)
    return inv_freq


def rope_tables(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, L, head_dim) for positions (B, L), computed in float32."""
    angles = positions[:, None, :, None].float() * inv_freq.to(positions.device)  # (B, 1, L, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def document_positions(seq_idx: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, L): distance from the start of the token's document."""
    index = torch.arange(length, device=device).expand(batch, -1)
    if seq_idx is None:
        return index
    is_start = torch.ones_like(seq_idx, dtype=torch.bool)
    is_start[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """q_proj, k_proj, v_proj, o_proj of one layer and, where the family has them, q_norm and k_norm; weights named as
    in transformers. is_rotary: whether queries and keys are rotated by position."""

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, config: HybridConfig, is_rotary: bool = True) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.sliding_window, self.is_rotary = config.sliding_window, is_rotary
        bias, kv_width = config.attention_bias, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_inner, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.o_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """hidden (B, L, d_model) → (B, L, d_model).

        With a cache, the new keys and values are written at `positions` (B, L) and, if there is a mask, S is its width
        and all S keys are read from the cache.
        """
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)  # (B, H, L, P)
        k = self.k_proj(hidden).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast norms give float32
        if self.is_rotary:
            cos, sin = (table.to(q.dtype) for table in rope)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is not None and not isinstance(mask, Tensor):
            from hybrid import block_mask

            out = block_mask.attention(q, k, v, mask)
            return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        if cache is not None:
            assert positions is not None
            cache.append(k, v, positions)
            if mask is not None:
                k, v = (t.to(q.dtype) for t in cache.first(mask.shape[-1]))
        if self.n_heads != self.n_kv_heads:
            ratio = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def decode(self, x: Tensor, norm: RMSNorm, cache: KVCache, step: DecodeStep) -> Tensor:
        """x + attention(norm(x)) for a window of tokens over the cache; x (B·T, d_model)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = joined(*(p.weight for p in projections))
        bias = None if self.q_proj.bias is None else joined(*(p.bias for p in projections))
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.eps}
        qkv = dispatch.norm_linear(x, norm.weight, norm.eps, weight, bias).view(step.batch, step.length, -1)
        q = dispatch.rope_append(
            qkv,
            cache.k,
            cache.v,
            *(step.rope if self.is_rotary else (None, None)),
            step.cursors.lengths,
            step.slots,
            self.n_heads,
            step.offset,
            **norms,
        )
        out = dispatch.decode_attention(
            q, cache.k, cache.v, step.cursors.lengths, step.slots, step.offset, sliding_window=self.sliding_window
        )
        return dispatch.linear_add(out.reshape(x.shape[0], -1), self.o_proj.weight, x)
