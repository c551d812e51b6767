"""Under what circumstances something was computed: goes into manifests and the report, never into a key."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "lm-eval", "triton", "mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Python and the installed ones of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(root: Path) -> str | None:
    """Commit of the checkout, `-dirty` appended if files differ from it; None where `root` is no checkout."""
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> dict[str, int]:
    """Most bytes that this process had resident, and that torch had allocated on its GPU if it used one."""
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")  # importing it here would cost a second and tell nothing
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak
