"""One thread that owns the decode engines, and the requests that wait for it.

Requests that are sampled alike are decoded together: who comes takes a free slot before the next round, and leaves it
by its own limit, by an end-of-turn token or by being cancelled, while the others go on. One that is sampled differently
waits until all have ended, and nobody who came after it is taken before. A request that is left by itself is decoded
with an engine of one row, and moves to the large one when a second comes.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from hybrid.engine import DecodeEngine, Look, Sampling

logger = logging.getLogger(__name__)

LOOK_BACK = 1
"""Rounds after which CUDA's tokens are handed out: meanwhile the device has the next one to do."""


class QueueFullError(Exception):
    """As many requests wait as may; the message says how many."""


@dataclass(eq=False)
class Job:
    """One request.

    deliver: gets lists of new tokens as rounds end, or the exception that ended it, in the worker's thread.
    seed: a seeded job that is sampled is decoded alone, so that its reply depends on nothing else. cancelled: set by
    `Worker.cancel`.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    deliver: Callable[[list[int] | Exception], None]
    cancelled: bool = False

    @property
    def alone(self) -> bool:
        return self.seed is not None and not self.sampling.greedy

    def joins(self, other: Job) -> bool:
        """Whether both can be rows of one engine at once."""
        return self is other or (self.sampling == other.sampling and not self.alone and not other.alone)


class Worker:
    """Decodes up to max_batch jobs at once; at most max_queue more wait.

    make_engine: gives an engine of so many rows. There is one of max_batch rows, and one of a single row, because rows
    without a request cost time too.
    """

    def __init__(self, make_engine: Callable[[int], DecodeEngine], max_batch: int, max_queue: int) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.engines = [make_engine(rows) for rows in sorted({1, max_batch})]
        self.look_back = LOOK_BACK if self.engines[0].device.type == "cuda" else 0
        self._engine = self.engines[0]
        self._looks: deque[tuple[Look, dict[int, Job]]] = deque()
        """Rounds that nobody has heard of yet, and whose rows they were."""
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}
        """Slot of the engine in use → its job, until its end is known."""
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        """Compile and capture what the first request would wait for, then take jobs."""
        for engine in self.engines:
            engine.generate([[0]], 1)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises QueueFullError, and ValueError for a job that no engine can decode."""
        self.engines[0].check([job.prompt], job.max_new_tokens)
        with self._change:
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already, and no more may")
            self._waiting.append(job)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Give up the job's place: at once while it waits, after the current round while it is decoded."""
        with self._change:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    @property
    def load(self) -> tuple[int, int]:
        """Jobs that wait, and jobs that are decoded."""
        with self._change:
            return len(self._waiting), len(self._running)

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self._change:
            self._closed = True
            for job in (*self._waiting, *self._running.values()):
                job.cancelled = True
            self._waiting.clear()
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while moves := self._next():
            try:
                self._round(*moves)
            except Exception as error:  # whatever these jobs run into, the next are served
                with self._change:
                    failed, self._running = list(self._running.values()), {}
                logger.exception("%d requests failed", len(failed))
                for job in failed:
                    job.deliver(error)

    def _next(self) -> tuple[DecodeEngine, dict[int, Job], dict[int, Job]] | None:
        """The engine for the next round, the slot that each running job had until now, and the jobs that begin in
        theirs; waits while there are none, and gives None once closed."""
        with self._change:
            before = self._running
            if before:
                first = next(iter(before.values()))
                fitting = list(takewhile(first.joins, self._waiting))
            else:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return None
                fitting = [job for job in self._waiting if job.joins(self._waiting[0])]
            taken = fitting[: self.max_batch - len(before)]
            self._waiting = [job for job in self._waiting if job not in taken]
            engine = next(engine for engine in self.engines if engine.batch >= len(before) + len(taken))
            kept = before if engine is self._engine else dict(enumerate(before.values()))
            free = [slot for slot in range(engine.batch) if slot not in kept]
            new = dict(zip(free, taken, strict=False))
            self._running = {**kept, **new}
            return engine, before, new

    def _round(self, engine: DecodeEngine, before: dict[int, Job], new: dict[int, Job]) -> None:
        if not before or engine is not self._engine:
            one = next(iter(self._running.values()))
            if not before:
                self._looks.clear()  # of rounds after the last end
            seed = one.seed if one.alone else None
            engine.begin(one.sampling, secrets.randbits(62) if seed is None else seed)
            for slot, theirs in enumerate(before):
                engine.adopt(self._engine, theirs, slot)
            self._engine = engine
        if new:
            engine.admit(list(new), [job.prompt for job in new.values()], [job.max_new_tokens for job in new.values()])
        engine.round()
        self._looks.append((engine.look(), dict(self._running)))
        if len(self._looks) > self.look_back:
            self._hand_out(*self._looks.popleft())

    def _hand_out(self, look: Look, jobs: dict[int, Job]) -> None:
        """Deliver what a round added to its jobs, and make room where a job has ended."""
        added, inert = look.wait()
        for slot, row in enumerate(added.tolist()):
            if new := [token for token in row if token >= 0]:
                jobs[slot].deliver(new)
        ended = {job for slot, job in jobs.items() if slot in inert}
        with self._change:
            cancelled = [slot for slot, job in self._running.items() if job.cancelled]
            self._running = {
                slot: job for slot, job in self._running.items() if slot not in cancelled and job not in ended
            }
        if cancelled:
            self._engine.end(cancelled)
