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
    """One kind of kernel: launches and microseconds per round."""

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
    found = [
        Kernel(
            event.key,
            event.count / TRACED_ROUNDS,
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / TRACED_ROUNDS,
        )
        for event in traced.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
    ]
    return sorted(found, key=lambda kernel: -kernel.us)


def table(title: str, kernels: Sequence[Kernel], most: int = 20) -> str:
    """The costliest `most` of them, and the sum of all."""
    lines = [title, f"{'µs/round':>9} {'count':>6}  kernel"]
    lines += [f"{k.us:>9.1f} {k.count:>6.1f}  {k.name[:LONGEST_NAME]}" for k in kernels[:most]]
    total, count = sum(k.us for k in kernels), sum(k.count for k in kernels)
    return "\n".join([*lines, f"{total:>9.1f} {count:>6.1f}  all {len(kernels)} kinds"])
