from __future__ import annotations

import pytest
import torch

from hybrid.attention import Attention, rope_frequencies, rope_tables, rotate
from tests.hybrid import tiny_hybrid

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_those_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=16, rope_parameters=dict(ROPES[kind]))
    )
    ours = rope_frequencies(tiny_hybrid.config(head_dim=16, rope=ROPES[kind]))
    assert torch.equal(ours, theirs.inv_freq)
    positions = torch.tensor([[0, 1, 2, 200], [7, 8, 0, 1]])
    cos, sin = theirs(torch.zeros(1), positions)
    for a, b in zip(rope_tables(ours, positions, torch.float32), (cos, sin), strict=True):
        torch.testing.assert_close(a[:, 0], b, rtol=0, atol=1e-6)


def test_llama3_has_all_three_bands():
    """Otherwise the comparison above would not see the blend."""
    plain = rope_frequencies(tiny_hybrid.config(head_dim=16, rope=ROPES["default"]))
    ratio = plain / rope_frequencies(tiny_hybrid.config(head_dim=16, rope=ROPES["llama3"]))
    assert ((ratio > 1.01) & (ratio < 7.9)).any()
    assert torch.isclose(ratio, torch.tensor(1.0)).any()
    assert torch.isclose(ratio, torch.tensor(8.0)).any()


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    inv_freq = rope_frequencies(tiny_hybrid.config())
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> torch.Tensor:
        rotated = [rotate(x, *rope_tables(inv_freq, torch.tensor([[at]]), torch.float32)) for x, at in ((q, i), (k, j))]
        torch.testing.assert_close(rotated[0].norm(), q.norm())
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(12, 5), score(107, 100), rtol=1e-4, atol=1e-4)
    assert (score(12, 5) - score(12, 9)).abs() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (6, 1)])
def test_layer_is_that_of_transformers(heads, groups, masked):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    shape = LlamaConfig(hidden_size=48, num_attention_heads=heads, num_key_value_heads=groups, head_dim=8)
    shape._attn_implementation = "sdpa"
    torch.manual_seed(0)
    theirs = LlamaAttention(shape, 0).eval()
    config = tiny_hybrid.config(n_heads=heads, n_kv_heads=groups)
    ours = Attention(config)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 13, 48)
    positions = torch.arange(13).expand(2, -1)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 13, 13) < 0.6
        mask[..., 0] = True
    rope = rope_tables(rope_frequencies(config), positions, torch.float32)
    wanted, _ = theirs(hidden, LlamaRotaryEmbedding(shape)(hidden, positions), mask)
    torch.testing.assert_close(ours(hidden, rope, mask), wanted)
