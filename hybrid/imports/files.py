"""Weights of a folder as they were published, safetensors or PyTorch's .bin, read tensor by tensor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hybrid.checkpoint import Weights


def open_weights(folder: Path) -> Mapping[str, Tensor]:
    """The folder's tensors by name, each read when it is asked for; safetensors where there are both kinds.

    Raises FileNotFoundError if there are none or a file of the index is missing, ValueError for a broken file and for
    a .bin that holds more than tensors.
    """
    for index in sorted(folder.glob("*.index.json")):
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in wanted if not (folder / name).is_file())
        if missing:
            raise FileNotFoundError(f"{folder}: {index.name} names {', '.join(missing[:3])}, which is not there")
    if any(folder.glob("*.safetensors")):
        try:
            return Weights(folder)
        except SafetensorError as error:
            raise ValueError(f"{folder}: a .safetensors file cannot be read ({error})") from None
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise FileNotFoundError(f"{folder}: no weights; expected *.safetensors or pytorch_model*.bin")
    return PickledWeights(shards)


class PickledWeights(Mapping[str, Tensor]):
    """The tensors of .bin files by name. Nothing but tensors is unpickled, and files are mapped, not read whole."""

    def __init__(self, shards: list[Path]) -> None:
        self._shard = {name: shard for shard in shards for name in _tensors(shard)}

    def __getitem__(self, name: str) -> Tensor:
        # Mapped anew each time: a file that stays mapped keeps all its pages that were read in memory.
        return _tensors(self._shard[name])[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)


def _tensors(shard: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{shard}: not loaded, as it is no plain file of tensors ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{shard}: expected names and tensors, as `torch.save(model.state_dict(), …)` writes them")
    return found
