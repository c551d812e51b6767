"""A student as one GGUF file for llama.cpp, in the form that its converter gives a Bamba (`granitehybrid`).

Tensors are those of `hybrid.export.bamba` with llama.cpp's names and layouts: A instead of A_log, the norm by groups,
and q and k with the two halves of each head's rows interleaved, as its rotary positions want them. It takes no mixers
but those that are twice as wide as the model, so as many silent heads are added as there are: their rows are zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from torch import Tensor
from torch.nn.functional import pad

from hybrid.config import HybridConfig
from hybrid.export import bamba
from hybrid.export.errors import CannotExport, refuse
from hybrid.model import HybridForCausalLM

ARCHITECTURE = "granitehybrid"
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_ff_layernorm.weight": "ffn_norm.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm.weight": "ssm_norm.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.final_layernorm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}
"""llama.cpp's name of what a byte-level tokenizer splits text by before it joins bytes."""


def check(config: HybridConfig) -> None:
    """Raises CannotExport with every reason against an export."""
    bamba.check(config)
    reasons = []
    if config.mamba_layers and config.proj_bias:
        reasons.append("the mixers' in_proj has a bias, which holds their gates open, and llama.cpp's has none")
    if config.mamba_layers and not config.conv_silu:
        reasons.append("the mixers have no SiLU after the convolution, llama.cpp's have")
    if reasons:
        reasons[-1] += ' (init_from_attention.method = "paper" makes students without a bias and with SiLU)'
    if config.attention_bias:
        reasons.append("its attention has biases, which this export does not write")
    if config.rope["rope_type"] == "llama3":
        reasons.append("its rotary frequencies are scaled as Llama 3.1's, and this architecture has no table for them")
    refuse("llama.cpp", reasons)


def write(config: HybridConfig, weights: Mapping[str, Tensor], folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write `out`, tensor by tensor; matrices as dtype, float32 or bfloat16, all else as float32.

    folder: of the student, for its tokenizer. Raises CannotExport for a tokenizer that is not byte-level BPE of a known
    kind.
    """
    writer = GGUFWriter(out, ARCHITECTURE)
    _add_parameters(writer, config, out.stem)
    _add_tokenizer(writer, config, folder)
    with torch.device("meta"):
        shapes = dict(HybridForCausalLM(config).named_parameters())
    for name, tensor in _tensors(config, shapes):
        is_low = _is_low(name, tensor, dtype)
        shape = [*tensor.shape[:-1], 2 * tensor.shape[-1]] if is_low else list(tensor.shape)
        writer.add_tensor_info(
            name,
            shape,
            np.dtype(np.uint8 if is_low else np.float32),
            tensor.numel() * (2 if is_low else 4),
            GGMLQuantizationType.BF16 if is_low else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(config, weights):
        is_low = _is_low(name, tensor, dtype)
        writer.write_tensor_data(
            tensor.bfloat16().contiguous().view(torch.uint8).numpy() if is_low else tensor.float().contiguous().numpy()
        )
    writer.close()


def _is_low(name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    is_matrix = tensor.ndim == 2 and "norm" not in name and "ssm_conv1d" not in name and not name.endswith(("_a", "_d"))
    return dtype == torch.bfloat16 and is_matrix


def _tensors(config: HybridConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    width, heads = config.d_inner, config.n_heads
    parts = {  # rows, by what gets silent heads behind it
        "ssm_in.weight": [width] * 4 + [heads],
        "ssm_conv1d.weight": [width] * 3,
        "ssm_conv1d.bias": [width] * 3,
        "ssm_norm.weight": [width],
        "ssm_dt.bias": [heads],
        "ssm_a": [heads],
        "ssm_d": [heads],
    }
    for name, tensor in bamba.bamba_weights(config, weights):
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            yield NAMES[name], tensor
            continue
        short = NAMES[layer[2]]
        if short in ("attn_q.weight", "attn_k.weight"):
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(tensor.shape)
        elif short in parts:
            tensor = torch.cat([pad(t, (0, 0) * (t.ndim - 1) + (0, len(t))) for t in tensor.split(parts[short])])
        if short == "ssm_a":
            tensor = -tensor.float().exp()[:, None]
        elif short == "ssm_d":
            tensor = tensor[:, None]
        elif short == "ssm_norm.weight":
            tensor = tensor.unflatten(0, (-1, config.head_dim))
        elif short == "ssm_conv1d.weight":
            tensor = tensor.squeeze(1)
        elif short == "ssm_out.weight":
            tensor = pad(tensor, (0, config.d_inner))
        yield f"blk.{layer[1]}.{short}", tensor


def _add_parameters(writer: GGUFWriter, config: HybridConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    kept = set(config.attention_layers)
    writer.add_head_count_kv([config.n_kv_heads if i in kept else 0 for i in range(config.n_layers)])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    if config.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope["factor"])
    writer.add_rope_scaling_finetuned(True)  # this architecture's switch for rotary positions
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(2 * config.d_inner)
    writer.add_ssm_state_size(config.head_dim)
    writer.add_ssm_group_count(2 * config.n_heads)
    writer.add_ssm_time_step_rank(2 * config.n_heads)


def _add_tokenizer(writer: GGUFWriter, config: HybridConfig, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    kind = splitting(tokenizer)
    words = {index: word for word, index in model["vocab"].items()}
    types = dict.fromkeys(words, TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        words[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    everything = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list([words.get(i, f"[unused {i}]") for i in everything])
    writer.add_token_types([types.get(i, TokenType.UNUSED) for i in everything])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(_adds_bos(tokenizer, config))
    if (template := folder / "chat_template.jinja").exists():
        writer.add_chat_template(template.read_text())


def splitting(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for a tokenizer.json's pre-tokenizer. Raises CannotExport where it is none of the known."""
    steps = tokenizer["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if tokenizer["model"]["type"] == "BPE" and not tokenizer["normalizer"]:
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (pattern := steps[0]["pattern"].get("Regex")) in SPLITS:
            return SPLITS[pattern]
    raise CannotExport(
        f"the tokenizer ({tokenizer['model']['type']} after {kinds}) is none of those that this export writes: "
        "byte-level BPE as SmolLM2, Llama 3 and Qwen2 have it"
    )


def _adds_bos(tokenizer: Mapping[str, Any], config: HybridConfig) -> bool:
    """Whether the post-processor puts the first token of a text there."""
    steps = tokenizer.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        special = [part["SpecialToken"]["id"] for part in step.get("single", []) if "SpecialToken" in part]
        ids = [i for word in special for i in step["special_tokens"][word]["ids"]]
        if config.bos_token_id in ids[:1]:
            return True
    return False
