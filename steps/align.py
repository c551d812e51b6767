"""Stage: fit every mixer to the attention that it replaces, all layers in one teacher pass, without the LM head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid import HybridForCausalLM
from hybrid.compiled import compiled_blocks
from steps.config import AlignConfig
from steps.loop import train
from steps.losses import align_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches


def run(config: AlignConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Mean over mixers of the relative squared error; each sees the teacher's own hidden states, so layers are
    independent."""
    teacher, student = load_teacher(inputs, context), load_student(inputs, context)
    layers = student.config.mamba_layers
    error = torch.compile(_error, dynamic=False) if context.device == "cuda" else _error

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            taught = teacher.mixing(batch.tokens, batch.seq_idx, layers)
        losses = [error(model.blocks[i].mamba, given, wanted, batch.seq_idx) for i, (given, wanted) in taught.items()]
        stacked = torch.stack(losses)
        return stacked.mean(), {"worst layer": stacked.detach().max()}

    with compiled_blocks(teacher):
        summary = train(
            student, token_batches(inputs["corpus"] / "train.npz", config, context), loss_function, config, context
        )
    save_student(student, inputs, out)
    return {**summary, "held_out": measure(teacher, student, inputs, context)}


def _error(mixer: nn.Module, given: Tensor, wanted: Tensor, seq_idx: Tensor) -> Tensor:
    return align_loss(mixer(given, seq_idx), wanted)
