"""The same model in transformers: what this engine is compared with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hybrid.bench.timed import Spread
from hybrid.model import HybridForCausalLM


def transformers_twin(model: HybridForCausalLM) -> Any:
    """A LlamaForCausalLM (SDPA) with an all-attention model's weights. ValueError if the model has other mixers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = model.config
    if config.mamba_layers:
        raise ValueError(f"transformers has no model with the mixers of layers {list(config.mamba_layers)}")
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(model.device):
        twin = AutoModelForCausalLM.from_config(shape, dtype=model.dtype, attn_implementation="sdpa")
    twin.load_state_dict(model.state_dict(), strict=not config.tie_word_embeddings)
    return twin.requires_grad_(False).eval()


def generate_seconds(
    twin: Any, tokens: Tensor, new_tokens: int, repeats: int, **options: Any
) -> tuple[Spread, list[list[int]]]:
    """Seconds of `generate`, prompt included, and the replies of the last call. One call before warms up and compiles.

    tokens (B, L). options: of `generate`.
    """
    spans = []
    replies = tokens
    for _ in range(repeats + 1):
        began = _now(tokens.device)
        replies = twin.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            **options,
        )
        spans.append(_now(tokens.device) - began)
    return Spread.of(spans[1:]), replies[:, tokens.shape[1] :].tolist()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
