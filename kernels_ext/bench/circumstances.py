"""Hardware, versions and commit: what measured numbers depend on."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def circumstances(packages: Sequence[str], device: str = "cuda") -> dict[str, Any]:
    """The device ("cuda" or "cpu") and its driver, versions of the packages (None: not installed), the commit."""
    found: dict[str, Any] = {"hardware": f"CPU, {torch.get_num_threads()} threads"}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found = {
            "hardware": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
        }
    return {
        **found,
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in packages},
        "commit": first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(command: Sequence[str]) -> str | None:
    """First line that a command prints; None if it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.splitlines()), "").strip() or None
