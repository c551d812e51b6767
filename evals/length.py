"""How well a model reads on past the length that it was trained with: loss by position, and by what was read before.

Loss by position alone mixes two things, how much a model has read and which words stand there: far positions exist in
long documents only. `last` therefore scores the same tokens after contexts of several lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from corpora.shards import Shard
from evals.benchmark import Found, Subject
from evals.fidelity import Block, TokenScores, clustered_error, score_records
from evals.head import EvaluationError, Head, chunk_tokens
from hybrid.model import HybridForCausalLM

TEXT = "natural"
PIECE = 8192
"""Tokens read at a time, of all rows together: attention has so many queries, whatever the length of the text."""


class Settings(Protocol):
    """See `LengthConfig` in steps/config.py."""

    multiple: int
    documents: int
    last_tokens: int
    last_documents: int


def measure(subject: Subject, config: Settings) -> Found:
    """Negative log-likelihood in nats a token, on the longest documents of natural.npz.

    curve: by position, in octaves around the training length up to config.multiple times it; each document is read once
    from its beginning, and none is joined to another. last: of config.last_tokens tokens, the same ones for every
    `context`, which is how many tokens were read before the first of them; of all documents that reach the longest
    context, and that is the longest that at least config.last_documents of them reach. Standard errors count documents
    and are null for a single one. Positions beyond the model's max_position_embeddings are read like all others.

    Records: benchmark "length", one a document and bucket, and "length_last", one a document and context.
    Raises ShardError without natural.npz, EvaluationError where there is nothing to score or a score is not finite.
    """
    shard = Shard.load(subject.corpus / f"{TEXT}.npz")
    limit = config.multiple * subject.train_length
    documents = _longest(shard, config.documents, limit)
    contexts, reaching = _contexts(documents, subject.train_length, config.last_tokens, config.last_documents)
    work = sum(len(tokens) for _, tokens in documents) + len(reaching) * sum(c + config.last_tokens for c in contexts)
    reader = _Reader(subject, work)

    whole = [reader.scored([Block(name, name, tokens)])[0] for name, tokens in documents]
    buckets = []
    for low, high in _edges(subject.train_length, limit):
        parts = [_between(scores, low, min(high, len(scores.block.tokens))) for scores in whole]
        if parts := [part for part in parts if len(part.nll)]:
            buckets.append((low, high, parts))
    ends = []
    for context in contexts:
        begin, end = contexts[-1] - context, contexts[-1] + config.last_tokens
        blocks = [Block(f"{name}@{context}", name, tokens[begin:end], context) for name, tokens in reaching]
        ends.append((context, reader.scored(blocks)))
    return Found(
        score_records([part for *_, parts in buckets for part in parts], "length")
        + score_records([part for _, parts in ends for part in parts], "length_last"),
        {
            "train_length": subject.train_length,
            "max_position_embeddings": subject.model.config.max_position_embeddings,
            "text": TEXT,
            "curve": [{"from": low, "to": high, **_figures(parts)} for low, high, parts in buckets],
            "last": [{"context": context, **_figures(parts)} for context, parts in ends],
        },
    )


def _longest(shard: Shard, count: int, limit: int) -> list[tuple[str, np.ndarray]]:
    """(name, first `limit` tokens) of the `count` longest documents, the longest first."""
    order = sorted(range(len(shard)), key=lambda i: (-len(shard.document(i)), str(shard.ids[i])))
    found = [(str(shard.ids[i]), shard.document(i)[:limit].astype(np.int64)) for i in order[:count]]
    found = [(name, tokens) for name, tokens in found if len(tokens) > 1]
    if not found:
        raise EvaluationError(
            f"{TEXT}.npz: none of {len(shard)} documents has two tokens; give corpus.natural_text longer ones"
        )
    return found


def _edges(train_length: int, limit: int) -> list[tuple[int, int]]:
    """Buckets [from, to) of positions: octaves around the training length, the last one cut at `limit`."""
    edges = [1]
    edge = max(train_length // 8, 2)
    while edge < limit:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, limit]))


def _contexts(
    documents: Sequence[tuple[str, np.ndarray]], train_length: int, targets: int, at_least: int
) -> tuple[list[int], list[tuple[str, np.ndarray]]]:
    """Context lengths, octaves from a quarter of the training length to the longest that `at_least` documents reach
    with `targets` tokens behind it, and the documents that reach it; both empty if too few reach the shortest."""
    contexts: list[int] = []
    reaching: list[tuple[str, np.ndarray]] = []
    context = max(train_length // 4, 1)
    while len(enough := [d for d in documents if len(d[1]) >= context + targets]) >= at_least:
        contexts.append(context)
        reaching = enough
        context *= 2
    return contexts, reaching


class _Reader:
    """Scores blocks and tells how much of the work, in tokens, is done."""

    def __init__(self, subject: Subject, work: int) -> None:
        self.subject, self.work, self.done = subject, work, 0
        self.head = Head(subject.model)

    def scored(self, blocks: Sequence[Block]) -> list[TokenScores]:
        """Blocks of one length and one first position, a batch at a time."""
        found = []
        for at in range(0, len(blocks), self.subject.batch_size):
            batch = blocks[at : at + self.subject.batch_size]
            tokens = np.stack([block.tokens for block in batch])
            rows = read_nll(self.subject.model, self.head, tokens, batch[0].first)
            found += [TokenScores(block, nll) for block, nll in zip(batch, rows, strict=True)]
            self.done += tokens.size
            self.subject.progress(self.done / self.work, f"{tokens.shape[1]} tokens nll {rows.mean():.3f}")
        return found


@torch.no_grad()
def read_nll(model: HybridForCausalLM, head: Head, tokens: np.ndarray, first: int) -> np.ndarray:
    """−ln p of tokens[:, first:] in nats, (B, L − first) float64: token p is scored by what was read of tokens[:, :p].

    tokens (B, L) integers, first ≥ 1. Texts of any length are read through the model's cache: only one piece's hidden
    states and one chunk's logits exist at a time.
    """
    text = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)
    cache = model.new_cache(*text.shape)
    step = max(1, PIECE // len(text))
    scores = []
    for start in range(0, text.shape[1] - 1, step):
        hidden = model.hidden(text[:, start : start + step], cache=cache)  # (B, S, D)
        targets = text[:, start + 1 : start + 1 + step]
        scored = slice(max(first - 1 - start, 0), targets.shape[1])
        scores.append(_cross_entropy(head, hidden[:, scored], targets[:, scored]))
    found = torch.cat(scores, dim=1).double().cpu().numpy()
    if not np.isfinite(found).all():
        raise EvaluationError(
            f"texts of {text.shape[1]} tokens: scores are not finite; the model's output is broken (NaN or inf)"
        )
    return found


def _cross_entropy(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−ln p (B, S) of targets (B, S) by hidden states (B, S, D), with the logits of one chunk at a time."""
    size = chunk_tokens(hidden.device)
    chunks = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    parts = [torch.nn.functional.cross_entropy(head(h), t, reduction="none") for h, t in chunks]
    return torch.cat(parts).view(targets.shape)


def _between(scores: TokenScores, low: int, high: int) -> TokenScores:
    """The part of a document that was read from its beginning at positions low … high − 1."""
    block = scores.block
    part = Block(f"{block.document}@{low}", block.document, block.tokens[:high], low)
    return TokenScores(part, scores.nll[low - block.first : high - block.first])


def _figures(parts: Sequence[TokenScores]) -> dict[str, Any]:
    """Mean over all tokens, its standard error by documents, and how many there are of both."""
    values, names = [part.nll for part in parts], [part.block.document for part in parts]
    return {
        "nll": float(np.concatenate(values).mean()),
        "se": clustered_error(values, names),
        "n": sum(len(v) for v in values),
        "documents": len(set(names)),
    }
