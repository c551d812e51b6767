"""How near a student's next-token distributions are to its teacher's, on the same tokens.

Forward KL(teacher ‖ student) in nats, top-1 agreement and both perplexities. Position p of a document is scored by the
distribution after tokens[:p]; one token's score counts once, documents are the clusters of every standard error
(neighbouring tokens are far from independent: a naive error is several times too small).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from corpora.shards import Shard
from evals.batches import length_sorted
from evals.benchmark import Found, Subject
from evals.head import EvaluationError, Head, chunk_tokens
from hybrid import HybridForCausalLM

PLAIN_TEXTS = ("held_out_text", "natural")
"""Documents of the corpus that are no conversations, where it holds them: the teacher's own, and what neither wrote."""


class Settings(Protocol):
    """What `measure` reads of the benchmark's configuration."""

    held_out_conversations: int
    seq_len: int
    skip_positions: int
    natural_tokens: int


@dataclass(frozen=True)
class Block:
    """A stretch of a document that is read as one sequence.

    item:     names the block. document: names the document, the cluster.
    tokens:   (L,) integers. first: the first position that is scored, ≥ 1.
    """

    item: str
    document: str
    tokens: np.ndarray
    first: int = 1

    @property
    def hash(self) -> str:
        """sha256 of what is read and of where scoring starts."""
        return hashlib.sha256(self.tokens.astype("<u4").tobytes() + b"|%d" % self.first).hexdigest()


@dataclass(frozen=True)
class TokenScores:
    """Scores of one block, each array (T,) float64 over its scored tokens; what needs a teacher is None without one.

    nll: −ln p(token) of the evaluated model. teacher_nll: of the teacher. kl: KL(teacher ‖ student), nats.
    top1: 1.0 where both models' most probable token is the same.
    """

    block: Block
    nll: np.ndarray
    teacher_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None


def measure(subject: Subject, config: Settings) -> Found:
    """Figures by text, of `summarise` and `by_position`, and a row per block and metric; KL only beside a teacher."""
    found = Found(summary={})
    texts = _texts(subject.corpus, config)
    for done, (text, blocks) in enumerate(texts.items(), 1):
        scores = token_scores(subject.model, blocks, subject.teacher, batch_size=subject.batch_size)
        figures = summarise(scores)
        found.summary[text] = figures | {"by_position": by_position(scores)}
        found.records += score_records(scores, text)
        subject.progress(done / len(texts), f"{text} ppl {figures['ppl']:.3g}")
    return found


def _texts(corpus: Path, config: Settings) -> dict[str, list[Block]]:
    count, seq_len = config.held_out_conversations, config.seq_len
    texts = {"held_out": conversation_blocks(corpus / "held_out.npz", count, seq_len, config.skip_positions)}
    for text in PLAIN_TEXTS if config.natural_tokens else ():
        if (shard := corpus / f"{text}.npz").is_file():
            texts[text] = text_blocks(shard, config.natural_tokens, seq_len)
    return texts


def conversation_blocks(shard: Path, count: int, seq_len: int, skip: int) -> list[Block]:
    """Beginnings, up to seq_len tokens, of the first `count` conversations; positions below `skip` are not scored."""
    first = max(skip, 1)
    data = Shard.load(shard)
    documents = [(str(name), data.document(i)[:seq_len]) for i, name in enumerate(data.ids)]
    blocks = [Block(name, name, tokens, first) for name, tokens in documents if len(tokens) > first]
    if not blocks:
        raise EvaluationError(
            f"{shard}: none of {len(data)} conversations has more than {first} tokens within seq_len {seq_len}; "
            f"lower skip_positions ({skip})"
        )
    return blocks[:count]


def text_blocks(shard: Path, total: int, seq_len: int) -> list[Block]:
    """Blocks of up to seq_len tokens, `total` in all: the first of every document, then the second, and so on, because
    the standard error counts documents."""
    data = Shard.load(shard)
    longest = int(np.diff(data.starts).max(initial=0))
    blocks: list[Block] = []
    left = total
    for offset, i in itertools.product(range(0, longest, seq_len), range(len(data))):
        piece = data.document(i)[offset : offset + min(seq_len, left)]
        if len(piece) > 1:
            blocks.append(Block(f"{data.ids[i]}@{offset}", str(data.ids[i]), piece))
            left -= len(piece)
    if not blocks:
        raise EvaluationError(f"{shard}: none of {len(data)} documents has two tokens; natural_tokens is {total}")
    return blocks


