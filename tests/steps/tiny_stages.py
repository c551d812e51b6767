"""Upstream folders for stages: a Llama of three layers with a tokenizer, and a corpus of short conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corpora import chat
from corpora.shards import Shard
from steps.stage import StageContext
from tests.corpora import tiny


def context(scratch: Path, compute: str = "float32", **more: Any) -> StageContext:
    return StageContext("cpu", compute, seed=3, scratch=scratch, **more)


def upstream(root: Path) -> dict[str, Path]:
    """role → folder of a teacher and of a corpus without preferences."""
    tiny.save_llama(root / "teacher", num_hidden_layers=3, initializer_range=0.2)
    shard(root / "corpus" / "train.npz", range(12))
    shard(root / "corpus" / "held_out.npz", range(50, 54))
    return {"teacher": root / "teacher", "corpus": root / "corpus"}


def shard(path: Path, numbers: range) -> Shard:
    path.parent.mkdir(exist_ok=True)
    records = [tiny.conversation(number, turns=1 + number % 2) for number in numbers]
    tokenized = list(chat.tokenize(tiny.tokenizer(), records))
    made = Shard.of([t.tokens for t in tokenized], [r["id"] for r in records], [t.assistant for t in tokenized])
    made.save(path)
    return made


def preference(number: int) -> dict[str, Any]:
    ask = {"role": "user", "content": f"hello {number}?"}
    better, worse = (
        {"role": "assistant", "content": c} for c in (f"the answer is {number}", f"{number} {number} {number}")
    )
    return {"id": f"p{number}", "chosen": [ask, better], "rejected": [ask, worse]}
