"""Stage: distil the teacher's full distribution into the student (2408.15237 §3, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import HybridConfig, HybridForCausalLM
from steps import distributed
from steps.config import KLConfig
from steps.loop import BatchSource, train
from steps.losses import kl_loss
from steps.stage import StageContext
from steps.students import TokenBatch, load_student, load_teacher, measure, save_student, token_batches
from steps.teacher import fetch, token_mismatch
from steps.teacher_cache import CachedBatch, TeacherCache, cached_kl_loss
from steps.utilisation import FORWARD, matrix_weights


class LargerTeacherError(ValueError):
    """A model of other tokens than the student's; the message names both sides."""


def run(config: KLConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Token-mean divergence in nats over every token whose successor is in the same document.

    Raises LargerTeacherError where the tokens of config.teacher are not the student's, SourceError and TeacherError as
    the teacher stage does, TeacherCacheError.
    """
    student = load_student(inputs, context)
    shard = inputs["corpus"] / "train.npz"
    about: dict[str, Any] = {}
    taught, teacher = inputs, None
    if config.teacher:
        taught, about["teacher"] = _other_teacher(config.teacher, inputs, context)
    if config.teacher_cache == "none":
        teacher = load_teacher(taught, context)
        summary = fit(teacher, student, token_batches(shard, config, context), config, context)
    else:
        cache = _filled_cache(config, taught, shard, context)
        about["teacher_cache"] = {"kept": config.teacher_cache, "blocks": cache.count, "bytes": cache.bytes}
        summary = fit_to_cache(cache, student, config, context)
    save_student(student, inputs, out)
    if config.teacher:
        teacher = teacher or load_teacher(taught, context)
        about["teacher"]["held_out"] = measure(teacher, student, inputs, context)
        teacher = None
    return {**summary, **about, "held_out": measure(teacher or load_teacher(inputs, context), student, inputs, context)}


def _other_teacher(
    source: str, inputs: Mapping[str, Path], context: StageContext
) -> tuple[dict[str, Path], dict[str, Any]]:
    """inputs with the teacher of this source in the place of the stage's, and what it is."""
    folder = context.scratch / "teacher"
    fingerprint = ""
    if distributed.rank() == 0:
        fingerprint = fetch(source, folder, context)
        if mismatch := token_mismatch(folder, inputs["student"]):
            raise LargerTeacherError(
                f"kl_distill.teacher {source}: {mismatch}; it can only teach a student of its own tokens"
            )
    fingerprint = distributed.agreed(fingerprint)  # when it is known, the files are there
    return {**inputs, "teacher": folder}, {"source": source, "fingerprint": fingerprint}


def _filled_cache(config: KLConfig, inputs: Mapping[str, Path], shard: Path, context: StageContext) -> TeacherCache:
    """Filled by process 0 while the others wait, in a folder that outlives a crash if there is one."""
    folder = Path(distributed.agreed(str(context.checkpoints.work() if context.checkpoints else context.scratch)))
    blocks = PackedBlocks(Shard.load(shard), config.seq_len, context.seed, cut_once=True)
    vocab_size = HybridConfig.from_folder(inputs["teacher"]).vocab_size
    cache = TeacherCache(folder, blocks, vocab_size, config, context.seed)
    if distributed.rank() == 0 and cache.filled < cache.count:
        cache.fill(load_teacher(inputs, context), context)
    distributed.agreed(cache.count)
    return cache


def fit(
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    batches: BatchSource,
    config: KLConfig,
    context: StageContext,
) -> dict[str, Any]:
    """Train the student in place on `TokenBatch`es; returns the loop's summary."""

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
            config.ce_weight / config.kl_weight,
        )
        return config.kl_weight * loss, {}

    return train(
        student,
        batches,
        loss_function,
        config,
        context,
        teacher=teacher,
        forward_flops=FORWARD * matrix_weights(teacher),
        one_shape=True,
    )


def fit_to_cache(
    cache: TeacherCache, student: HybridForCausalLM, config: KLConfig, context: StageContext
) -> dict[str, Any]:
    """`fit` where what the teacher says is known already."""

    def loss_function(model: HybridForCausalLM, batch: CachedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch.tokens, batch.seq_idx)
        weight = config.ce_weight / config.kl_weight
        loss = cached_kl_loss(hidden, model.lm_head_weight, batch, cache.kind, config.temperature, weight)
        return config.kl_weight * loss, {}

    return train(student, cache.batches(config), loss_function, config, context, one_shape=True)
