"""Which kernels a round consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hybrid.bench.timed import TimedEngine

TRACED_ROUNDS = 5
LONGEST_NAME = 90


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel: launches and microseconds per round, or whatever was traced."""

    name: str
    count: float
    us: float


@torch.no_grad()
def kernels_in_a_round(engine: TimedEngine, prompts: Sequence[Sequence[int]]) -> list[Kernel]:
    """All kernels of a round, the costliest first; on a CPU its operators."""
    cuda = engine.device.type == "cuda"
    engine.restart(prompts, TRACED_ROUNDS)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as traced:
        for _ in range(TRACED_ROUNDS):
            engine.round()
        if cuda:
            torch.cuda.synchronize()
    return kernels_of(traced, TRACED_ROUNDS, DeviceType.CUDA if cuda else DeviceType.CPU)


def kernels_of(traced: profile, times: int, device: DeviceType) -> list[Kernel]:
    """All kernels of what was traced, which ran `times` times, the costliest first; on a CPU its operators."""
    found = [
        Kernel(
            event.key,
            event.count / times,
            (event.self_device_time_total if device == DeviceType.CUDA else event.self_cpu_time_total) / times,
        )
        for event in traced.key_averages()
        if event.device_type == device and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.us)


def table(title: str, kernels: Sequence[Kernel], most: int = 20, unit: str = "round") -> str:
    """The costliest `most` of them, and the sum of all; `unit` is what ran once."""
    lines = [title, f"{'µs/' + unit:>9} {'count':>6}  kernel"]
    lines += [f"{k.us:>9.1f} {k.count:>6.1f}  {k.name[:LONGEST_NAME]}" for k in kernels[:most]]
    total, count = sum(k.us for k in kernels), sum(k.count for k in kernels)
    return "\n".join([*lines, f"{total:>9.1f} {count:>6.1f}  all {len(kernels)} kinds"])
