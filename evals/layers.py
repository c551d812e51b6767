"""How near every layer of a student is to its teacher's, by itself and in the student's own stream.

The measures of MOHAWK's first two stages (2408.10189), on held-out conversations: means over tokens of the cosine
cos(s, t) and of the relative error ‖s − t‖ / ‖t‖. Each token has its own figure because a few hidden states of a Llama
are hundreds of times the size of the others (2402.17762), and would be all that a ratio of sums shows.
"""

from __future__ import annotations

from math import isfinite
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from evals.batches import length_sorted
from evals.benchmark import Found, Subject
from evals.fidelity import conversation_blocks
from evals.head import EvaluationError
from hybrid import HybridForCausalLM
from hybrid.attention import document_positions, rope_tables

FIGURES = ("mixer_cosine", "mixer_relative_error", "hidden_cosine", "hidden_relative_error")


class Settings(Protocol):
    """What `measure` reads of the benchmark's configuration."""

    layer_conversations: int
    seq_len: int
    skip_positions: int


@torch.no_grad()
def measure(subject: Subject, config: Settings) -> Found:
    """One entry per layer, in order: {"layer", "replaced", *FIGURES, "tokens"}; nothing for the teacher itself.

    mixer_*: outputs of the student's mixer (or kept attention) and of the teacher's attention, each behind its own
    norm, where both layers get what the teacher's layer gets: what the replacement loses by itself. hidden_*: hidden
    states after the block, each model in its own stream: what has come together up to there. There are no rows: layers
    are no sample of items.
    """
    if subject.teacher is None or not config.layer_conversations:
        return Found()
    shard = subject.corpus / "held_out.npz"
    blocks = conversation_blocks(shard, config.layer_conversations, config.seq_len, config.skip_positions)
    student, tokens, read = subject.model, 0, 0
    sums = torch.zeros(len(student.blocks), len(FIGURES), dtype=torch.float64, device=student.device)
    for chosen, batch in length_sorted([b.tokens for b in blocks], subject.batch_size, student.device):
        positions = torch.arange(batch.shape[1], device=batch.device)
        spans = torch.tensor([[blocks[i].first, len(blocks[i].tokens)] for i in chosen], device=batch.device)
        scored = (positions >= spans[:, :1]) & (positions < spans[:, 1:])  # (B, L)
        sums += _sums(student, subject.teacher, batch, scored)
        tokens, read = tokens + int(scored.sum()), read + len(chosen)
        subject.progress(read / len(blocks), f"{tokens} tokens")
    means = (sums / tokens).tolist()
    for layer, figures in enumerate(means):
        if not all(map(isfinite, figures)):
            raise EvaluationError(f"layer {layer}: its outputs are not finite; the model is broken (NaN or inf)")
    return Found(
        summary=[
            {
                "layer": i,
                "replaced": not block.is_attention,
                **dict(zip(FIGURES, figures, strict=True)),
                "tokens": tokens,
            }
            for i, (block, figures) in enumerate(zip(student.blocks, means, strict=True))
        ]
    )


def _sums(student: HybridForCausalLM, teacher: HybridForCausalLM, tokens: Tensor, scored: Tensor) -> Tensor:
    """Sums (layers, 4) of FIGURES over the scored (B, L) ones of tokens (B, L); both models advance block by block, so
    that no more than one layer's states exist."""
    batch, length = tokens.shape
    positions = document_positions(None, batch, length, tokens.device)
    ours, theirs = student.model.embed_tokens(tokens), teacher.model.embed_tokens(tokens)
    rope = rope_tables(teacher.inv_freq, positions, theirs.dtype)
    sums = []
    for block, teaching in zip(student.blocks, teacher.blocks, strict=True):
        given = block.input_layernorm(theirs)
        mixed = block.self_attn(given, rope, None) if block.is_attention else block.mamba(given)
        theirs, _, wanted = teaching(theirs, rope, None, tapped=True)
        ours = block(ours, rope, None)
        sums.append(torch.stack([*_nearness(mixed[scored], wanted[scored]), *_nearness(ours[scored], theirs[scored])]))
    return torch.stack(sums)


def _nearness(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Σ cos(found, wanted) and Σ ‖found − wanted‖ / ‖wanted‖ over tokens (T, D), float64."""
    found, wanted = found.float(), wanted.float()
    error = torch.linalg.vector_norm(found - wanted, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)
    return cosine_similarity(found, wanted, dim=-1).double().sum(), error.double().sum()
