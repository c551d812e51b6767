"""What every stage that makes a student does at its ends: load, batch, measure, save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from evals.fidelity import quick_fidelity
from hybrid import HybridForCausalLM, load_pretrained, save_pretrained
from steps.config import TrainConfig
from steps.distributed import gathered, own_rows
from steps.loop import BatchSource, MicroBatch, autocast
from steps.stage import StageContext

MEASURED_CONVERSATIONS = 8
MEASURED_LENGTH = 256
SKIPPED_POSITIONS = 40
"""Leading positions that are not measured: the template's opening is the same in every conversation."""


@dataclass(frozen=True)
class TokenBatch:
    """Packed blocks, all (B, L); see `corpora.packing.Batch`."""

    tokens: Tensor
    targets: Tensor
    seq_idx: Tensor
    mask: Tensor


def compute_type(context: StageContext) -> torch.dtype:
    return getattr(torch, context.compute)


def autocast_type(context: StageContext) -> torch.dtype | None:
    """What to cast products to, or None where everything is float32 anyway."""
    return None if context.compute == "float32" else compute_type(context)


def load_teacher(inputs: Mapping[str, Path], context: StageContext) -> HybridForCausalLM:
    return load_pretrained(inputs["teacher"], context.device, compute_type(context))


def load_student(inputs: Mapping[str, Path], context: StageContext) -> HybridForCausalLM:
    """Weights as saved: float32 where they were trained, else the teacher's type."""
    return load_pretrained(inputs["student"], context.device, torch.float32 if context.compute == "float32" else None)


def token_batches(
    shard: Path, config: TrainConfig, context: StageContext, mask: str | None = "loss_mask"
) -> BatchSource:
    """Micro-batches of packed blocks; `mask` names the field of `corpora.packing.Batch` that says which tokens count,
    all where it is None.

    Of several processes each has its rows of the micro-batch that one would have. Raises ConfigError where they cannot
    share it equally.
    """
    documents = Shard.load(shard)
    if mask == "assistant_loss":
        documents = documents.with_replies()  # a batch of plain documents would hold no token that counts
    return block_batches(PackedBlocks(documents, config.seq_len, context.seed), config, mask)


def block_batches(blocks: PackedBlocks, config: TrainConfig, mask: str | None = "loss_mask") -> BatchSource:
    """`token_batches` of blocks that are packed already."""
    size = config.batch_size // config.accumulation
    rows = own_rows(size)

    def batch(number: int) -> MicroBatch:
        packed = blocks.batch(number, size)
        counts = np.ones_like(packed.loss_mask) if mask is None else getattr(packed, mask)
        total, own = int(counts.sum()), counts[rows]
        share = own.sum() / total if total else 0.0
        if total and not own.any():
            own = np.ones_like(own)  # a loss of some tokens, which then weighs nothing: all processes work together
        arrays = (packed.tokens[rows], packed.targets[rows], packed.seq_idx[rows], own)
        data = TokenBatch(*map(torch.from_numpy, arrays))
        return MicroBatch(data, total, packed.documents, size * config.seq_len, share=float(share))

    return batch


def measure(
    teacher: HybridForCausalLM, student: HybridForCausalLM, inputs: Mapping[str, Path], context: StageContext
) -> dict[str, float]:
    """KL to the teacher (nats per token) and top-1 agreement on a few held-out conversations.

    All processes of a stage call it; only process 0 measures, the others get an empty answer.
    """
    whole_teacher, whole_student = gathered(teacher), gathered(student)
    if whole_teacher is None or whole_student is None:
        return {}
    with autocast(context):
        return quick_fidelity(
            whole_teacher,
            whole_student,
            inputs["corpus"] / "held_out.npz",
            MEASURED_CONVERSATIONS,
            MEASURED_LENGTH,
            SKIPPED_POSITIONS,
        )


def save_student(student: HybridForCausalLM, inputs: Mapping[str, Path], out: Path) -> None:
    """All processes of a stage call it; process 0 writes."""
    whole = gathered(student)
    if whole is not None:
        save_pretrained(whole, out, tokenizer_from=inputs["teacher"])
