"""The corpus: conversations in, token shards out, train and held-out disjoint."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from corpora import chat, conversations, preferences, self_chat, sources, texts
from corpora.shards import Shard, held_out, text_key
from steps.config import CorpusConfig
from steps.stage import Progress, StageContext

logger = logging.getLogger(__name__)

NATURAL_TOKENS = 200_000
_BATCH = 256


class CorpusError(ValueError):
    """A corpus that cannot be made; the message says what is missing."""


@dataclass
class _Documents:
    """Tokenised conversations in the order they came, each text once."""

    ids: list[str] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    assistant: list[np.ndarray] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    count: int = 0
    duplicates: int = 0

    def add(self, record: Mapping[str, Any], tokenized: chat.TokenizedConversation) -> bool:
        key = text_key("\n".join(f"{m['role']}\n{m['content']}" for m in record["messages"]))
        if key in self.seen:
            self.duplicates += 1
            return False
        self.seen.add(key)
        self.ids.append(record["id"])
        self.tokens.append(tokenized.tokens)
        self.assistant.append(tokenized.assistant)
        self.count += len(tokenized.tokens)
        return True

    def shard(self, indices: list[int]) -> Shard:
        return Shard.of(
            [self.tokens[i] for i in indices], [self.ids[i] for i in indices], [self.assistant[i] for i in indices]
        )


def run(config: CorpusConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write train.npz, held_out.npz and manifest.json into `out`; natural.npz and preferences.jsonl if configured.

    inputs: {"teacher": folder}. Raises SourceError, ConversationError, PreferenceError, ChatTemplateError, CorpusError.
    """
    from transformers import AutoTokenizer

    teacher = inputs["teacher"]
    tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True)
    documents, per_source = _Documents(), {}
    for source in config.sources:
        per_source[source] = _read(conversations.read(source), documents, tokenizer, config.max_tokens)
    if config.self_chat.conversations:
        records = _self_chat(config, teacher, tokenizer, context)
        per_source["self_chat"] = _read(records, documents, tokenizer, 0)
    if len(documents.ids) <= config.held_out_conversations:
        raise CorpusError(
            f"corpus.held_out_conversations is {config.held_out_conversations}, but the sources give only "
            f"{len(documents.ids)} different conversations; at least one must stay to train on"
        )
    kept_out = held_out(documents.ids, config.held_out_conversations, context.seed)
    shards = {
        "train": documents.shard([i for i in range(len(documents.ids)) if i not in kept_out]),
        "held_out": documents.shard(sorted(kept_out)),
    }
    if config.natural_text:
        shards["natural"] = _natural(config.natural_text, tokenizer)
    for name, shard in shards.items():
        shard.save(out / f"{name}.npz")
    splits = {name: _counts(shard) for name, shard in shards.items()}
    if config.preferences:
        splits["preferences"] = {"pairs": _copy_preferences(config.preferences, out / "preferences.jsonl")}
    manifest = {
        "splits": splits,
        "sources": per_source,
        "duplicates": documents.duplicates,
        "tokenizer": _tokenizer_digest(teacher),
        "seed": context.seed,
        "files": {p.name: sources.sha256_of(p) for p in sorted(out.iterdir())},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return {name: manifest[name] for name in ("splits", "sources", "duplicates", "tokenizer")}


def _read(records: Iterator[dict[str, Any]], documents: _Documents, tokenizer: Any, max_tokens: int) -> dict[str, int]:
    """Tokenise records until there are `max_tokens` tokens in all (0: no limit); what this source added."""
    before, kept = documents.count, 0
    while not max_tokens or documents.count < max_tokens:
        batch = list(itertools.islice(records, _BATCH))
        if not batch:
            break
        for record, tokenized in zip(batch, chat.tokenize(tokenizer, batch), strict=True):
            if max_tokens and documents.count >= max_tokens:
                break
            kept += documents.add(record, tokenized)
    return {"conversations": kept, "tokens": documents.count - before}


def _self_chat(config: CorpusConfig, teacher: Path, tokenizer: Any, context: StageContext) -> Iterator[dict[str, Any]]:
    """Conversations sampled from the teacher; progress about every five seconds."""
    import torch

    from hybrid import load_pretrained
    from hybrid.generate import Generator

    settings = config.self_chat
    model = load_pretrained(teacher, device=context.device, dtype=getattr(torch, context.compute)).eval()
    sampler = self_chat.Sampler(settings.max_tokens, settings.temperature, settings.top_p, settings.top_k)
    tally, started = self_chat.Tally(), time.monotonic()
    batch_size = min(settings.batch_size, settings.conversations)
    shown = started
    for record in self_chat.sample(
        Generator(),
        model,
        tokenizer,
        settings.conversations,
        sampler,
        seed=context.seed,
        batch_size=batch_size,
        tally=tally,
    ):
        yield record
        now = time.monotonic()
        if now - shown > 5 or tally.kept == settings.conversations:
            shown, rate = now, tally.kept / max(now - started, 1e-9)
            figures = {"dropped": float(tally.dropped), "tokens/s": tally.tokens / max(now - started, 1e-9)}
            context.progress(Progress(tally.kept, settings.conversations, "conversations", rate, figures))


def _natural(source: str, tokenizer: Any) -> Shard:
    """Foreign documents as the tokenizer takes plain text, up to NATURAL_TOKENS in all; the last one is cut."""
    documents, ids, count = [], [], 0
    for name, text in texts.read(source):
        tokens = np.array(tokenizer(text, verbose=False)["input_ids"], np.uint32)[: NATURAL_TOKENS - count]
        if len(tokens) > 1:
            documents.append(tokens)
            ids.append(name)
            count += len(tokens)
        if count >= NATURAL_TOKENS:
            break
    if not documents:
        raise CorpusError(f"corpus.natural_text: {source} holds no text")
    return Shard.of(documents, ids)


def _copy_preferences(source: str, path: Path) -> int:
    pairs = 0
    with path.open("w") as file:
        for pair in preferences.read(source):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            pairs += 1
    return pairs


def _counts(shard: Shard) -> dict[str, int]:
    return {"conversations": len(shard), "tokens": len(shard.tokens), "assistant_tokens": int(shard.assistant.sum())}


def _tokenizer_digest(teacher: Path) -> str:
    """sha256 over what turns a conversation into tokens: the tokenizer and its chat template."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    hashes = {name: sources.sha256_of(teacher / name) for name in names if (teacher / name).is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
