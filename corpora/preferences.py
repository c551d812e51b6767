"""Preference pairs: one prompt, a better and a worse reply, as tokens and as padded batches for DPO."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corpora import chat, conversations, sources
from corpora.shards import Shard


class PreferenceError(ValueError):
    """Data that is no preference pair; the message says where it stands."""


@dataclass(frozen=True)
class PreferencePair:
    """Token numbers; a reply includes its end-of-turn token unless it was cut by a length limit."""

    prompt_tokens: tuple[int, ...]
    chosen_tokens: tuple[int, ...]
    rejected_tokens: tuple[int, ...]
    id: str = ""

    @property
    def informative(self) -> bool:
        """False where both replies are the same or one is empty: such a pair has no gradient or no meaning."""
        return bool(self.chosen_tokens and self.rejected_tokens) and self.chosen_tokens != self.rejected_tokens


@dataclass(frozen=True)
class PreferenceBatch:
    """P pairs as 2P right-padded rows: rows 0 … P−1 chosen, P … 2P−1 rejected. All arrays (2P, L).

    tokens:    int64, padded with `pad_id`.
    seq_idx:   int32, 0 for text and 1 for padding, so that nothing passes between them.
    targets:   int64, the next token; 0 where loss_mask is False.
    loss_mask: bool, True where the next token is part of the reply: sum log-probabilities of `targets` here.
    """

    tokens: np.ndarray
    seq_idx: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    ids: tuple[str, ...]


def prompts(shard: Shard, max_tokens: int) -> list[tuple[str, tuple[int, ...]]]:
    """(id, tokens) of each conversation up to its first reply, generation prompt included; longer ones are left out."""
    found = []
    for index, (start, end) in enumerate(zip(shard.starts[:-1], shard.starts[1:], strict=True)):
        mask = shard.assistant[start:end]
        length = int(mask.argmax()) if mask.any() else 0
        if 0 < length <= max_tokens:
            found.append((str(shard.ids[index]), tuple(int(t) for t in shard.tokens[start : start + length])))
    return found


def drawn_prompts(shard: Shard, max_tokens: int, count: int, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """At most `count` of `prompts`, in an order that the seed says."""
    found = prompts(shard, max_tokens)
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


def read(source: str, root: Path = sources.PROJECT_ROOT) -> Iterator[dict[str, Any]]:
    """Records {"id", "chosen", "rejected"} of a source with `chosen` and `rejected` message lists, checked."""
    for where, row in conversations.rows(source, root, column="chosen"):
        pair: dict[str, Any] = {}
        for name in ("chosen", "rejected"):
            if name not in row:
                raise PreferenceError(f"{where}: has no {name!r} (it has {', '.join(sorted(row)) or 'nothing'})")
            pair[name] = conversations.messages(row[name], f"{where}: {name}")
            if pair[name][-1]["role"] != "assistant":
                raise PreferenceError(
                    f"{where}: {name} ends with the {pair[name][-1]['role']}; it must end with a reply"
                )
        if pair["chosen"][:-1] != pair["rejected"][:-1]:
            raise PreferenceError(
                f"{where}: chosen and rejected answer different prompts; all but the last message must agree"
            )
        yield {"id": str(row.get("id") or conversations.record_id(where)), **pair}


def load(path: Path, tokenizer: Any) -> list[PreferencePair]:
    """The pairs of a corpus stage's preferences.jsonl, tokenised by the chat template."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    sides = {
        name: list(chat.tokenize(tokenizer, [{"id": r["id"], "messages": r[name]} for r in records]))
        for name in ("chosen", "rejected")
    }
    pairs = []
    for record, chosen, rejected in zip(records, sides["chosen"], sides["rejected"], strict=True):
        prompt, better = _split_last_reply(chosen)
        _, worse = _split_last_reply(rejected)
        pairs.append(PreferencePair(prompt, better, worse, record["id"]))
    return pairs


def _split_last_reply(tokenized: chat.TokenizedConversation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prompt, last reply with its end-of-turn token); what the template puts after that token is dropped."""
    end = len(tokenized.assistant) - int(tokenized.assistant[::-1].argmax())
    other = np.flatnonzero(~tokenized.assistant[:end])
    start = int(other[-1]) + 1 if len(other) else 0
    tokens = [int(t) for t in tokenized.tokens]
    return tuple(tokens[:start]), tuple(tokens[start:end])


def collate(pairs: Sequence[PreferencePair], pad_id: int) -> PreferenceBatch:
    """Pad on the right to the longest row."""
    empty = [p.id for p in pairs if not (p.prompt_tokens and p.chosen_tokens and p.rejected_tokens)]
    if not pairs or empty:
        raise PreferenceError(
            f"cannot collate {len(pairs)} pairs, without prompt or reply: {empty}; drop such pairs before"
        )
    rows = [(p.prompt_tokens, p.chosen_tokens) for p in pairs] + [(p.prompt_tokens, p.rejected_tokens) for p in pairs]
    shape = (len(rows), max(len(prompt) + len(reply) for prompt, reply in rows))
    tokens, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    seq_idx, loss_mask = np.ones(shape, np.int32), np.zeros(shape, bool)
    for row, (prompt, reply) in enumerate(rows):
        length = len(prompt) + len(reply)
        tokens[row, :length] = prompt + reply
        seq_idx[row, :length] = 0
        loss_mask[row, len(prompt) - 1 : length - 1] = True
        targets[row, len(prompt) - 1 : length - 1] = reply
    return PreferenceBatch(tokens, seq_idx, targets, loss_mask, tuple(p.id for p in pairs))
