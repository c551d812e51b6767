"""A teacher out of a GGUF file: its configuration as config.json would hold it, and its weights by transformers' names.

Read here and not by transformers, whose own reading leaves out what a file says of rotary positions (Llama 3.1's
factors, linear scaling), the width of Qwen3's heads and all of SmolLM3. What llama.cpp's converter does to these
families: names are its own, and the q and k rows of Llama, Mistral and SmolLM3 have the two halves of each head
interleaved, since it rotates neighbouring numbers; Qwen's do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from hybrid.attention import rope_frequencies
from hybrid.config import HybridConfig
from hybrid.families import FAMILIES, UnsupportedModel

INTERLEAVED = ("llama", "smollm3")
"""Architectures of whose q and k the halves of a head are interleaved; Mistral's files say llama."""
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1, 3.2 and 3.3. A file has only the factors that come of them, (P / 2,), and the largest is `factor`."""


class GGUFFile:
    """Raises ValueError where the file is no GGUF file or a damaged one, UnsupportedModel for another architecture."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self._get("general.architecture", "nameless")
        known = sorted({family.gguf for family in FAMILIES.values()})
        if self.architecture not in known:
            raise UnsupportedModel(
                f"GGUF architecture {self.architecture!r} is not supported; supported: {', '.join(map(repr, known))}"
            )
        if (parts := self._get("split.count", 1)) > 1:
            raise UnsupportedModel(
                f"a GGUF file in {parts} parts is not supported: join them (llama-gguf-split --merge)"
            )
        if experts := self._own("expert_count", 0):
            raise UnsupportedModel(f"a mixture of {experts} experts is not supported")

    @property
    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name of how text is split before bytes are joined; None for SentencePiece, which splits none."""
        return self._get("tokenizer.ggml.pre", "default") if self._get("tokenizer.ggml.model") == "gpt2" else None

    def config(self) -> dict[str, Any]:
        """As transformers' config.json; raises UnsupportedModel for rotary positions that no family here has."""
        heads, width = self._own("attention.head_count"), self._own("embedding_length")
        head_dim = self._own("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._own(key, head_dim) != head_dim:
                raise UnsupportedModel(f"{key} {self._own(key)} beside heads of {head_dim} is not supported")
        raw: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]),
            "hidden_size": width,
            "intermediate_size": self._own("feed_forward_length"),
            "num_hidden_layers": self._own("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._own("context_length"),
            "rms_norm_eps": self._own("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_type": "default", "rope_theta": self._own("rope.freq_base", 10000.0)},
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id", None),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id", None),
        }
        if window := self._own("attention.sliding_window", 0):
            if self.architecture != "llama":
                raise UnsupportedModel(f"a {self.architecture} GGUF file with a sliding window is not supported")
            raw |= {"model_type": "mistral", "sliding_window": window}
        scaling = self._own("rope.scaling.type", "none")
        if scaling != "none":
            raw["rope_parameters"] |= {"rope_type": scaling, "factor": self._own("rope.scaling.factor", 1.0)}
        if ROPE_FACTORS in self.tensors:
            raw["rope_parameters"] = self._llama3(raw)
        return raw

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bfloat16 tensor) of every weight, one at a time. Raises ValueError for a name that is not known."""
        heads = self._own("attention.head_count")
        groups = {"attn_q": heads, "attn_k": self._own("attention.head_count_kv", heads)}
        for tensor in self.reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            *block, kind, suffix = tensor.name.split(".")
            prefix = f"model.layers.{block[1]}." if len(block) == 2 and block[0] == "blk" else ""
            name = (BLOCK_NAMES if prefix else NAMES).get(kind)
            if name is None or suffix not in ("weight", "bias"):
                raise ValueError(f"the weight {tensor.name} has no place in a {self.architecture}")
            values = dequantize(tensor.data, tensor.tensor_type)
            if kind in groups and self.architecture in INTERLEAVED:
                halves = values.reshape(groups[kind], -1, 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            yield f"{prefix}{name}.{suffix}", torch.from_numpy(np.require(values, requirements=["C", "W"])).bfloat16()

    def _llama3(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The rotary positions that the file's factors come of; they must come of them to rounding."""
        tensor = self.tensors[ROPE_FACTORS]
        factors = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
        plain = raw["rope_parameters"]
        scaled = plain | LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
        config = HybridConfig.from_dict(raw | {"rope_parameters": scaled})
        wanted = rope_frequencies(replace(config, rope=plain)) / rope_frequencies(config)
        if plain["rope_type"] != "default" or factors.shape != wanted.shape or not torch.allclose(factors, wanted):
            raise UnsupportedModel(
                f"the frequency factors in {ROPE_FACTORS}, {factors.min():g} to {factors.max():g}, are not those of "
                f"Llama 3.1's rotary positions with {LLAMA3}; name the checkpoint that the file was made of"
            )
        return scaled

    def _own(self, key: str, *default: Any) -> Any:
        return self._get(f"{self.architecture}.{key}", *default)

    def _get(self, key: str, *default: Any) -> Any:
        """A field's value, or the default; ValueError where neither is."""
        field = self.reader.get_field(key)
        if field is None:
            if not default:
                raise ValueError(f"the file does not say {key}")
            return default[0]
        value = field.contents()
        if isinstance(value, float):  # float32 in the file: the shortest number that it is, as config.json would say
            return float(str(np.float32(value)))
        return value
