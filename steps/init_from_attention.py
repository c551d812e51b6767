"""Stage: a student whose Mamba mixers start from the attention that they replace (2408.15237 §2.2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import HybridForCausalLM, attention_layers
from hybrid.calibrate import calibrate_out_proj
from hybrid.init_map import Method, from_attention, new_mixers, scale_out_proj
from steps.config import ConfigError, InitConfig, InitStageConfig
from steps.stage import StageContext
from steps.students import autocast_type, load_student, load_teacher, measure, save_student
from steps.teacher import fetch, token_mismatch

NEAR_IDENTITY = 0.01
"""Factor on out_proj. On SmolLM2-135M with 15 of 30 layers replaced the KL starts at 11.3 with 1, at 5.0 with 0 and at
3.5 with this."""


def run(config: InitStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Summary: layers kept and replaced, relative error by layer, and the KL that each initialisation starts from.

    Continues from the student `previous` where that is among the inputs, else from the teacher. Raises ConfigError if
    attention is to be kept that the student it continues from has not, or if their methods do not go together. A
    `checkpoint` is taken as it is; ConfigError if its tokens are not the teacher's.
    """
    if config.checkpoint:
        return _taken(config, inputs, out, context)
    teacher = load_teacher(inputs, context)
    base = load_student({"student": inputs["previous"]}, context) if "previous" in inputs else teacher
    choice = _layer_choice(inputs)
    kept = attention_layers(config.attention, teacher.config.n_layers, choice["ranking"] if choice else None)
    start: dict[str, dict[str, float]] = {}
    copied: Method = "paper" if config.method == "paper" else "copy"
    student = build(config, base, kept, copied, context.seed)
    start[copied] = measure(teacher, student, inputs, context)
    errors: dict[int, float] = {}
    if config.method == "calibrated":
        if new_mixers(base, student):
            errors = calibrate(config, base, student, inputs, context)
        start["calibrated"] = measure(teacher, student, inputs, context)
    if config.method == "near_identity":
        scale_out_proj(base, student, NEAR_IDENTITY)
        start["near_identity"] = measure(teacher, student, inputs, context)
    if config.method != "paper" and config.measure_paper and base is teacher:
        shared = "legacy" if config.mixer == "mamba1" else "heads"
        published = config.model_copy(update={"rope": False, "window": 0, "ngroups": "kv_heads", "gqa_mapping": shared})
        start["paper"] = measure(teacher, build(published, teacher, kept, "paper", context.seed), inputs, context)
    save_student(student, inputs, out)
    return {
        "method": config.method,
        "mixer": student.config.mixer,
        "layer_choice": choice,
        "attention_layers": list(kept),
        "replaced_layers": list(student.config.mamba_layers),
        "carried_over": list(base.config.mamba_layers),
        "parameters": sum(p.numel() for p in student.parameters()),
        "start": start,
        "held_out": start[config.method],
        "layers": [{"layer": layer, "relative_error": error} for layer, error in errors.items()],
    }


def _taken(config: InitStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    fingerprint = fetch(config.checkpoint, out, context)
    if mismatch := token_mismatch(inputs["teacher"], out):
        raise ConfigError(f"checkpoint {config.checkpoint} is no student of this teacher: {mismatch}")
    student = load_student({"student": out}, context)
    held_out = measure(load_teacher(inputs, context), student, inputs, context)
    return {
        "method": "checkpoint",
        "source": config.checkpoint,
        "fingerprint": fingerprint,
        "mixer": student.config.mixer,
        "attention_layers": list(student.config.attention_layers),
        "replaced_layers": list(student.config.mamba_layers),
        "carried_over": list(student.config.mamba_layers),
        "parameters": sum(p.numel() for p in student.parameters()),
        "start": {"checkpoint": held_out},
        "held_out": held_out,
        "layers": [],
    }


def build(
    config: InitConfig, base: HybridForCausalLM, kept: tuple[int, ...], method: Method, seed: int
) -> HybridForCausalLM:
    """A student that keeps the attention of layers `kept`, with mixers as `hybrid.init_map` starts them."""
    try:
        return from_attention(
            base,
            kept,
            method,
            mixer=config.mixer,
            gqa_mapping=config.gqa_mapping,
            d_state=config.d_state if config.mixer == "mamba1" else None,
            gate_bias=config.gate_bias,
            gate_scale=config.gate_scale,
            a_min=config.a_min,
            a_max=config.a_max,
            rope=config.rope,
            ngroups=base.config.n_heads if config.ngroups == "heads" else None,
            window=config.window,
            seed=seed,
            share=True,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def calibrate(
    config: InitConfig,
    base: HybridForCausalLM,
    student: HybridForCausalLM,
    inputs: Mapping[str, Path],
    context: StageContext,
) -> dict[int, float]:
    """Fit every new out_proj of the student in closed form on the corpus; layer → relative error left."""
    return calibrate_out_proj(base, student, _batches(config, inputs, context), config.ridge, autocast_type(context))


def _layer_choice(inputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """method and ranking of the stage layer_scores, where the variant's ratio is taken from it."""
    if "layer_scores" not in inputs:
        return None
    scores = json.loads((inputs["layer_scores"] / "scores.json").read_text())
    return {"method": scores["method"], "ranking": scores["ranking"]}


def _batches(config: InitConfig, inputs: Mapping[str, Path], context: StageContext) -> Iterator[tuple[Tensor, Tensor]]:
    blocks = PackedBlocks(Shard.load(inputs["corpus"] / "train.npz"), config.seq_len, context.seed)
    for number in range(max(1, config.tokens // (config.batch_size * config.seq_len))):
        batch = blocks.batch(number, config.batch_size)
        yield torch.from_numpy(batch.tokens).to(context.device), torch.from_numpy(batch.seq_idx).to(context.device)
