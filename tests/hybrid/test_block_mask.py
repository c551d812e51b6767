from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention

from hybrid import block_mask
from tests.hybrid import tiny_hybrid

SEQ_IDX = torch.tensor([[0] * 100 + [1] * 156, [0] * 5 + [1] * 40 + [2] * 211], dtype=torch.int32)


@pytest.mark.parametrize("sliding_window", [None, 1, 33, 150])
def test_blocks_show_what_the_dense_mask_does(sliding_window, monkeypatch):
    monkeypatch.setattr(block_mask, "_create_block_mask", create_block_mask)  # compiled, it takes half a minute
    mask = block_mask.document_block_mask(SEQ_IDX, sliding_window)
    model = tiny_hybrid.model(sliding_window=sliding_window)
    dense = model._mask(SEQ_IDX, SEQ_IDX)
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, 256, 256, device="cpu"), dense)
    q, k, v = torch.randn(3, 2, 4, 256, 16, generator=torch.Generator().manual_seed(0))
    ours = block_mask.attention(q, k, v, mask)
    torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v, attn_mask=dense), rtol=1e-4, atol=1e-5)
