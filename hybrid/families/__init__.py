"""Families of teachers: which checkpoints are read; `python -m hybrid.families` prints the README's table.

A transformers configuration becomes the fields of `HybridConfig` here and nowhere else; what a family has and the
blocks do not compute is refused by name, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

MODEL_TYPE = "hybrid_mamba_llama"
ROPE_TYPES = ("default", "llama3", "linear")


class UnsupportedModel(ValueError):
    """A checkpoint of an architecture that is not implemented."""


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name. gguf: llama.cpp's. defaults: what transformers' configuration class takes where
    config.json says nothing, as far as it is not LlamaConfig's."""

    model_type: str
    gguf: str
    attention_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", gguf="llama"),
        Family("mistral", gguf="llama", defaults={"sliding_window": 4096}),
        Family(
            "qwen2",
            gguf="qwen2",
            attention_bias=True,
            defaults={"sliding_window": 4096, "max_window_layers": 28},
        ),
        Family(
            "qwen3",
            gguf="qwen3",
            qk_norm=True,
            defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        ),
        Family(
            "smollm3",
            gguf="smollm3",
            defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        ),
    )
}


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `HybridConfig` that is all attention, of a transformers configuration as config.json holds it.

    Raises UnsupportedModel for a family that is not listed, and for what a family can have but the blocks do not.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported: {', '.join(map(repr, FAMILIES))} and this "
            f"project's {MODEL_TYPE!r}"
        )
    raw = {**family.defaults, **raw}
    if raw.get("attention_bias"):
        raise UnsupportedModel(f"a {model_type} with attention_bias=true, which has a bias in o_proj, is not supported")
    if raw.get("mlp_bias"):
        raise UnsupportedModel(f"a {model_type} with mlp_bias=true is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {raw['hidden_act']!r} is not supported; supported: 'silu'")
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UnsupportedModel(
            f"weights quantized by {method!r} are not supported; name the checkpoint that they were made of, or a "
            "GGUF file"
        )
    eos = raw.get("eos_token_id")
    n_layers, n_heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // n_heads
    if head_dim & (head_dim - 1):
        raise UnsupportedModel(f"head_dim {head_dim} is not supported; the kernels of decoding need a power of two")
    return {
        "vocab_size": raw["vocab_size"],
        "d_model": raw["hidden_size"],
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": raw.get("num_key_value_heads") or n_heads,
        "head_dim": head_dim,
        "intermediate_size": raw["intermediate_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope": _rope(raw),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": raw.get("pad_token_id"),
        "attention_layers": tuple(range(n_layers)),
        "family": family.model_type,
        "attention_bias": family.attention_bias,
        "qk_norm": family.qk_norm,
        "sliding_window": _sliding_window(raw, n_layers),
        "no_rope_layers": _no_rope_layers(raw, n_layers),
    }


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModel(f"rope_type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor {partial} is not supported; supported: 1, whole heads")
    return rope


def _sliding_window(raw: Mapping[str, Any], n_layers: int) -> int | None:
    """The window of all layers. Mistral's is in all of them; the others have one where `use_sliding_window` says so,
    in the layers that `layer_types` names or, without it, in those from `max_window_layers` on."""
    window = raw.get("sliding_window")
    if raw["model_type"] == "llama" or window is None:
        return None
    if raw["model_type"] == "mistral":
        return window
    if not raw.get("use_sliding_window"):
        return None
    kinds = raw.get("layer_types")
    if kinds is not None:
        sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    elif raw["model_type"] == "smollm3":
        sliding = list(_no_rope_layers(raw, n_layers))
    else:
        sliding = list(range(raw["max_window_layers"], n_layers))
    if sliding and len(sliding) < n_layers:
        raise UnsupportedModel(
            f"a sliding window in {len(sliding)} of {n_layers} layers (use_sliding_window=true) is not supported; "
            "supported: in all of them or none"
        )
    return window if sliding else None


def _no_rope_layers(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """SmolLM3's list has 0 for a layer without rotary positions; without a list it is every 4th one or so."""
    if raw["model_type"] != "smollm3":
        return ()
    rotates = raw.get("no_rope_layers")
    if rotates is None:
        interval = raw["no_rope_layer_interval"]
        rotates = [(layer + 1) % interval for layer in range(n_layers)]
    return tuple(layer for layer in range(n_layers) if not rotates[layer])
