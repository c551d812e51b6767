"""What every stage that makes a student does at its ends: load, batch, measure, save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from evals.fidelity import quick_fidelity
from hybrid import HybridForCausalLM, load_pretrained, save_pretrained
from steps.config import TrainConfig
from steps.loop import BatchSource, MicroBatch, autocast
from steps.stage import StageContext

MEASURED_CONVERSATIONS = 8
MEASURED_LENGTH = 256
SKIPPED_POSITIONS = 40
"""Leading positions that are not measured: the template's opening is the same in every conversation."""


@dataclass(frozen=True)
class TokenBatch:
    """Packed blocks on the device, all (B, L); see `corpora.packing.Batch`."""

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


def token_batches(shard: Path, config: TrainConfig, context: StageContext, mask: str = "loss_mask") -> BatchSource:
    """Micro-batches of packed blocks; `mask` names the field of `corpora.packing.Batch` that says which tokens
    count."""
    blocks = PackedBlocks(Shard.load(shard), config.seq_len, context.seed)
    size = config.batch_size // config.accumulation

    def batch(number: int) -> MicroBatch:
        packed = blocks.batch(number, size)
        arrays = (packed.tokens, packed.targets, packed.seq_idx, getattr(packed, mask))
        data = TokenBatch(*(torch.from_numpy(a).to(context.device, non_blocking=True) for a in arrays))
        return MicroBatch(data, int(arrays[-1].sum()), packed.documents)

    return batch


def measure(
    teacher: HybridForCausalLM, student: HybridForCausalLM, inputs: Mapping[str, Path], context: StageContext
) -> dict[str, float]:
    """KL to the teacher (nats per token) and top-1 agreement on a few held-out conversations."""
    with autocast(context):
        return quick_fidelity(
            teacher,
            student,
            inputs["corpus"] / "held_out.npz",
            MEASURED_CONVERSATIONS,
            MEASURED_LENGTH,
            SKIPPED_POSITIONS,
        )


def save_student(student: HybridForCausalLM, inputs: Mapping[str, Path], out: Path) -> None:
    save_pretrained(student, out, tokenizer_from=inputs["teacher"])
