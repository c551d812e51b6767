"""Folders of safetensors and config.json, in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hybrid.attention import rope_frequencies
from hybrid.config import HybridConfig
from hybrid.model import HybridForCausalLM

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
FLOAT32 = ("A_log", "dt_bias", "D")


def load_pretrained(folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None) -> HybridForCausalLM:
    """A teacher (transformers' Llama layout) or a student; weights keep the file's types unless `dtype` is given.

    A_log, dt_bias and D stay float32 in any case. Raises FileNotFoundError, UnsupportedModel or, where names or shapes
    do not fit, ValueError.
    """
    folder = Path(folder)
    config = HybridConfig.from_folder(folder)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    weights: dict[str, torch.Tensor] = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                weights[name] = _cast(name, file.get_tensor(name), dtype)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    expected = {name: p.shape for name, p in model.named_parameters()}
    missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or surplus:
        raise ValueError(f"{folder}: weights missing {sorted(missing)[:3]}, not expected {sorted(surplus)[:3]}")
    wrong = [
        f"{n} {tuple(weights[n].shape)} instead of {tuple(s)}" for n, s in expected.items() if weights[n].shape != s
    ]
    if wrong:
        raise ValueError(f"{folder}: weights of another shape than config.json says: {'; '.join(wrong[:3])}")
    model.load_state_dict(weights, assign=True)
    model.inv_freq = rope_frequencies(config).to(device)  # computed, not stored, and made on the meta device above
    return model.requires_grad_(False).eval()


def save_pretrained(model: HybridForCausalLM, folder: Path | str, tokenizer_from: Path | str | None = None) -> None:
    """config.json and model.safetensors, every tensor in the type it has; the tokenizer's files copied along."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n")
    tensors = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.exists():
                shutil.copyfile(source, folder / name)


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder}: no .safetensors file")
    return shards


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if name.endswith(FLOAT32):
        return tensor.float()
    return tensor if dtype is None else tensor.to(dtype)
