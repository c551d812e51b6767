"""GGUF files as llama.cpp's converter writes them for the families of teachers, of transformers' tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType, TokenType
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Row 0 of a head, row P/2, row 1, row P/2 + 1, …"""
    out = []
    for head in rows.chunk(heads):
        first, second = head.chunk(2)
        for pair in zip(first, second, strict=True):
            out.extend(pair)
    return torch.stack(out)


def save(path: Path, model: Any, tokenizer: Path | None = None, **fields: Any) -> Path:
    """tokenizer: a folder with tokenizer.json. fields: further ones of the architecture's, by name; None leaves one
    out."""
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer = GGUFWriter(path, architecture)
    said: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": None if architecture.startswith("qwen") else head_dim,
        "attention.key_length": head_dim if architecture == "qwen3" else None,
        "attention.value_length": head_dim if architecture == "qwen3" else None,
        **fields,
    }
    for key, value in said.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        block = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        if architecture in ("llama", "smollm3") and NAMES[stem] in ("attn_q", "attn_k"):
            weight = interleaved(weight, heads if NAMES[stem] == "attn_q" else groups)
        writer.add_tensor(f"{block}{NAMES[stem]}.{suffix}", weight.float().numpy())
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, "qwen2" if architecture.startswith("qwen") else "llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, folder: Path, pre: str) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}
    special = {t["content"] for t in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
