"""Microseconds of device time under a CUDA graph."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 7
GRAPH_SECONDS = 0.01
"""Calls are repeated within one graph until launching them one by one would take about this long."""
REPEAT_US = 2000.0
"""Replays of one repeat take at least this long, so that the gaps between replays do not count."""
WARM_UP_SECONDS = 0.5
"""For so long the device works before its bandwidth is measured, to reach its clocks."""


@dataclass(frozen=True)
class Timing:
    """Time per call in microseconds: median and interquartile range over the repeats."""

    median_us: float
    iqr_us: float
    repeats: int


def time_graph(calls: Sequence[Callable[[], Any]], repeats: int = REPEATS) -> Timing:
    """Capture the calls one after another in a CUDA graph, replay it, and give the mean time per call of each repeat.

    The calls should do equal work on different memory, together more than the L2 cache holds, where the real workload
    would find its data cold. Each is called before the capture, which compiles what must be compiled; outputs are
    dropped. Needs CUDA; the calls must not synchronise.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        started = time.perf_counter()
        for call in calls:
            call()
        stream.synchronize()
    cycles = max(1, math.ceil(GRAPH_SECONDS / (time.perf_counter() - started)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(cycles):
            for call in calls:
                call()
    once = _replay_us(graph, 1)  # also the warm-up
    replays = max(1, min(50, math.ceil(REPEAT_US / once)))
    per_call = [_replay_us(graph, replays) / (cycles * len(calls)) for _ in range(repeats)]
    lower, median, upper = statistics.quantiles(per_call, n=4, method="inclusive")
    return Timing(median, upper - lower, repeats)


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds that `replays` replays take together."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(replays):
        graph.replay()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) * 1000


def copy_bandwidth(size: int = 2 << 30) -> float:
    """Bytes per second, read and written counted, of moving `size` bytes from device memory to device memory.

    The faster of two ways: `copy_`, which in a CUDA graph is a memcpy node (2.8 TB/s on an H200), and a kernel on the
    multiprocessors, which is what other kernels can be compared with.
    """
    source = torch.zeros(size // 4, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 0.0, out=target))
    ended = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < ended:
        ways[1]()
        torch.cuda.synchronize()
    return 2 * size / (min(time_graph([way]).median_us for way in ways) * 1e-6)
