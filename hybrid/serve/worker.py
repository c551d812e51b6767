"""One thread that owns the decode engines, and the requests that wait for it.

Requests that wait together and are sampled alike are decoded as one batch; who comes while a batch runs waits for its
end, because rows of a `DecodeEngine` begin together. A request ends by its own limit, by an end-of-turn token or by
being cancelled, and then its row costs nothing more than an inert one.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hybrid.engine import DecodeEngine, Sampling

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may; the message says how many."""


@dataclass(eq=False)
class Job:
    """One request.

    deliver: gets lists of new tokens as rounds end, or the exception that ended the batch, in the worker's thread.
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


class Worker:
    """Decodes up to max_batch jobs at once; at most max_queue more wait.

    make_engine: gives an engine of so many rows. There is one of max_batch rows, and one of a single row, because rows
    without a request cost time too.
    """

    def __init__(self, make_engine: Callable[[int], DecodeEngine], max_batch: int, max_queue: int) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.engines = [make_engine(rows) for rows in sorted({1, max_batch})]
        self._waiting: list[Job] = []
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._running: list[Job] = []

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
        """Jobs that wait, and jobs of the batch that is decoded, those that have ended before it included."""
        with self._change:
            return len(self._waiting), len(self._running)

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self._change:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancelled = True
            self._waiting.clear()
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._decode(batch)
            except Exception as error:  # whatever one batch runs into, the next is served
                logger.exception("a batch of %d requests failed", len(batch))
                for job in batch:
                    job.deliver(error)

    def _next(self) -> list[Job]:
        """The longest waiting job and those that can be decoded with it; nothing once closed."""
        with self._change:
            self._running = []
            self._change.wait_for(lambda: self._waiting or self._closed)
            first = self._waiting[:1]
            batch = first + [
                job
                for job in self._waiting[1:]
                if job.sampling == first[0].sampling and not job.alone and not first[0].alone
            ]
            self._running = batch[: self.max_batch]
            self._waiting = [job for job in self._waiting if job not in self._running]
            return self._running

    def _decode(self, batch: list[Job]) -> None:
        def hand_out(tokens: Tensor) -> list[int]:
            for job, row in zip(batch, tokens.tolist(), strict=True):
                if new := [token for token in row if token >= 0]:
                    job.deliver(new)
            return [row for row, job in enumerate(batch) if job.cancelled]

        engine = next(engine for engine in self.engines if engine.batch >= len(batch))
        seed = batch[0].seed if batch[0].alone else None
        engine.generate(
            [job.prompt for job in batch],
            [job.max_new_tokens for job in batch],
            seed=secrets.randbits(62) if seed is None else seed,
            sampling=batch[0].sampling,
            callback=hand_out,
        )