@torch.no_grad()
def hidden_states(model: HybridForCausalLM, blocks: Sequence[Block], batch_size: int) -> list[Tensor]:
    """Final hidden states (L, D) of every block: what `token_scores` takes in place of a teacher's pass."""
    states: list[Tensor] = [torch.empty(0)] * len(blocks)
    for chosen, tokens in length_sorted([b.tokens for b in blocks], batch_size, model.lm_head_weight.device):
        hidden = model.hidden(tokens)
        for row, i in enumerate(chosen):
            states[i] = hidden[row, : len(blocks[i].tokens)].clone()
    return states


@torch.no_grad()
def token_scores(
    model: HybridForCausalLM,
    blocks: Sequence[Block],
    teacher: HybridForCausalLM | None = None,
    *,
    batch_size: int = 8,
    teacher_hidden: Sequence[Tensor] | None = None,
) -> list[TokenScores]:
    """Score every block, in the order given. With a teacher the divergence from it as well.

    teacher_hidden: `hidden_states(teacher, blocks, …)` if at hand; the teacher then only gives its output layer.
    Raises EvaluationError where a score is not finite.
    """
    device = model.lm_head_weight.device
    head, teacher_head = Head(model), Head(teacher) if teacher is not None else None
    scores: list[TokenScores | None] = [None] * len(blocks)
    for chosen, tokens in length_sorted([b.tokens for b in blocks], batch_size, device):
        hidden = model.hidden(tokens)  # (B, L, D)
        reference: Sequence[Tensor] | Tensor = ()
        if teacher is not None:
            reference = teacher.hidden(tokens) if teacher_hidden is None else [teacher_hidden[i] for i in chosen]
        for row, i in enumerate(chosen):
            block = blocks[i]
            predicting = slice(block.first - 1, len(block.tokens) - 1)
            targets = tokens[row, block.first : len(block.tokens)]
            if teacher_head is None:
                found = _nll(hidden[row, predicting], head, targets)
            else:
                other = reference[row][predicting]
                found = _divergence(hidden[row, predicting], head, other, teacher_head, targets)
            if not all(np.isfinite(part).all() for part in found.values()):
                raise EvaluationError(f"{block.item}: scores are not finite; the model's output is broken (NaN or inf)")
            scores[i] = TokenScores(block, **found)
    return [s for s in scores if s is not None]


