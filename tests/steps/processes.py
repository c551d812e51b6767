"""Training stages on a tiny student, on as many processes as it is started on.

`torchrun … processes.py FOLDER [NAME …]`: runs these scenarios of SCENARIOS, or all; process 0 writes NAME.json, the
loop's summary, and NAME.safetensors, the student's weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import HybridForCausalLM
from stage_store import Checkpoints, Store
from steps import align, distributed, kl_distill, sft
from steps.config import AlignConfig, KLConfig, SFTConfig
from steps.loop import BatchSource, MicroBatch
from steps.stage import StageContext
from steps.students import token_batches
from steps.teacher_cache import TeacherCache
from tests.hybrid import tiny_hybrid

COMMON: dict[str, Any] = {"steps": 6, "batch_size": 4, "seq_len": 23, "warmup": 0.3, "checkpoint_every": 2}
ALIGN = AlignConfig(**COMMON, mixer_lr=3e-3)
KL = KLConfig(**COMMON, optimizer="muon", mixer_lr=3e-3, rest_lr=1e-3, weight_decay=0.01, grad_clip=0.5)
KL_IN_TWO = KL.model_copy(update={"accumulation": 2})
CACHED = KL.model_copy(update={"steps": 18, "teacher_cache": "samples:9"})
SFT = SFTConfig(**COMMON, mixer_lr=3e-3, rest_lr=1e-3)
STOPPED_AT = 5
"""Optimiser steps after which a stopped scenario ends; its newest checkpoint is of step 4."""


class Stopped(Exception):
    """In place of a crash."""


def shard(folder: Path) -> Path:
    """Documents of different lengths with short replies, so that rows differ in how many of their tokens count."""
    draw = np.random.default_rng(2)
    documents = [draw.integers(tiny_hybrid.VOCAB, size=size) for size in draw.integers(3, 70, size=40)]
    replies = [np.arange(len(d)) < 6 for d in documents]
    path = folder / "train.npz"
    Shard.of(documents, (str(i) for i in range(len(documents))), replies).save(path)
    return path


def context(folder: Path, checkpoints: Any = None) -> StageContext:
    return StageContext("cpu", "float32", seed=5, scratch=folder, checkpoints=checkpoints)


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(Store(folder / "store"), "kl_distill", "0" * 64)


def teacher() -> HybridForCausalLM:
    return tiny_hybrid.model(seed=1, n_layers=3, attention_layers=(0, 1, 2))


def student() -> HybridForCausalLM:
    return tiny_hybrid.model(n_layers=3, attention_layers=(1,))


def run_align(folder: Path) -> tuple[HybridForCausalLM, dict[str, Any]]:
    model, stage = student(), context(folder)
    return model, align.fit(teacher(), model, token_batches(shard(folder), ALIGN, stage, None), ALIGN, stage)


def run_kl(
    folder: Path, config: KLConfig = KL, kept: Any = None, through: Callable[[BatchSource], BatchSource] = lambda b: b
) -> tuple[HybridForCausalLM, dict[str, Any]]:
    model, stage = student(), context(folder, kept)
    return model, kl_distill.fit(teacher(), model, through(token_batches(shard(folder), config, stage)), config, stage)


def run_sft(folder: Path) -> tuple[HybridForCausalLM, dict[str, Any]]:
    model, stage = student(), context(folder)
    return model, sft.fit(model, token_batches(shard(folder), SFT, stage, "assistant_loss"), SFT, stage)


def run_cached(folder: Path) -> tuple[HybridForCausalLM, dict[str, Any]]:
    """Process 0 asks the teacher, all read what it wrote; two epochs."""
    model, stage = student(), context(folder)
    blocks = PackedBlocks(Shard.load(shard(folder)), CACHED.seq_len, stage.seed, cut_once=True)
    kept = Path(distributed.agreed(str(folder)))
    cache = TeacherCache(kept, blocks, tiny_hybrid.VOCAB, CACHED, stage.seed)
    if distributed.rank() == 0:
        cache.fill(teacher(), stage)
    distributed.agreed(cache.count)
    return model, kl_distill.fit_to_cache(cache, model, CACHED, stage)


def stopping(source: BatchSource) -> BatchSource:
    def batch(number: int) -> MicroBatch:
        if number == STOPPED_AT:
            raise Stopped
        return source(number)

    return batch


def run_stopped(folder: Path) -> None:
    try:
        run_kl(folder, kept=checkpoints(folder) if distributed.rank() == 0 else None, through=stopping)
    except Stopped:
        return


def run_continued(folder: Path) -> tuple[HybridForCausalLM, dict[str, Any]]:
    """From the checkpoint that another number of processes left."""
    return run_kl(folder, kept=checkpoints(folder.parent / "stopped") if distributed.rank() == 0 else None)


SCENARIOS = {
    "align": run_align,
    "kl": run_kl,
    "kl in two": lambda folder: run_kl(folder, KL_IN_TWO),
    "kl cached": run_cached,
    "sft": run_sft,
    "continued": run_continued,
}


def main() -> None:
    folder = Path(sys.argv[1])
    with distributed.process_group("cpu"):
        own = folder / str(distributed.rank())
        own.mkdir()
        for name, scenario in SCENARIOS.items():
            if name not in (sys.argv[2:] or SCENARIOS):
                continue
            model, summary = scenario(own)
            whole = distributed.gathered(model)
            if whole is not None:
                (folder / f"{name}.json").write_text(json.dumps(summary))
                save_file({n: p.detach() for n, p in whole.named_parameters()}, folder / f"{name}.safetensors")
        run_stopped(own)


if __name__ == "__main__":
    main()
