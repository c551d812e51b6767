"""Shapes by name, and random weights for them: what can be timed without a checkpoint."""

from __future__ import annotations

import math

import torch

from hybrid.attention import rope_frequencies
from hybrid.checkpoint import FLOAT32
from hybrid.config import HybridConfig
from hybrid.layers import attention_layers
from hybrid.model import HybridForCausalLM

SHAPES = {
    # Llama-3-8B with a quarter of its attention kept, the paper's (2408.15237).
    "8b": HybridConfig(
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_position_embeddings=8192,
        rope={"rope_type": "default", "rope_theta": 500000.0},
        attention_layers=attention_layers("1/4", 32),
    ),
    # SmolLM2-135M, as it is: all attention.
    "smollm2": HybridConfig(
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rope={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attention_layers=attention_layers("1", 30),
    ),
    # Llama-3.2-1B, as it is.
    "1b": HybridConfig(
        vocab_size=128256,
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        max_position_embeddings=131072,
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        attention_layers=attention_layers("1", 16),
    ),
    "tiny": HybridConfig(
        vocab_size=256,
        d_model=64,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=512,
        attention_layers=attention_layers("1/4", 4),
    ),
    "tiny-llama": HybridConfig(
        vocab_size=256,
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_layers=attention_layers("1", 2),
    ),
}


def shape(name: str) -> HybridConfig:
    """The shape of that name; ValueError names the known ones."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def draft_of(config: HybridConfig) -> HybridConfig:
    """The shape of a draft of the first and the last layer (2408.15237 §5.3 takes [0, 31])."""
    return config.of_layers((0, config.n_layers - 1))


def random_model(config: HybridConfig, device: str, dtype: torch.dtype, seed: int = 0) -> HybridForCausalLM:
    """Weights drawn on the device in their own type, so that 8 billion of them take no time; A_log, dt_bias and D are
    float32.

    Every projection keeps the size of its input; those that end on the residual stream are smaller by √(2·layers), and
    the stream starts at size 1 unless the embedding is the head too, so that rounding is not amplified from layer to
    layer and logits of different kernels can be compared. Steps and decays are those that Mamba starts with (2312.00752
    §3.6).
    """
    random = torch.Generator(device=device).manual_seed(seed)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    weights = {}
    for name, parameter in model.named_parameters():
        kind = torch.float32 if name.endswith(FLOAT32) else dtype
        weights[name] = weight = torch.empty(parameter.shape, device=device, dtype=kind)
        if name.endswith("A_log"):
            weight.uniform_(0.0, math.log(16.0), generator=random)
        elif name.endswith("dt_bias"):
            weight.uniform_(-7.0, -2.0, generator=random)  # softplus of it lies between 0.001 and 0.13
        elif name.endswith(".bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        elif "embed_tokens" in name and not config.tie_word_embeddings:
            weight.normal_(generator=random)
        else:
            ends_on_stream = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            shrink = 2 * config.n_layers if ends_on_stream else 1
            weight.normal_(std=(weight.shape[-1] * shrink) ** -0.5, generator=random)
    model.load_state_dict(weights, assign=True)
    model.inv_freq = rope_frequencies(config).to(device)
    return model.requires_grad_(False).eval()
