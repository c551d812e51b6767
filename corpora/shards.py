"""Token shards: many documents in one flat array, as the corpus stage leaves them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class ShardError(ValueError):
    """A shard that is damaged or of the wrong kind; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """tokens: uint32 (T,), documents joined. starts: int64 (n+1,), where each begins, and the end of the last.
    assistant: bool (T,), True in an assistant's reply; all False for text that is no conversation. ids: str (n,).
    """

    tokens: np.ndarray
    starts: np.ndarray
    assistant: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @classmethod
    def of(
        cls, documents: Sequence[np.ndarray], ids: Iterable[str], masks: Sequence[np.ndarray] | None = None
    ) -> Shard:
        """Join documents (token arrays) and, of conversations, their reply masks."""
        starts = np.zeros(len(documents) + 1, np.int64)
        np.cumsum([len(d) for d in documents], out=starts[1:])
        tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
        assistant = np.zeros(len(tokens), bool) if masks is None else np.concatenate([np.zeros(0, bool), *masks])
        return cls(tokens, starts, assistant, np.array(list(ids), dtype=np.str_))

    def with_replies(self) -> Shard:
        """The documents that hold a reply: those that there is something to learn from where replies alone count."""
        kept = [i for i in range(len(self)) if self.assistant[self.starts[i] : self.starts[i + 1]].any()]
        masks = [self.assistant[self.starts[i] : self.starts[i + 1]] for i in kept]
        return Shard.of([self.document(i) for i in kept], [str(self.ids[i]) for i in kept], masks)

    def save(self, path: Path) -> None:
        """Write an .npz whose bytes depend on the contents alone."""
        np.savez(path, tokens=self.tokens, starts=self.starts, assistant=self.assistant, ids=self.ids)

    @classmethod
    def load(cls, path: Path) -> Shard:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                tokens, starts, ids = arrays["tokens"], arrays["starts"], arrays["ids"]
                assistant = arrays["assistant"] if "assistant" in arrays else np.zeros(len(tokens), bool)
        except FileNotFoundError:
            raise ShardError(f"{path}: there is no such shard; the corpus stage writes it") from None
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ShardError(f"{path}: is no token shard: {error}") from None
        lengths = (len(starts) - 1, len(ids)), (len(assistant), len(tokens)), (int(starts[-1]), len(tokens))
        if any(a != b for a, b in lengths) or np.any(np.diff(starts) < 0):
            raise ShardError(f"{path}: its arrays do not fit together: (documents, tokens) lengths {lengths}")
        return cls(tokens, starts, assistant, ids)


def text_key(text: str) -> bytes:
    """Equal for texts that differ in white space only: what counts as the same conversation."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def held_out(ids: Sequence[str], count: int, seed: int) -> set[int]:
    """Indices of `count` documents, by a hash of id and seed: a document added later moves at most one other."""
    if not 0 < count < len(ids):
        raise ShardError(
            f"{count} held-out conversations wanted of {len(ids)} different ones; at least one must stay to train on"
        )
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}\0{ids[i]}".encode()).digest())
    return set(order[:count])
