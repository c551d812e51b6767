"""Programmatic dependent launch: a kernel starts while the one before it in the stream is still running.

A kernel lets the next one start first thing (`gdc_launch_dependents`) and waits (`gdc_wait`, on every path) ahead of
its first access to memory that any kernel writes; what none writes, such as weights, may be read sooner. The wait is
for the whole kernel before, which has waited for its own predecessor, so everything earlier is done and visible too.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_PROGRAMS = 16 * 132
"""With more programs than an H200 holds at once, a start that is a microsecond earlier no longer counts."""


@cache
def available(device: torch.device) -> bool:
    """Whether a device can start dependent kernels early: CUDA of compute capability 9.0 or later."""
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(config: dict[str, Any], device: torch.device, programs: int) -> dict[str, Any]:
    """`config` with PDL, a kernel's constexpr, for its key launch_pdl; without that key small launches have it on."""
    options = dict(config)
    wanted = options.pop("launch_pdl", programs <= MOST_PROGRAMS)
    on = bool(wanted) and available(device)
    return options | {"PDL": on} | ({"launch_pdl": True} if on else {})
