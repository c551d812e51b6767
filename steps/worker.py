"""One of the processes on which `steps.gang` runs a training stage: python -m steps.worker JOB, started by torchrun."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

from stage_store import Checkpoints, Store
from steps import device, gang, provenance
from steps.command_line import end_with
from steps.pipeline import foreseen
from steps.stage import Progress, StageContext


def main() -> None:
    job: gang.Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    end_with(int(os.environ[gang.AGENT_PID]))
    first = os.environ["RANK"] == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if job.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = device.gpus()[int(os.environ["LOCAL_RANK"])]
    try:
        _run(job, first)
    except Exception as error:
        if not foreseen(error):
            raise
        _say(job.scratch / gang.FAILURE, f"{type(error).__name__}: {error}")
        sys.exit(1)


def _run(job: gang.Job, first: bool) -> None:
    from steps import distributed  # torch must not be imported before it is known which GPU is this process's

    def progress(now: Progress) -> None:
        if first:
            with (job.scratch / gang.PROGRESS).open("a") as file:
                file.write(json.dumps(asdict(now)) + "\n")

    checkpoints = Checkpoints(Store(job.store), job.stage, job.key) if first else None
    context = StageContext(job.device, job.compute, job.seed, job.scratch, checkpoints, progress)
    with distributed.process_group(job.device):
        summary = importlib.import_module(job.module).run(job.config, job.inputs, job.out, context)
        if first:
            (job.scratch / gang.RESULT).write_text(json.dumps([summary, provenance.peak_memory()]))


def _say(path: Path, text: str) -> None:
    """The first process that fails is heard: the others often fail of its silence."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        pass


if __name__ == "__main__":
    main()
