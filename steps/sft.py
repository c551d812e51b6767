"""Stage: supervised fine-tuning, cross entropy on assistant tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.compiled import compiled_blocks
from steps.config import SFTConfig
from steps.loop import train
from steps.losses import ce_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches


def run(config: SFTConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """The teacher is loaded only to measure how far the student has moved from it."""
    student = load_student(inputs, context)

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch.tokens, batch.seq_idx)
        return ce_loss(hidden, model.lm_head_weight, batch.targets, batch.mask), {}

    batches = token_batches(inputs["corpus"] / "train.npz", config, context, mask="assistant_loss")
    with compiled_blocks(student):
        summary = train(student, batches, loss_function, config, context)
    save_student(student, inputs, out)
    return {**summary, "held_out": measure(load_teacher(inputs, context), student, inputs, context)}
