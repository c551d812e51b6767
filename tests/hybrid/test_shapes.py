from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid import HybridForCausalLM
from hybrid.shapes import SHAPES, draft_of, random_model, shape


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in HybridForCausalLM(SHAPES[name]).parameters())


def test_the_named_shapes_are_those_models() -> None:
    assert parameters("smollm2") == 134_515_008  # SmolLM2-135M's own count
    assert parameters("8b") == pytest.approx(8.44e9, rel=2e-3)  # 7.91 billion and the embedding
    assert len(shape("8b").attention_layers) == 8 and not shape("smollm2").mamba_layers


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'9b'.*8b, smollm2"):
        shape("9b")


def test_a_draft_has_the_first_and_the_last_layer() -> None:
    draft = draft_of(shape("8b"))
    assert draft.n_layers == 2 and draft.attention_layers == (1,)
    assert draft.vocab_size == shape("8b").vocab_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_keep_their_types_and_give_logits_of_size_one(dtype: torch.dtype) -> None:
    model = random_model(shape("tiny"), "cpu", dtype)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["A_log"] == kinds["dt_bias"] == kinds["D"] == torch.float32
    assert kinds["weight"] == kinds["bias"] == dtype
    with torch.no_grad():
        logits = model(torch.randint(256, (2, 20))).float()
    assert 0.5 < float(logits.std()) < 2.0


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (random_model(shape("tiny"), "cpu", torch.float32, seed) for seed in (3, 3, 4))
    assert torch.equal(first.lm_head_weight, again.lm_head_weight)
    assert not torch.equal(first.lm_head_weight, other.lm_head_weight)


def test_rounding_is_not_amplified_from_layer_to_layer() -> None:
    """What the bench's comparison of decode with forward rests on."""
    deep = replace(shape("tiny"), n_layers=32, attention_layers=tuple(range(3, 32, 4)))
    rounded = random_model(deep, "cpu", torch.bfloat16)
    exact = random_model(deep, "cpu", torch.float32)
    exact.load_state_dict({name: weight.float() for name, weight in rounded.state_dict().items()})
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = exact(tokens), rounded(tokens).float()
    assert float((found - expected).norm() / expected.norm()) < 4e-2