def _nll(hidden: Tensor, head: Head, targets: Tensor) -> dict[str, np.ndarray]:
    size = chunk_tokens(hidden.device)
    parts = [
        torch.nn.functional.cross_entropy(head(h), t, reduction="none")
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return {"nll": _numpy(parts)}


def _divergence(hidden: Tensor, head: Head, other: Tensor, other_head: Head, targets: Tensor) -> dict[str, np.ndarray]:
    """Scores of tokens whose hidden states are (N, D) of the student and (N, D') of the teacher."""
    parts: dict[str, list[Tensor]] = {"nll": [], "teacher_nll": [], "kl": [], "top1": []}
    size = chunk_tokens(hidden.device)
    for h, o, t in zip(hidden.split(size), other.split(size), targets.split(size), strict=True):
        log_q = torch.log_softmax(head(h), -1)  # student (N, V)
        log_p = torch.log_softmax(other_head(o), -1)  # teacher (N, V)
        parts["top1"].append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        parts["nll"].append(-log_q.gather(-1, t[:, None])[:, 0])
        parts["teacher_nll"].append(-log_p.gather(-1, t[:, None])[:, 0])
        parts["kl"].append((log_p.exp() * log_q.neg_().add_(log_p)).sum(-1))
    return {name: _numpy(values) for name, values in parts.items()}


def _numpy(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()


def summarise(scores: Sequence[TokenScores]) -> dict[str, Any]:
    """Figures over all tokens: KL mean, quantiles and standard error clustered by document, agreement, perplexities."""
    nll = np.concatenate([s.nll for s in scores])
    documents = [s.block.document for s in scores]
    summary: dict[str, Any] = {}
    if scores[0].kl is not None:
        kl = np.concatenate([s.kl for s in scores])
        summary["kl_mean"] = float(kl.mean())
        for q in (50, 90, 99):
            summary[f"kl_p{q}"] = float(np.percentile(kl, q))
        summary["kl_se"] = clustered_error(np.split(kl, np.cumsum([len(s.nll) for s in scores])[:-1]), documents)
        summary["top1"] = float(np.concatenate([s.top1 for s in scores]).mean())
    summary["ppl"] = float(np.exp(nll.mean()))
    if scores[0].teacher_nll is not None:
        teacher_nll = np.concatenate([s.teacher_nll for s in scores])
        summary["ppl_ratio"] = float(np.exp(nll.mean() - teacher_nll.mean()))
    return summary | {"tokens": len(nll), "documents": len(set(documents))}


def by_position(scores: Sequence[TokenScores]) -> list[dict[str, Any]]:
    """Means over the n scored tokens with from ≤ position < to, two stretches to every doubling of the position; those
    without tokens are left out. A token's position counts what its model had read of the block before it.

    nll; kl, teacher_nll and top1 beside a teacher, and kl_se, the standard error of kl clustered by document, None for
    a single one. Both models get the same stretches on the same blocks.
    """
    positions = np.concatenate([s.block.first + np.arange(len(s.nll)) for s in scores])
    end = max(len(s.block.tokens) for s in scores)
    edges = np.unique(np.append(np.floor(2 ** (np.arange(2 * end.bit_length()) / 2)).clip(max=end), end)).astype(int)
    stretch = np.digitize(positions, edges) - 1
    sizes = np.bincount(stretch, minlength=len(edges) - 1)
    means = {}
    for name in ("kl", "nll", "teacher_nll", "top1"):
        if getattr(scores[0], name) is not None:
            values = np.concatenate([getattr(s, name) for s in scores])
            means[name] = np.bincount(stretch, values, len(sizes)) / np.maximum(sizes, 1)
    found = []
    for i in np.flatnonzero(sizes):
        inside = np.split(stretch == i, np.cumsum([len(s.nll) for s in scores])[:-1])
        there = [(s, mask) for s, mask in zip(scores, inside, strict=True) if mask.any()]
        documents = [s.block.document for s, _ in there]
        figures: dict[str, Any] = {name: float(values[i]) for name, values in means.items()}
        if kl := [s.kl[mask] for s, mask in there if s.kl is not None]:
            figures["kl_se"] = clustered_error(kl, documents)
        span = {"from": int(edges[i]), "to": int(edges[i + 1])}
        found.append({**span, **figures, "n": int(sizes[i]), "documents": len(set(documents))})
    return found


def clustered_error(values: Sequence[np.ndarray], clusters: Sequence[str]) -> float | None:
    """Standard error of the mean over all tokens, tokens of one cluster taken as one observation (linearised ratio);
    None for a single cluster, which tells nothing of the spread between documents."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(value.sum())
        counts[cluster] = counts.get(cluster, 0) + len(value)
    if len(sums) < 2:
        return None
    s, n = np.array(list(sums.values())), np.array(list(counts.values()))
    residual = s - n * (s.sum() / n.sum())
    return float(np.sqrt(len(s) / (len(s) - 1) * (residual**2).sum()) / n.sum())


def score_records(scores: Iterable[TokenScores], benchmark: str) -> list[dict[str, Any]]:
    """One record per block and metric: mean over its scored tokens, and their number."""
    records = []
    for score in scores:
        for metric in ("nll", "kl", "top1"):
            values = getattr(score, metric)
            if values is None:
                continue
            records.append(
                {
                    "benchmark": benchmark,
                    "item": score.block.item,
                    "item_hash": score.block.hash,
                    "prompt_hash": score.block.hash,
                    "cluster": score.block.document,
                    "metric": metric,
                    "score": float(values.mean()),
                    "n": len(values),
                    "response": "",
                }
            )
    return records


def quick_fidelity(
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    shard: Path,
    documents: int,
    seq_len: int,
    skip: int,
    *,
    batch_size: int = 8,
    teacher_hidden: Sequence[Tensor] | None = None,
) -> dict[str, float]:
    """{"kl", "top1"} of a student on the first few held-out conversations; what a training stage reports.

    shard: a `held_out.npz`. teacher_hidden: the teacher's `hidden_states` of the same `conversation_blocks`, where
    they are measured again and again.
    """
    blocks = conversation_blocks(shard, documents, seq_len, skip)
    found = summarise(token_scores(student, blocks, teacher, batch_size=batch_size, teacher_hidden=teacher_hidden))
    return {"kl": found["kl_mean"], "top1": found["top1"]}
