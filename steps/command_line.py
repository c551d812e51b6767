"""What happens between `python flows/distill_flow.py …` and Metaflow's own command line.

Metaflow reads its environment when it is imported and its configuration before any command of ours could run. So the
environment is completed first, and `--set leaf=value` becomes the `--config-value` that Metaflow knows. Everything that
is wrong with the configuration is said here in one line, before anything runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from steps import config, device

CONFIG_OPTIONS = ("--config", "--config-value")
SCHEDULER_PID = "MAMBALLAMA_SCHEDULER_PID"
_PR_SET_PDEATHSIG = 1


class CommandLineError(ValueError):
    """Arguments that cannot mean anything; the message says what to write instead."""


def complete_environment(root: Path, checkout: bool) -> None:
    """Defaults for what Metaflow would otherwise guess from the current folder and user; what is set stays.

    root:     the project's root. Metaflow appends `.metaflow` to its datastore root and otherwise searches upwards from
              the current folder, where a stray `.metaflow` captures the run.
    checkout: False in a code package on another machine, where Metaflow must find its own datastore.
    """
    if checkout:
        os.environ.setdefault("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(root))
    # Metaflow refuses root and a nameless user.
    if all(os.environ.get(name) in (None, "", "root") for name in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER")):
        os.environ["METAFLOW_USER"] = "mamballama"
    # A task's log is no terminal: bars of libraries would fill it with lines that were meant to overwrite one another.
    os.environ.setdefault("TQDM_DISABLE", "1")


def default_config(root: Path) -> Path:
    """The recipe of this machine: ten minutes on a GPU, or a few on a CPU."""
    return root / "configs" / ("smollm2_gpu.toml" if device.gpu_visible() else "smollm2_cpu.toml")


def translate(argv: Sequence[str], default: Path, stages: Sequence[str]) -> list[str]:
    """Arguments as Metaflow takes them, checked.

    argv:    without the program's name.
    default: configuration that holds where none is given.
    stages:  names that `--force` allows.
    Raises ConfigError and CommandLineError.
    """
    overrides, rest = _take(argv, "--set", 1)
    given = [[option, *value] for option in CONFIG_OPTIONS for value in _take(rest, option, 2)[0]]
    forced = [value for (value,) in _take(rest, "--force", 1)[0]]
    command = next((word for word in rest if word in ("run", "resume")), "")
    if not command and not overrides:
        return list(argv)  # show, card, step, …: Metaflow also starts itself with arguments of its own kind
    if command == "resume" and (overrides or given or forced):
        raise CommandLineError(
            "resume continues a run as it was configured and takes no --set, --config, --config-value or --force; "
            "use `run` with them instead: finished stages are reused from the store"
        )
    for name in forced:
        if name not in stages:
            raise CommandLineError(f"--force: given {name!r}; allowed: {', '.join(stages)}")
    if len(given) > 1:
        raise CommandLineError(f"give one of {' or '.join(CONFIG_OPTIONS)} once, not {len(given)} of them")
    if not overrides and not given:
        return rest
    base = _read(*given[0]) if given else config.load(default)
    if not overrides:
        return rest
    changed = config.override(base, [text for (text,) in overrides])
    for option in CONFIG_OPTIONS:
        rest = _take(rest, option, 2)[1]
    return ["--config-value", "config", json.dumps(changed.model_dump(mode="json")), *rest]


def stop_when_told() -> None:
    """The scheduler: SIGTERM ends it as Ctrl-C does, and its tasks with it (Metaflow gives them five seconds)."""
    os.environ[SCHEDULER_PID] = str(os.getpid())
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def stop_with_scheduler() -> None:
    """A task: killed by the kernel when its scheduler is gone, however that ended; else it would hold the device."""
    if SCHEDULER_PID in os.environ:
        end_with(int(os.environ[SCHEDULER_PID]))


def end_with(parent: int) -> None:
    """This process is killed by the kernel when its parent, which `parent` names, is gone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, is gone")


def _read(option: str, name: str, value: str) -> config.Config:
    if name != "config":
        raise CommandLineError(f"{option}: given {name!r}; the one configuration of this flow is named 'config'")
    return config.load(value) if option == "--config" else config.parse_text(value, option)


def _take(argv: Sequence[str], option: str, count: int) -> tuple[list[list[str]], list[str]]:
    """Every `option` with its `count` values (`--option=value` too), and what remains."""
    found: list[list[str]] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == option:
            if len(words) < count:
                raise CommandLineError(f"{option} needs {count} value{'s' if count > 1 else ''} after it")
            found.append([words.pop(0) for _ in range(count)])
        elif count == 1 and word.startswith(f"{option}="):
            found.append([word.partition("=")[2]])
        else:
            rest.append(word)
    return found, rest
