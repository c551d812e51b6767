"""The corpus: conversations and plain documents in, token shards out, train and held-out disjoint."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from corpora import chat, conversations, free_text, preferences, self_chat, sources, texts
from corpora.shards import Shard, held_out, text_key
from steps.config import CorpusConfig, FreeTextConfig, SelfChatConfig
from steps.stage import Progress, StageContext

NATURAL_TOKENS = 200_000
_BATCH = 256

_Plain = Sequence[tuple[str, np.ndarray]]
"""(id, tokens uint32 (L,)) of documents that are no conversations."""
_Drawn = TypeVar("_Drawn")


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

    def shard(self, indices: list[int], plain: _Plain = ()) -> Shard:
        """These conversations, then plain documents."""
        return Shard.of(
            [*(self.tokens[i] for i in indices), *(tokens for _, tokens in plain)],
            [*(self.ids[i] for i in indices), *(name for name, _ in plain)],
            [*(self.assistant[i] for i in indices), *(np.zeros(len(tokens), bool) for _, tokens in plain)],
        )


def run(config: CorpusConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write train.npz, held_out.npz and manifest.json into `out`; natural.npz, held_out_text.npz and preferences.jsonl
    if configured.

    inputs: {"teacher": folder}. Raises SourceError, ConversationError, PreferenceError, TextError, ChatTemplateError,
    FreeTextError, CorpusError.
    """
    from transformers import AutoTokenizer

    teacher = inputs["teacher"]
    tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True)
    documents, per_source = _Documents(), {}
    for source in config.sources:
        per_source[source] = _read(conversations.read(source), documents, tokenizer, config.max_tokens)
    natural, measured = _natural(config.natural_text, tokenizer) if config.natural_text else (None, {})
    plain, text_sources = _texts(config, tokenizer, measured)
    per_source |= text_sources
    held_out_text: _Plain = ()
    if config.self_chat.conversations or config.free_text.documents:
        said = _Teacher(teacher, tokenizer, context)
        if config.self_chat.conversations:
            per_source["self_chat"] = said.conversations(config.self_chat, documents)
        if config.free_text.documents:
            own, held_out_text, per_source["free_text"] = said.documents(config.free_text)
            plain += own
    if len(documents.ids) <= config.held_out_conversations:
        raise CorpusError(
            f"corpus.held_out_conversations is {config.held_out_conversations}, but the sources give only "
            f"{len(documents.ids)} different conversations; at least one must stay to train on"
        )
    kept_out = held_out(documents.ids, config.held_out_conversations, context.seed)
    shards = {
        "train": documents.shard([i for i in range(len(documents.ids)) if i not in kept_out], plain),
        "held_out": documents.shard(sorted(kept_out)),
    }
    if natural is not None:
        shards["natural"] = natural
    if held_out_text:
        shards["held_out_text"] = _Documents().shard([], held_out_text)
    for name, shard in shards.items():
        shard.save(out / f"{name}.npz")
    no_conversations = {"train": len(plain), "held_out": 0}
    splits = {name: _counts(shard, no_conversations.get(name, len(shard))) for name, shard in shards.items()}
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


class _Teacher:
    """The teacher as a writer: loaded once for conversations and documents; says how far it is every five seconds."""

    def __init__(self, folder: Path, tokenizer: Any, context: StageContext) -> None:
        import torch

        from hybrid import load_pretrained

        self.tokenizer, self.context = tokenizer, context
        self.model = load_pretrained(folder, device=context.device, dtype=getattr(torch, context.compute)).eval()

    def conversations(self, settings: SelfChatConfig, documents: _Documents) -> dict[str, int]:
        """Add conversations to `documents`; what they added."""
        from hybrid.generate import Generator

        before, kept = documents.count, 0
        tally = self_chat.Tally()
        drawn = self_chat.sample_tokenized(
            Generator(),
            self.model,
            self.tokenizer,
            settings.conversations,
            _sampler(settings),
            seed=self.context.seed,
            batch_size=min(settings.batch_size, settings.conversations),
            tally=tally,
        )
        for record, tokenized in self._shown(drawn, tally, settings.conversations, "conversations"):
            kept += documents.add(record, tokenized)
        return {"conversations": kept, "tokens": documents.count - before}

    def documents(self, settings: FreeTextConfig) -> tuple[_Plain, _Plain, dict[str, int]]:
        """(documents to train on, held-out ones, what was drawn)."""
        from hybrid.generate import Generator

        start = free_text.start_token(self.tokenizer, settings.start_token)
        tally = free_text.Tally()
        drawn = free_text.sample(
            Generator(),
            self.model,
            start,
            free_text.stop_tokens(self.tokenizer, start, self.model.config.eos_token_ids),
            settings.documents,
            _sampler(settings),
            seed=self.context.seed,
            batch_size=min(settings.batch_size, settings.documents),
            tally=tally,
        )
        found = list(self._shown(drawn, tally, settings.documents, "documents"))
        count = settings.held_out_documents
        kept_out = held_out([name for name, _ in found], count, self.context.seed) if count else set()
        return (
            [pair for i, pair in enumerate(found) if i not in kept_out],
            [found[i] for i in sorted(kept_out)],
            {"documents": tally.kept, "tokens": tally.tokens, "duplicates": tally.duplicates, "start_token": start},
        )

    def _shown(
        self, drawn: Iterator[_Drawn], tally: self_chat.Tally | free_text.Tally, total: int, unit: str
    ) -> Iterator[_Drawn]:
        started = shown = time.monotonic()
        for one in drawn:
            yield one
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                self._show(tally, total, unit, shown - started)
        self._show(tally, total, unit, time.monotonic() - started)

    def _show(self, tally: self_chat.Tally | free_text.Tally, total: int, unit: str, seconds: float) -> None:
        seconds = max(seconds, 1e-9)
        figures = {"dropped": float(tally.dropped), "tokens/s": tally.tokens / seconds}
        self.context.progress(Progress(tally.kept, total, unit, tally.kept / seconds, figures))


