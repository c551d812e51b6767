"""`HybridForCausalLM`: a Llama in which some layers mix tokens by Mamba-2 instead of attention.

One class is trained, scored and decoded with. Weight names are those of transformers' Llama, and `mamba.*` where a
layer's attention was replaced, so a teacher's safetensors load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from hybrid.attention import Attention, rope_frequencies, rope_tables
from hybrid.cache import HybridCache, cache_bytes
from hybrid.config import HybridConfig
from hybrid.mamba2 import Mamba2Mixer


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is `self_attn` or `mamba`."""

    self_attn: Attention
    mamba: Mamba2Mixer

    def __init__(self, config: HybridConfig, is_attention: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = MLP(config)
        if is_attention:
            self.self_attn = Attention(config)
        else:
            self.mamba = Mamba2Mixer(config)
        self.is_attention = is_attention


class Backbone(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        attention = set(config.attention_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i in attention) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)


class HybridForCausalLM(nn.Module):
    inv_freq: Tensor

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    @property
    def blocks(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.model.layers)

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, d_model); the embedding itself where the teacher ties them."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None = None,
        cache: HybridCache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) for tokens (B, L); arguments as `hidden`."""
        return linear(self.hidden(tokens, seq_idx, cache, counts), self.lm_head_weight)

    def hidden(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None = None,
        cache: HybridCache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Output of the final norm, (B, L, d_model).

        seq_idx (B, L): document number of each token of a packed row; documents see nothing of each other and positions
        start anew. With a cache, row b appends counts[b] ≤ L tokens (all L if None); rows are right-padded, padding
        is inert.
        """
        batch, length = tokens.shape
        mask: Tensor | None
        slots: Tensor | None
        if cache is not None:
            if seq_idx is not None:
                raise ValueError("packed rows (seq_idx) cannot be decoded with a cache: give each document its own row")
            if counts is None:
                counts = torch.full((batch,), length, device=tokens.device)
            mask, slots, positions = _cached_positions(cache, length)
        else:
            mask, slots = _packed_mask(seq_idx), None
            positions = _positions(seq_idx, batch, length, tokens.device)
        x = embedding(tokens, self.model.embed_tokens.weight)
        rope = rope_tables(self.inv_freq, positions, x.dtype)
        for index, layer in enumerate(self.blocks):
            state = None if cache is None else cache.layers[index]
            normed = layer.input_layernorm(x)
            if layer.is_attention:
                x = x + layer.self_attn(normed, rope, mask, state, slots)
            else:
                x = x + layer.mamba(normed, seq_idx, state, counts)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        if cache is not None:
            assert counts is not None
            cache.advance(counts)
        return self.model.norm(x)

    def new_cache(self, batch: int, max_length: int) -> HybridCache:
        return HybridCache(self.config, batch, max_length, self.device, self.dtype)

    def cache_bytes(self, batch: int, context: int) -> dict[str, int]:
        """Bytes of decoding state by kind for this model's data type."""
        return cache_bytes(self.config, batch, context, self.dtype.itemsize)


def _positions(seq_idx: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, L): distance from the start of the token's document."""
    index = torch.arange(length, device=device).expand(batch, -1)
    if seq_idx is None:
        return index
    is_start = torch.ones_like(seq_idx, dtype=torch.bool)
    is_start[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def _packed_mask(seq_idx: Tensor | None) -> Tensor | None:
    """(B, 1, L, L) causal within documents; None (plain causal) for unpacked rows."""
    if seq_idx is None:
        return None
    same = seq_idx[:, None, :, None] == seq_idx[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def _cached_positions(cache: HybridCache, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (B, 1, L, S), slots and positions (B, L) for `length` new tokens per row."""
    positions = cache.lengths[:, None] + torch.arange(length, device=cache.lengths.device)  # (B, L)
    width = int(positions.max()) + 1
    if width > cache.max_length:
        raise ValueError(f"cache of {cache.max_length} tokens is full: {width} wanted; ask for a longer one")
    keys = torch.arange(width, device=positions.device)
    return (keys <= positions[..., None])[:, None], positions, positions
