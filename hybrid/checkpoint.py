"""Folders of safetensors and config.json, in and out, and never more than one tensor or shard beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid.attention import rope_frequencies
from hybrid.config import MODEL_TYPE, HybridConfig
from hybrid.model import HybridForCausalLM

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
FLOAT32 = ("A_log", "dt_bias", "D")
SHARD_BYTES = 2**30
"""Weights in one file: what saving holds besides the model where the model itself is elsewhere, as on a GPU."""

CODE = tuple(f"{kind}_{MODEL_TYPE}" for kind in ("configuration", "modeling"))
"""Modules of `hybrid.hf` that a folder carries, so that transformers reads it without this project."""
AUTO = {
    "architectures": ["HybridLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": f"{CODE[0]}.HybridLlamaConfig",
        "AutoModel": f"{CODE[1]}.HybridLlamaModel",
        "AutoModelForCausalLM": f"{CODE[1]}.HybridLlamaForCausalLM",
    },
}


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors by name, each read from its file when it is asked for."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self._shard: dict[str, Path] = {}
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"{folder}: no .safetensors file")
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                self._shard |= dict.fromkeys(file.keys(), shard)

    def __getitem__(self, name: str) -> Tensor:
        # A file that stays open keeps all its pages that were read in memory.
        with safe_open(self._shard[name], framework="pt", device=self.device) as file:
            return file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        with safe_open(self._shard[name], framework="pt") as file:
            return file.get_slice(name)[:0].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)


def load_pretrained(folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None) -> HybridForCausalLM:
    """A teacher (transformers' Llama layout) or a student; weights keep the file's types unless `dtype` is given.

    A_log, dt_bias and D stay float32 in any case. Raises FileNotFoundError, UnsupportedModel or, where names or shapes
    do not fit, ValueError.
    """
    folder = Path(folder)
    config = HybridConfig.from_folder(folder)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    files = Weights(folder, device)
    found = set(files) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    expected = {name: p.shape for name, p in model.named_parameters()}
    missing, surplus = expected.keys() - found, found - expected.keys()
    if missing or surplus:
        raise ValueError(f"{folder}: weights missing {sorted(missing)[:3]}, not expected {sorted(surplus)[:3]}")
    weights = {name: _cast(name, files[name], dtype) for name in expected}
    wrong = [
        f"{n} {tuple(weights[n].shape)} instead of {tuple(s)}" for n, s in expected.items() if weights[n].shape != s
    ]
    if wrong:
        raise ValueError(f"{folder}: weights of another shape than config.json says: {'; '.join(wrong[:3])}")
    model.load_state_dict(weights, assign=True)
    model.inv_freq = rope_frequencies(config).to(device)  # computed, not stored, and made on the meta device above
    return model.requires_grad_(False).eval()


def save_pretrained(model: HybridForCausalLM, folder: Path | str, tokenizer_from: Path | str | None = None) -> None:
    """A folder that `load_pretrained` and, with its `trust_remote_code`, transformers read.

    config.json, weights in files of at most `SHARD_BYTES`, every tensor in the type it has, transformers' code for the
    model, and the tokenizer's files copied along.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    types = [p.dtype for name, p in model.named_parameters() if not name.endswith(FLOAT32)]
    write_config(folder, model.config, torch.float32 if torch.float32 in types else types[0])
    save_weights(folder, model.named_parameters())
    copy_code(folder)
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), folder)


def write_config(folder: Path, config: HybridConfig, dtype: torch.dtype) -> None:
    """config.json; dtype: what transformers loads the weights in if it is not told."""
    raw = config.to_dict() | AUTO | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", raw)


def copy_code(folder: Path) -> None:
    for module in CODE:
        shutil.copyfile(Path(__file__).with_name("hf") / f"{module}.py", folder / f"{module}.py")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files and the generation defaults, as many as there are."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
    """Write tensors as they come: model.safetensors, or where they are more than `limit` bytes (1 GiB), transformers'
    numbered files and their index. Holds at most `limit` bytes, or one tensor, of tensors that come from elsewhere."""
    parts: list[Path] = []
    index: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

    def write() -> None:
        nonlocal size
        parts.append(folder / f"model-{len(parts) + 1:05d}.part")
        save_file(shard, parts[-1], metadata={"format": "pt"})
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            write()
        shard[name] = tensor.detach().cpu().contiguous()
        index[name] = len(parts)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    files = {"weight_map": {name: names[i] for name, i in index.items()}, "metadata": {"total_size": total}}
    write_json(folder / "model.safetensors.index.json", files)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if name.endswith(FLOAT32):
        return tensor.float()
    return tensor if dtype is None else tensor.to(dtype)
