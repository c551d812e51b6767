"""`HybridForCausalLM`: a Llama in which some layers mix tokens by Mamba instead of attention.

One class is trained, scored and decoded with. Weight names are those of transformers' Llama, and `mamba.*` where a
layer's attention was replaced, so a teacher's safetensors load as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from hybrid.attention import (
    Attention,
    document_positions,
    rope_frequencies,
    rope_tables,
)
from hybrid.cache import Cursors, HybridCache, KVCache, Span, SSMCache, cache_bytes
from hybrid.config import HybridConfig
from hybrid.decode import DecodeStep, joined
from hybrid.mamba1 import Mamba1Mixer
from hybrid.mamba2 import Mamba2Mixer
from hybrid.rms_norm import RMSNorm
from kernels_ext import dispatch

if TYPE_CHECKING:
    from hybrid.attention import Mask


class MLP(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    def decode(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)) for a few tokens (M, d_model)."""
        gate_up = joined(self.gate_proj.weight, self.up_proj.weight)
        return dispatch.linear_add(dispatch.norm_swiglu(x, norm.weight, norm.eps, gate_up), self.down_proj.weight, x)


MIXERS: dict[str, type[Mamba2Mixer] | type[Mamba1Mixer]] = {"mamba2": Mamba2Mixer, "mamba1": Mamba1Mixer}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is `self_attn` or `mamba`."""

    self_attn: Attention
    mamba: Mamba2Mixer | Mamba1Mixer

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.is_attention = layer in config.attention_layers
        if self.is_attention:
            self.self_attn = Attention(config, is_rotary=layer not in config.no_rope_layers)
        else:
            self.mamba = MIXERS[config.mixer](config.of_layer(layer))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        seq_idx: Tensor | None = None,
        state: KVCache | SSMCache | None = None,
        span: Span | None = None,
        positions: Tensor | None = None,
        tapped: bool = False,
    ) -> Any:
        """x (B, L, d_model) → (B, L, d_model); if tapped, also what the mixer took and gave, both (B, L, d_model)."""
        given = self.input_layernorm(x)
        if self.is_attention:
            mixed = self.self_attn(given, rope, mask, cast(KVCache | None, state), positions)
        else:
            mixed = self.mamba(given, seq_idx, cast(SSMCache | None, state), span)
        x = x + mixed
        x = x + self.mlp(self.post_attention_layernorm(x))
        return (x, given, mixed) if tapped else x


class Backbone(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)


class HybridForCausalLM(nn.Module):
    """The model; where its config says `reads_features`, a draft that reads features beside tokens.

    features (…, d_model) of a token: the residual stream after the last block, of the model that is drafted for, at the
    token before (Li et al., 2401.15077); zeros where there is none, or where nothing is known of it.
    """

    inv_freq: Tensor
    blocks_compiled = False
    """Set by `hybrid.compiled`."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.reads_features:
            self.feature_norm = RMSNorm(config.d_model, config.rms_norm_eps)
            self.feature_proj = nn.Linear(config.d_model, config.d_model, bias=False)
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
        start anew. With a cache, slot b appends counts[b] ≤ L tokens (all L if None) and keeps them; rows are
        right-padded, padding is inert. That is how prompts of any length are read; `decode` reads a few tokens, faster,
        and keeps none by itself.
        """
        return self.model.norm(self.residual(tokens, seq_idx, cache, counts))

    def residual(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None = None,
        cache: HybridCache | None = None,
        counts: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """What `hidden` is the norm of: the residual stream after the last block, (B, L, d_model).

        features (B, L, d_model): of a model that reads them, for each token.
        """
        batch, length = tokens.shape
        span: Span | None = None
        positions = document_positions(seq_idx, batch, length, tokens.device)
        mask = None if cache is not None else self._mask(seq_idx, tokens)
        if cache is not None:
            if seq_idx is not None:
                raise ValueError("packed rows (seq_idx) cannot be decoded with a cache: give each document its own row")
            if counts is None:
                counts = torch.full((batch,), length, device=tokens.device)
            self.fold(cache)
            span = Span(cache.cursors.lengths.long(), counts.long())
            mask, positions = _cached_mask(cache, span, length, self.config.sliding_window)
        x = self._embedded(tokens)
        if features is not None:
            x = x + self.feature_proj(self.feature_norm(features)).to(x.dtype)
        rope = rope_tables(self.inv_freq, positions, x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, rope, mask, seq_idx, None if cache is None else cache.layers[index], span, positions)
        if cache is not None and span is not None:
            cache.fresh = False
            for cursor in (cache.cursors.lengths, cache.cursors.folded):
                cursor.copy_(span.start + span.counts)
        return x

    def mixing(
        self, tokens: Tensor, seq_idx: Tensor | None, layers: Collection[int]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """layer → (normed input of its mixer, the mixer's output), both (B, L, d_model); arguments as `hidden`.

        Blocks behind the last of `layers` are not run.
        """
        batch, length = tokens.shape
        positions = document_positions(seq_idx, batch, length, tokens.device)
        mask, x = self._mask(seq_idx, tokens), self._embedded(tokens)
        rope = rope_tables(self.inv_freq, positions, x.dtype)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(self.blocks[: max(layers, default=-1) + 1]):
            if index in layers:
                x, *seen[index] = block(x, rope, mask, seq_idx, tapped=True)
            else:
                x = block(x, rope, mask, seq_idx)
        return seen

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(B, L, d_model); under autocast the residual stream has its type, as it has where the model decodes."""
        x = embedding(tokens, self.model.embed_tokens.weight)
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _mask(self, seq_idx: Tensor | None, tokens: Tensor) -> Mask:
        """Causal within documents and the sliding window; None (plain causal) for unpacked rows that the window holds
        whole. Compiled blocks take it by blocks, others as (B, 1, L, L)."""
        window, length = self.config.sliding_window, tokens.shape[1]
        if window is not None and window >= length:
            window = None
        if seq_idx is None:
            if window is None:
                return None
            seq_idx = torch.zeros_like(tokens)
        if self.blocks_compiled:
            from hybrid import block_mask

            return block_mask.document_block_mask(seq_idx, window)
        same = seq_idx[:, None, :, None] == seq_idx[:, None, None, :]
        visible = torch.ones_like(same[0, 0]).tril()
        return same & (visible if window is None else visible.triu(1 - window))

    def decode(
        self,
        tokens: Tensor,
        cache: HybridCache,
        slots: Tensor,
        offset: int = 0,
        logits_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Logits (B·T, V) for a window of T tokens per row over the cache, none of which is kept.

        tokens (B, T); slots (B,) int32: the cache's slot of each row, −1 for rows that are to be inert, whose logits
        mean nothing. offset: tokens of the same round that were read before. Nothing waits for the device. A cache of
        window 1 takes its token into the SSM states at once. logits_dtype: float32 keeps greedy decoding from ties that
        are none. Raises ValueError if the window is longer than the cache's.
        """
        return self.logits(self.read(tokens, cache, slots, offset), logits_dtype)

    def logits(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits (M, V) of M rows of what `read` gives."""
        norm = self.model.norm
        return dispatch.norm_linear(x, norm.weight, norm.eps, self.lm_head_weight, out_dtype=dtype)

    def read(
        self, tokens: Tensor, cache: HybridCache, slots: Tensor, offset: int = 0, features: Tensor | None = None
    ) -> Tensor:
        """What `decode` makes logits of: the residual stream (B·T, d_model) after the last block.

        features (B·T, d_model): of a model that reads them, for each token.
        """
        batch, length = tokens.shape
        if offset + length > cache.window:
            raise ValueError(
                f"{offset + length} tokens in one round, but the cache was made for a window of {cache.window}: "
                "raise `window` (K + 1)"
            )
        step = DecodeStep(batch, length, slots, cache.cursors, cache.window, offset, cache.rope)
        x = embedding(tokens, self.model.embed_tokens.weight).view(batch * length, -1)
        if features is not None:
            norm = self.feature_norm
            projected = dispatch.norm_linear(features, norm.weight, norm.eps, self.feature_proj.weight)
            x = x + projected.to(x.dtype)
        for layer, state in zip(self.blocks, cache.layers, strict=True):
            mixer: Any = layer.self_attn if layer.is_attention else layer.mamba
            x = mixer.decode(x, layer.input_layernorm, state, step)
            x = layer.mlp.decode(x, layer.post_attention_layernorm)
        return x

    def fold(self, cache: HybridCache) -> None:
        """Bring the SSM states of a cache up to its lengths, so that text of any length can be appended."""
        if cache.fresh or cache.window == 1:
            return
        slots = torch.arange(cache.slots, dtype=torch.int32, device=cache.cursors.lengths.device)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            if isinstance(layer, SSMCache):
                block.mamba.fold(layer, cache.cursors, slots)
        cache.cursors.folded.copy_(cache.cursors.lengths)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Replies to prompts; see `hybrid.generate.generate` for the options."""
        from hybrid.generate import generate

        return generate(self, prompts, max_new_tokens, **options)

    def new_cache(
        self,
        batch: int,
        max_length: int,
        *,
        window: int = 1,
        ring: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        cursors: Cursors | None = None,
    ) -> HybridCache:
        """Empty state for `batch` rows; see `HybridCache`."""
        cache = HybridCache(
            self.config,
            batch,
            max_length,
            self.device,
            self.dtype,
            mixer_dtype=next((b.mamba.in_proj.weight.dtype for b in self.blocks if not b.is_attention), None),
            window=window,
            ring=ring,
            state_dtype=state_dtype,
            cursors=cursors,
        )
        positions = torch.arange(max_length, device=self.device)[:, None].float()
        angles = positions * self.inv_freq.to(self.device)
        cache.rope = (angles.cos(), angles.sin())
        cache.reset(self)
        return cache

    def cache_bytes(self, batch: int, context: int) -> dict[str, int]:
        """Bytes of decoding state by kind for this model's data type."""
        return cache_bytes(self.config, batch, context, self.dtype.itemsize)


def _cached_mask(cache: HybridCache, span: Span, length: int, window: int | None) -> tuple[Tensor | None, Tensor]:
    """Mask (B, 1, L, S) and positions (B, L) for `length` new tokens per row; no mask if they are the first ones and
    the sliding window holds them all."""
    positions = span.start[:, None] + torch.arange(length, device=span.start.device)  # (B, L)
    width = length if cache.fresh else int(positions.max()) + 1
    if width > cache.max_length:
        raise ValueError(f"cache of {cache.max_length} tokens is full: {width} wanted; raise max_length")
    if cache.fresh and (window is None or window >= length):
        return None, positions
    keys = torch.arange(width, device=positions.device)
    visible = keys <= positions[..., None]  # (B, L, S)
    if window is not None:
        visible &= keys > positions[..., None] - window
    return visible[:, None], positions
