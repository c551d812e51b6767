"""Attention within the documents of packed rows, by blocks: for compiled code alone, and imported by it alone, since
the compiler's modules cost seconds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def document_block_mask(seq_idx: Tensor, sliding_window: int | None = None) -> BlockMask:
    """Causal within the documents of packed rows and the last `sliding_window` tokens; seq_idx (B, L)."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = (q >= kv) & (seq_idx[b, q] == seq_idx[b, kv])
        return seen if sliding_window is None else seen & (q - kv < sliding_window)

    batch, length = seq_idx.shape
    return _create_block_mask(visible, batch, None, length, length, device=seq_idx.device)


_create_block_mask = torch.compile(create_block_mask, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q·kᵀ/√P) v of what the mask shows; q (B, H, L, P), k and v (B, G, L, P), H a multiple of G."""
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
