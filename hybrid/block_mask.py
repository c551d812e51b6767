"""Attention within the documents of packed rows, by blocks: for compiled code alone, and imported by it alone, since
the compiler's modules cost seconds."""

from __future__ import annotations

from typing import Any

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


TILES: dict[str, int] = {
    **{"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
    **{"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32},
    **{"bwd_num_warps": 4, "bwd_num_stages": 3},
}
"""For heads of 64 on an H200, where the compiler's own choice takes a tenth more for documents of some 250 tokens."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q·kᵀ/√P) v of what the mask shows; q (B, H, L, P), k and v (B, G, L, P), H a multiple of G."""
    tiles: Any = TILES if q.shape[3] == 64 and q.shape[2] >= 128 else None
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=tiles)
