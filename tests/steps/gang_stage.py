"""A stage that says who took part in it. As a program, `gang_stage.py SCRATCH`: the process of a stage that hangs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from steps import gang
from steps.config import ConfigError, TrainConfig
from steps.stage import Progress, StageContext

WAITING = "waiting"


def job(scratch: Path, seed: int = 0) -> gang.Job:
    """seed 0: ends well; 1: process 1 refuses the configuration; 2: never ends."""
    inputs, store = {"corpus": scratch / "corpus"}, str(scratch / "store")
    return gang.Job(
        "tests.steps.gang_stage",
        TrainConfig(steps=seed),
        inputs,
        scratch / "out",
        scratch,
        "cpu",
        "float32",
        seed,
        store,
        "align",
        "0" * 64,
    )


def run(config: TrainConfig, inputs: dict[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from steps import distributed

    rank = distributed.rank()
    if rank == 1 and context.seed == 1:
        raise ConfigError("batch_size 3 cannot be shared")
    if context.seed == 2:
        (context.scratch / f"{WAITING}{rank}").write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(600)
    seats: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(seats, {"rank": rank, "checkpoints": context.checkpoints is not None})
    mean = distributed.mean(torch.tensor(float(rank))).item()
    context.progress(Progress(1, 1, "steps", 2.0, {"loss": float(rank)}))
    return {"seats": seats, "mean": mean, "steps": config.steps, "inputs": sorted(inputs)}


if __name__ == "__main__":
    gang.run(job(Path(sys.argv[1]), seed=2), 2, lambda _: None)