def _sampler(settings: SelfChatConfig | FreeTextConfig) -> self_chat.Sampler:
    return self_chat.Sampler(settings.max_tokens, settings.temperature, settings.top_p, settings.top_k)


def _natural(source: str, tokenizer: Any) -> tuple[Shard, dict[bytes, str]]:
    """Foreign documents as the tokenizer takes plain text, up to NATURAL_TOKENS in all, the last one cut; and the name
    of each by its text's key."""
    documents, ids, keys, count = [], [], {}, 0
    for name, text in texts.read(source):
        keys[text_key(text)] = name
        tokens = np.array(tokenizer(text, verbose=False)["input_ids"], np.uint32)[: NATURAL_TOKENS - count]
        if len(tokens) > 1:
            documents.append(tokens)
            ids.append(name)
            count += len(tokens)
        if count >= NATURAL_TOKENS:
            break
    if not documents:
        raise CorpusError(f"corpus.natural_text: {source} holds no text")
    return Shard.of(documents, ids), keys


def _texts(
    config: CorpusConfig, tokenizer: Any, measured: Mapping[bytes, str]
) -> tuple[list[tuple[str, np.ndarray]], dict[str, dict[str, int]]]:
    """Documents of at most config.text_tokens tokens, each text once, and what each source added.

    measured: names of the texts that perplexity is measured on, by key; finding one of them raises CorpusError."""
    found: list[tuple[str, np.ndarray]] = []
    added: dict[str, dict[str, int]] = {}
    seen: set[bytes] = set()
    left = config.texts_max_tokens or sys.maxsize
    for source in config.texts:
        before, tokens_before = len(found), left
        for name, text in texts.read(source) if left else ():
            key = text_key(text)
            if key in measured:
                raise CorpusError(
                    f"corpus.texts: {name} of {source} is the same text as {measured[key]} of corpus.natural_text "
                    f"({config.natural_text}): what is trained on cannot be measured on; take it out of one of them"
                )
            if key in seen:
                continue
            seen.add(key)
            tokens = np.array(tokenizer(text, verbose=False)["input_ids"], np.uint32)[:left]
            left -= len(tokens)
            for piece in range(0, len(tokens), config.text_tokens):
                found.append((f"{name}@{piece}", tokens[piece : piece + config.text_tokens]))
            if not left:
                break
        added[source] = {"documents": len(found) - before, "tokens": tokens_before - left}
    if config.texts and not found:
        raise CorpusError(f"corpus.texts: {', '.join(config.texts)} hold no text")
    return found, added


def _copy_preferences(source: str, path: Path) -> int:
    pairs = 0
    with path.open("w") as file:
        for pair in preferences.read(source):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            pairs += 1
    return pairs


def _counts(shard: Shard, documents: int) -> dict[str, int]:
    return {
        "conversations": len(shard) - documents,
        "documents": documents,
        "tokens": len(shard.tokens),
        "assistant_tokens": int(shard.assistant.sum()),
    }


def _tokenizer_digest(teacher: Path) -> str:
    """sha256 over what turns a conversation into tokens: the tokenizer and its chat template."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    hashes = {name: sources.sha256_of(teacher / name) for name in names if (teacher / name).is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
