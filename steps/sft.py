"""Stage: supervised fine-tuning, cross entropy on assistant tokens or on all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid import HybridForCausalLM
from steps.config import SFTConfig
from steps.loop import BatchSource, train
from steps.losses import ce_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches


def run(config: SFTConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """The teacher is loaded only to measure how far the student has moved from it."""
    student = load_student(inputs, context)
    mask = "assistant_loss" if config.tokens == "assistant" else "loss_mask"
    batches = token_batches(inputs["corpus"] / "train.npz", config, context, mask)
    summary = fit(student, batches, config, context)
    save_student(student, inputs, out)
    return {**summary, "held_out": measure(load_teacher(inputs, context), student, inputs, context)}


def fit(student: HybridForCausalLM, batches: BatchSource, config: SFTConfig, context: StageContext) -> dict[str, Any]:
    """Train the student in place on `TokenBatch`es; returns the loop's summary."""

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch.tokens, batch.seq_idx)
        return ce_loss(hidden, model.lm_head_weight, batch.targets, batch.mask), {}

    return train(student, batches, loss_function, config, context, one_shape=True)
