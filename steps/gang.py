"""A training stage on several GPUs, of this host or of several: processes that torchrun starts and ends (`steps.worker`
is what they run), and what passes between them and the stage's own process, by files in the stage's scratch folder.

    python -m steps.gang PARENT ARGUMENT …    torchrun itself, which ends with the process PARENT
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.command_line import end_with
from steps.config import Model
from steps.stage import Progress

JOB, PROGRESS, RESULT, FAILURE = "job.pickle", "progress.jsonl", "result.json", "failure.txt"
AGENT_PID = "MAMBALLAMA_AGENT_PID"
POLL_SECONDS = 0.5
ASK_SECONDS = 10.0
FIRST_PORT, PORTS = 20000, 10000


class GangFailed(RuntimeError):
    """A process of the stage ended for a reason that its user can act on; the message is what it said."""


@dataclass(frozen=True)
class Seat:
    """Which of the hosts of a stage this is, from 0, and the address of the first."""

    index: int = 0
    hosts: int = 1
    address: str = "127.0.0.1"


ALONE = Seat()


@dataclass(frozen=True)
class Job:
    """What every process of a stage needs: the arguments of `module`.run, what its context says, and the key under
    which process 0 keeps checkpoints in the store."""

    module: str
    config: Model
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    device: str
    compute: str
    seed: int
    store: str
    stage: str
    key: str


def run(
    job: Job,
    processes: int,
    progress: Callable[[Progress], None],
    seat: Seat = ALONE,
    needless: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Run the stage on so many processes of each host; the summary and the `provenance.peak_memory` of process 0, None
    on other hosts than its own, and where the work turned out to be `needless`, which is asked now and then.

    Raises GangFailed; RuntimeError where a process ended in another way, which its own traceback in the log tells.
    """
    path = job.scratch / JOB
    path.write_bytes(pickle.dumps(job))
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "steps.gang", str(os.getpid()), *_meeting(job.key, seat)]
    command += [f"--nproc-per-node={processes}", "-m", "steps.worker", str(path)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    torchrun = subprocess.Popen(command, env=environment)
    try:
        told, asked = 0, time.monotonic()
        while torchrun.poll() is None:
            time.sleep(POLL_SECONDS)
            told = _pass_on(job.scratch / PROGRESS, told, progress)
            if time.monotonic() - asked > ASK_SECONDS:
                asked = time.monotonic()
                if needless():
                    return None
        _pass_on(job.scratch / PROGRESS, told, progress)
    finally:
        torchrun.terminate()  # it ends its processes; of one that has ended this does nothing
        torchrun.wait()
    if torchrun.returncode == 0:
        return None if seat.index else json.loads((job.scratch / RESULT).read_text())
    failure = job.scratch / FAILURE
    if failure.is_file():
        raise GangFailed(failure.read_text())
    raise RuntimeError(f"{job.stage}: its {processes} processes ended with code {torchrun.returncode}; see above")


def _meeting(key: str, seat: Seat) -> list[str]:
    """How torchrun's hosts find each other. Stages that run side by side meet at ports of their own."""
    if seat.hosts == 1:
        return ["--standalone"]
    port = FIRST_PORT + int(key[:4], 16) % PORTS
    return [
        f"--nnodes={seat.hosts}",
        f"--node-rank={seat.index}",
        f"--master-addr={seat.address}",
        f"--master-port={port}",
    ]


def _pass_on(path: Path, told: int, progress: Callable[[Progress], None]) -> int:
    """Report the whole lines of the file from byte `told` on; where to go on from."""
    if not path.is_file():
        return told
    with path.open("rb") as file:
        file.seek(told)
        lines = file.read().rpartition(b"\n")
    for line in lines[0].splitlines():
        progress(Progress(**json.loads(line)))
    return told + len(lines[0]) + len(lines[1])


def main() -> None:
    end_with(int(sys.argv[1]))
    os.environ[AGENT_PID] = str(os.getpid())

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[2:])
    except ChildFailedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
