"""What a stage is. A stage is a plain function in its own module:

    run(config, inputs, out, context) -> summary

config:   the stage's own configuration model and nothing else (`steps.config`).
inputs:   role → folder of a finished upstream stage, read-only.
out:      empty folder to write the result into; committed by the caller.
context:  device, seed, checkpoints, progress.
summary:  JSON-ready figures for the manifest and the report.

It knows nothing of Metaflow, of stores or of the stages around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Checkpoints(Protocol):
    """Resumable state of a running stage, kept under its key (`stage_store.checkpoints`)."""

    def save(self, step: int, write: Callable[[Path], None]) -> None: ...

    def latest(self) -> tuple[int, Path] | None: ...

    def work(self) -> Path: ...


@dataclass(frozen=True)
class Progress:
    """One line of a long stage's life: `done` of `total` units, units per second, named figures such as loss, and what
    else there is to say."""

    done: float
    total: int
    unit: str
    rate: float
    figures: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / self.rate if self.rate > 0 else float("inf")

    def __str__(self) -> str:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        pace = f"{self.rate:.3g} {self.unit}/s  {self.seconds_left:.0f} s left"
        return f"{self.done}/{self.total} {self.unit}  {pace}  {figures}{self.detail}"


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its configuration and inputs.

    device:      "cpu" or "cuda".
    compute:     data type of matrix products, "bfloat16" or "float32".
    seed:        seeds every random choice of the stage.
    scratch:     folder that is thrown away when the stage ends.
    checkpoints: state that outlives a crash, or None where nothing is to be resumed (tests).
    progress:    called every few seconds by long stages.
    """

    device: str
    compute: str
    seed: int
    scratch: Path
    checkpoints: Checkpoints | None = None
    progress: Callable[[Progress], None] = lambda _: None
