"""Decoding state of a hybrid model, with roll-back row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid.config import HybridConfig

if TYPE_CHECKING:
    from hybrid.model import HybridForCausalLM


@dataclass
class KVCache:
    """Keys and values of one attention layer: (B, n_kv_heads, max_length, head_dim). Entries at and after a row's
    length are stale and never read, so rolling back needs no copy."""

    k: Tensor
    v: Tensor


@dataclass
class SSMCache:
    """State of one Mamba-2 layer.

    state: (B, H, P, N) float32 after all tokens so far; conv: (B, d_conv − 1, channels) last inputs of the convolution.
    base and window: the state before the last call and that call's inputs, from which any shorter prefix is replayed.
    """

    state: Tensor
    conv: Tensor
    base: Tensor | None = None
    window: tuple[Tensor, ...] | None = None


class HybridCache:
    """Keys and values for attention layers, recurrent state for Mamba layers, one length per row.

    A call of the model appends `counts[b]` tokens to row b; what is beyond is padding and leaves no trace. `rollback`
    forgets the last tokens of the last call, any number per row.
    """

    def __init__(
        self, config: HybridConfig, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.max_length = max_length
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.last_counts = torch.zeros(batch, dtype=torch.long, device=device)
        self.layers: list[KVCache | SSMCache] = []
        attention = set(config.attention_layers)
        for layer in range(config.n_layers):
            if layer in attention:
                shape = (batch, config.n_kv_heads, max_length, config.head_dim)
                self.layers.append(
                    KVCache(
                        torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
                    )
                )
            else:
                self.layers.append(
                    SSMCache(
                        torch.zeros(batch, config.n_heads, config.head_dim, config.head_dim, device=device),
                        torch.zeros(batch, config.d_conv - 1, config.conv_channels, device=device, dtype=dtype),
                    )
                )

    def advance(self, counts: Tensor) -> None:
        self.lengths = self.lengths + counts
        self.last_counts = counts

    def rollback(self, model: HybridForCausalLM, forget: Tensor) -> None:
        """Forget the last `forget[b]` tokens of row b; at most those of the last call (ValueError otherwise)."""
        if bool((forget > self.last_counts).any()) or bool((forget < 0).any()):
            raise ValueError(
                f"cannot forget {forget.tolist()} tokens: the last call appended {self.last_counts.tolist()}"
            )
        keep = self.last_counts - forget
        self.lengths = self.lengths - forget
        self.last_counts = keep
        for layer, state in zip(model.blocks, self.layers, strict=True):
            if isinstance(state, SSMCache):
                layer.mamba.replay(state, keep)


def cache_bytes(config: HybridConfig, batch: int, context: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes of decoding state by kind: keys and values grow with the context, the rest does not. SSM states are
    float32."""
    n_attention, n_mamba = len(config.attention_layers), len(config.mamba_layers)
    return {
        "kv": batch * n_attention * 2 * config.d_xb * context * itemsize,
        "ssm": batch * n_mamba * config.d_inner * config.head_dim * 4,
        "conv": batch * n_mamba * (config.d_conv - 1) * config.conv_channels * itemsize,
    }
