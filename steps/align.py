"""Stage: fit every new mixer to the attention that it replaces, all layers in one teacher pass, without the LM head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid import HybridForCausalLM
from hybrid.init_map import new_mixers
from steps import distributed
from steps.config import AlignConfig
from steps.loop import BatchSource, train
from steps.losses import align_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches
from steps.utilisation import FORWARD, matrix_weights


def run(config: AlignConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Mean over mixers of the relative squared error; each sees the teacher's own hidden states, so layers are
    independent.

    Where the student continues from another, `previous`, that one teaches: only what is a mixer in one and attention in
    the other trains.
    """
    teacher, student = load_teacher(inputs, context), load_student(inputs, context)
    base = load_student({"student": inputs["previous"]}, context) if "previous" in inputs else teacher
    summary: dict[str, Any] = {"steps": 0, "tokens": 0}
    if new_mixers(base, student):
        batches = token_batches(inputs["corpus"] / "train.npz", config, context, mask=None)
        summary = fit(base, student, batches, config, context)
    save_student(student, inputs, out)
    return {**summary, "held_out": measure(teacher, student, inputs, context)}


def fit(
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    batches: BatchSource,
    config: AlignConfig,
    context: StageContext,
) -> dict[str, Any]:
    """Train in place, on `TokenBatch`es, the student's mixers of layers where `teacher` has attention; returns the
    loop's summary."""
    layers = new_mixers(teacher, student)
    alone_on_a_gpu = context.device == "cuda" and distributed.world_size() == 1
    error = torch.compile(_error, dynamic=False) if alone_on_a_gpu else _error

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            taught = teacher.mixing(batch.tokens, batch.seq_idx, layers)
        losses = [error(model.blocks[i].mamba, given, wanted, batch.seq_idx) for i, (given, wanted) in taught.items()]
        stacked = torch.stack(losses) * _energy_share([wanted for _, wanted in taught.values()])
        return stacked.mean(), {"worst layer": stacked.detach().max()}

    mixers = [student.blocks[i].mamba for i in layers]
    read = teacher.blocks[: max(layers, default=-1) + 1]
    return train(
        student,
        batches,
        loss_function,
        config,
        context,
        teacher=teacher,
        called=mixers,
        forward_flops=FORWARD * sum(matrix_weights(block) for block in read),
        one_shape=True,
    )


def _energy_share(wanted: list[Tensor]) -> Tensor | float:
    """Factors (layers,) that make the mean over processes of ‖o − t‖² / ‖t‖² what it is over all of their rows."""
    if distributed.world_size() == 1:
        return 1.0
    energy = torch.stack([target.float().pow(2).sum() for target in wanted])
    return energy / distributed.mean(energy)


def _error(mixer: nn.Module, given: Tensor, wanted: Tensor, seq_idx: Tensor) -> Tensor:
    return align_loss(mixer(given, seq_idx), wanted)
