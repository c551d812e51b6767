"""Stage: a student whose Mamba mixers start from the attention that they replace (2408.15237 §2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import HybridForCausalLM, attention_layers
from hybrid.calibrate import calibrate_out_proj
from hybrid.init_map import Method, from_attention
from steps.config import InitStageConfig
from steps.stage import StageContext
from steps.students import autocast_type, load_teacher, measure, save_student


def run(config: InitStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Summary: layers kept and replaced, relative error by layer, and the KL that each initialisation starts from."""
    teacher = load_teacher(inputs, context)
    kept = attention_layers(config.attention, teacher.config.n_layers)
    start: dict[str, dict[str, float]] = {}

    def build(method: Method) -> HybridForCausalLM:
        return from_attention(
            teacher,
            kept,
            method,
            gate_bias=config.gate_bias,
            gate_scale=config.gate_scale,
            a_min=config.a_min,
            a_max=config.a_max,
            seed=context.seed,
        )

    copied: Method = "paper" if config.method == "paper" else "copy"
    student = build(copied)
    start[copied] = measure(teacher, student, inputs, context)
    errors: dict[int, float] = {}
    if config.method == "calibrated":
        if student.config.mamba_layers:
            errors = calibrate_out_proj(
                teacher, student, _batches(config, inputs, context), config.ridge, autocast_type(context)
            )
        start["calibrated"] = measure(teacher, student, inputs, context)
    if config.method != "paper" and config.measure_paper:
        start["paper"] = measure(teacher, build("paper"), inputs, context)
    save_student(student, inputs, out)
    return {
        "method": config.method,
        "attention_layers": list(kept),
        "replaced_layers": list(student.config.mamba_layers),
        "parameters": sum(p.numel() for p in student.parameters()),
        "start": start,
        "held_out": start[config.method],
        "layers": [{"layer": layer, "relative_error": error} for layer, error in errors.items()],
    }


def _batches(
    config: InitStageConfig, inputs: Mapping[str, Path], context: StageContext
) -> Iterator[tuple[Tensor, Tensor]]:
    blocks = PackedBlocks(Shard.load(inputs["corpus"] / "train.npz"), config.seq_len, context.seed)
    for number in range(max(1, config.tokens // (config.batch_size * config.seq_len))):
        batch = blocks.batch(number, config.batch_size)
        yield torch.from_numpy(batch.tokens).to(context.device), torch.from_numpy(batch.seq_idx).to(context.device)
