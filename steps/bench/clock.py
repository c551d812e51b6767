"""Times of the optimiser steps of a loop that knows nothing of being timed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from hybrid.bench.trace import Kernel, kernels_of, table

MOST_KERNELS = 25
BUSY = 0.9
"""A step whose kernels take less of its time than this waits for the host."""


@dataclass(frozen=True)
class StepProfile:
    """Where the time of an optimiser step goes; everything per step, milliseconds.

    step_ms: from step to step, the device awaited at both ends. kernels_ms: the kernels one after another. host_ms:
    until the host had issued the step, its waits included. waits, wait_ms: calls in which the host waits for the
    device, and how long.
    """

    kernels: list[Kernel]
    step_ms: float
    kernels_ms: float
    host_ms: float
    launches: float
    waits: float
    wait_ms: float

    @property
    def launch_bound(self) -> bool:
        return self.kernels_ms < BUSY * self.step_ms

    def text(self, title: str) -> str:
        bound = "the device waits for the host" if self.launch_bound else "the device is busy"
        return (
            f"{table(f'kernels of one step of {title}:', self.kernels, MOST_KERNELS, 'step')}\n"
            f"{self.step_ms:.2f} ms per step, {self.kernels_ms:.2f} ms in kernels ({bound}); "
            f"the host issues {self.launches:.0f} launches within {self.host_ms:.2f} ms, "
            f"of which it waits {self.wait_ms:.2f} ms in {self.waits:.0f} calls"
        )

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; of the kernels the costliest."""
        costliest = [asdict(kernel) for kernel in self.kernels[:MOST_KERNELS]]
        return {**vars(self), "kernels": costliest, "launch_bound": self.launch_bound}


class StepClock:
    """Inside the block, marks the end of every optimiser step, whoever takes it: CUDA events, on a CPU the wall clock.

    The first `warm_up` steps are not timed, the next `steps` are, and `profiled` more are traced. Nothing waits for the
    device while steps are timed. Once the loop has ended: milliseconds, first_step_s and, on CUDA, the loop's
    peak_memory_bytes and held_memory_bytes.
    """

    def __init__(self, device: str, warm_up: int, steps: int, profiled: int = 0) -> None:
        self.cuda = device == "cuda"
        self.warm_up, self.timed, self.profiled = warm_up, steps, profiled
        self.first_step_s = 0.0
        self.peak_memory_bytes: int | None = None
        self.held_memory_bytes: int | None = None
        self.profile: StepProfile | None = None
        self._marks: list[Any] = []

    @property
    def steps(self) -> int:
        """How many steps the loop has to take."""
        return self.warm_up + self.timed + self.profiled

    def __enter__(self) -> StepClock:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self._began = self._now()
        self._handle = register_optimizer_step_post_hook(self._stepped)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        if self.cuda:
            torch.cuda.synchronize()

    @property
    def milliseconds(self) -> list[float]:
        """Of each timed step."""
        marks = self._marks[self.warm_up - 1 : self.warm_up + self.timed]
        pairs = zip(marks, marks[1:], strict=False)
        return [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]

    def _stepped(self, *_: Any) -> None:
        done = len(self._marks) + 1
        if done == 1:
            self.first_step_s = self._now() - self._began
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())
        if done == self.warm_up + self.timed:
            if self.cuda:
                self.peak_memory_bytes = torch.cuda.max_memory_allocated()
                self.held_memory_bytes = torch.cuda.max_memory_reserved()
            if self.profiled:
                self._trace = profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])
                self._trace.start()
                self._traced_from = self._now()
        if self.profiled and done == self.steps:
            self._end_trace()

    def _end_trace(self) -> None:
        issued = time.perf_counter() - self._traced_from
        ended = self._now() - self._traced_from
        self._trace.stop()
        steps = self.profiled
        kernels = kernels_of(self._trace, steps, DeviceType.CUDA if self.cuda else DeviceType.CPU)
        calls = kernels_of(self._trace, steps, DeviceType.CPU) if self.cuda else []  # of the CUDA runtime
        waits = [call for call in calls if "Synchronize" in call.name]
        self.profile = StepProfile(
            kernels,
            ended / steps * 1e3,
            sum(kernel.us for kernel in kernels) / 1e3,
            issued / steps * 1e3,
            sum(call.count for call in calls if "Launch" in call.name),
            sum(call.count for call in waits),
            sum(call.us for call in waits) / 1e3,
        )

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
