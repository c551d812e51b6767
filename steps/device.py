"""Which device a stage runs on, and that it has it alone.

Metaflow's local scheduler starts branches and variants side by side and knows nothing of GPUs. A stage therefore takes
a lock on its device first, and only then imports torch. Nothing here imports torch: the plan is made before any stage.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import logging
import os
import platform
import runpy
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class DeviceError(RuntimeError):
    """The configuration asks for a device that this machine does not have."""


def gpu_visible() -> bool:
    """Whether the machine seems to have an NVIDIA GPU that this process may use; costs no subprocess."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def resolve(setting: str) -> str:
    """ "auto", "cpu" or "cuda" → "cpu" or "cuda". Raises DeviceError for "cuda" where there is none."""
    if setting == "cpu":
        return "cpu"
    usable = gpu_visible() and bool(gpus()) and _torch_has_cuda()
    if setting == "cuda" and not usable:
        why = "no NVIDIA GPU is visible" if not (gpu_visible() and gpus()) else "the installed torch has no CUDA"
        raise DeviceError(f"device: given 'cuda', but {why}; set device to 'auto' or 'cpu'")
    return "cuda" if usable else "cpu"


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold to select one GPU each: the entries that it holds now, else all UUIDs."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [entry.strip() for entry in allowed.split(",") if entry.strip() not in ("", "-1")]
    return [uuid for uuid, _, _ in _nvidia_smi()]


def hardware(device: str) -> dict[str, str | int]:
    """What a measured speed depends on: enters the keys of the benchmark and profile stages."""
    if device == "cuda":
        names = {(name, driver) for _, name, driver in _nvidia_smi()} or {("unknown NVIDIA GPU", "unknown")}
        name, driver = sorted(names)[0]
        return {"device": "cuda", "name": name, "driver": driver}
    return {"device": "cpu", "name": _cpu_name(), "cores": len(os.sched_getaffinity(0))}


@contextmanager
def hold(device: str, count: int = 1) -> Iterator[str]:
    """Own the CPU or `count` free GPUs of this machine until the block ends; yields their names, commas between.

    The locks are the kernel's, on files in the system's temporary folder: they go with their process, however that
    ends. With GPUs, CUDA_VISIBLE_DEVICES is narrowed to them, so torch must not have been used yet. Raises DeviceError
    where the machine has fewer.
    """
    names, wanted = (gpus(), count) if device == "cuda" else (["cpu"], 1)
    if len(names) < wanted:
        raise DeviceError(
            f"the stage's resources ask for {wanted} GPUs, but this machine shows {len(names)}: "
            "lower their `gpu` or `processes`"
        )
    held = _first_free(names, wanted)
    own = ",".join(held)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if device == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = own
        yield own
    finally:
        for fd in held.values():
            os.close(fd)
        if device == "cuda":
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _first_free(names: list[str], wanted: int) -> dict[str, int]:
    """Name → lock of as many as are wanted. All or none: two stages that each held some would wait for ever."""
    told = False
    while True:
        held: dict[str, int] = {}
        for name in names:
            fd = _open_lock(Path(tempfile.gettempdir()) / f"mamballama-{name.replace('/', '-')}.lock")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[name] = fd
            except BlockingIOError:
                os.close(fd)
            if len(held) == wanted:
                return held
        for fd in held.values():
            os.close(fd)
        if not told:
            logger.info("waiting: other stages of this machine hold %s", " and ".join(set(names) - set(held)))
            told = True
        time.sleep(POLL_SECONDS)


def _open_lock(path: Path) -> int:
    """Read-only suffices for flock. Creating comes second: Linux refuses O_CREAT on another user's file in /tmp."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


@functools.cache
def _nvidia_smi() -> tuple[tuple[str, str, str], ...]:
    """(uuid, name, driver version) of each GPU; empty without a working driver."""
    query = ["nvidia-smi", "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [tuple(part.strip() for part in line.split(",")) for line in answer.splitlines() if line.strip()]
    return tuple((row[0], row[1], row[2]) for row in rows if len(row) == 3)


@functools.cache
def _torch_has_cuda() -> bool:
    """torch says in a small file of its own what it was built for; importing it would cost a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(spec.submodule_search_locations[0]) / "version.py"
    return version.is_file() and bool(runpy.run_path(str(version)).get("cuda"))


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
