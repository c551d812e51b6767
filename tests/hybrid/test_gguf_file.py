"""Teachers out of GGUF files, as llama.cpp's converter lays them out, against the models they were written of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid import HybridConfig, HybridForCausalLM, UnsupportedModel
from hybrid.families import settings
from hybrid.families.gguf_file import GGUFFile
from tests.hybrid import gguf_writing, tiny_hybrid

SHAPE: dict[str, Any] = {
    "vocab_size": tiny_hybrid.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": False},
    "Llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "SmolLM3": {"model_type": "smollm3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def theirs(**changes: Any) -> Any:
    """With weights that bfloat16 holds, so that reading them rounds nothing."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.3)
            p.copy_(p.bfloat16())
    return made


def read(path: Path) -> HybridForCausalLM:
    file = GGUFFile(path)
    model = HybridForCausalLM(HybridConfig(**settings(file.config())))
    model.load_state_dict({name: weight.float() for name, weight in file.weights()})
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_it_was_written_of(case, tmp_path):
    model = theirs(**CASES[case])
    ours = read(gguf_writing.save(tmp_path / "x.gguf", model))
    text = tiny_hybrid.tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(text), model(text).logits, rtol=1e-4, atol=1e-4)


def test_a_window_in_the_file_is_kept(tmp_path):
    model = theirs(model_type="mistral", sliding_window=5)
    ours = read(gguf_writing.save(tmp_path / "x.gguf", model, **{"attention.sliding_window": 5}))
    assert (ours.config.family, ours.config.sliding_window) == ("mistral", 5)
    text = tiny_hybrid.tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(text), model(text).logits, rtol=1e-4, atol=1e-4)


def test_numbers_are_the_shortest_that_float32_holds(tmp_path):
    config = GGUFFile(gguf_writing.save(tmp_path / "x.gguf", theirs(model_type="llama", rms_norm_eps=1e-5))).config()
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope.scaling.type": "yarn"}, "rope_type 'yarn'"),
        ({"expert_count": 8}, "a mixture of 8 experts"),
        ({"rope.dimension_count": 4}, "rope.dimension_count 4 beside heads of 8"),
        ({"embedding_length": None}, "does not say llama.embedding_length"),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields, named, tmp_path):
    path = gguf_writing.save(tmp_path / "x.gguf", theirs(model_type="llama"), **fields)
    with pytest.raises(ValueError, match=named):
        settings(GGUFFile(path).config())


def test_factors_of_other_rotary_positions_are_refused(tmp_path):
    model = theirs(model_type="llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 4096})
    with pytest.raises(UnsupportedModel, match="frequency factors in rope_freqs.weight, 1 to 8, are not those of"):
        GGUFFile(gguf_writing.save(tmp_path / "x.gguf", model)).config()


def test_another_architecture_is_refused_by_name(tmp_path):
    path = gguf_writing.save(tmp_path / "x.gguf", theirs(model_type="llama"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(
        UnsupportedModel, match="'gemma' is not supported; supported: 'llama', 'qwen2', 'qwen3', 'smollm3'"
    ):
        GGUFFile(path)
