"""Stage: distil the teacher's full distribution into the student (2408.15237 §3, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.compiled import compiled_blocks
from steps.config import KLConfig
from steps.loop import train
from steps.losses import kl_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches


def run(config: KLConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Token-mean divergence in nats over every token whose successor is in the same document."""
    teacher, student = load_teacher(inputs, context), load_student(inputs, context)

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            taught = teacher.hidden(batch.tokens, batch.seq_idx)
        loss = kl_loss(
            model.hidden(batch.tokens, batch.seq_idx),
            model.lm_head_weight,
            taught,
            teacher.lm_head_weight,
            batch.mask,
            config.loss,
            config.temperature,
            batch.targets,
            config.ce_weight,
        )
        return loss, {}

    batches = token_batches(inputs["corpus"] / "train.npz", config, context)
    with compiled_blocks(teacher, student):
        summary = train(student, batches, loss_function, config, context)
    save_student(student, inputs, out)
    return {**summary, "held_out": measure(teacher, student, inputs, context)}
