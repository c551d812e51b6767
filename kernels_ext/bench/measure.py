"""One row: check a kernel against its reference, and only if it is right, time it and what it is compared with."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_ext.bench.timing import Timing

Call = Callable[[], Any]
Config = Mapping[str, Any]
Timer = Callable[[Sequence[Call]], Timing]

FP32 = 2e-6
BF16 = 5e-3
BF16_STATE = 1e-2
"""Largest relative Frobenius error for float32, for bfloat16 activations, and for a state stored in bfloat16."""


class UnavailableError(RuntimeError):
    """Something to be measured is not there: a kernel, or a package of a baseline."""


def load(module: str, name: str) -> Callable[..., Any]:
    """A function of kernels_ext. UnavailableError if its module or itself is missing."""
    try:
        return getattr(importlib.import_module(f"kernels_ext.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"missing: kernels_ext.{module}.{name} ({error})") from error


@dataclass(frozen=True)
class Deviation:
    """How far an output lies from its reference, and how far it may."""

    what: str
    value: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.value <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{self.what} {self.value:.2e} > {self.tolerance:.0e}"


@dataclass(frozen=True)
class Phase:
    """Calls of equal work, and the share of rounds that are of this kind."""

    calls: Sequence[Call]
    weight: float = 1.0


@dataclass(frozen=True)
class Baseline:
    """What a kernel is compared with: one call does the same work as one call of the kernel.

    `candidates` prepares it, one list of calls per way to configure it; the fastest counts. It may raise
    UnavailableError. `seconds`: how long compiling it takes where that is long; then it is measured last.
    """

    name: str
    candidates: Callable[[], Sequence[Sequence[Call]]]
    check: Callable[[], Sequence[Deviation]] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """A bound of the project on one number of a row: "tb_s", "us", "states_moved", or the "ratio" to a baseline."""

    quantity: str
    bound: float
    baseline: str = ""

    def __str__(self) -> str:
        if self.quantity == "ratio":
            return f"≥ {self.bound:g}× {self.baseline}"
        sign, unit = {"tb_s": ("≥", "TB/s"), "us": ("≤", "µs"), "states_moved": ("≤", "states")}[self.quantity]
        return f"{sign} {self.bound:g} {unit}"

    def judge(self, row: Row) -> bool | None:
        """Whether the row meets it; None if the number was not measured."""
        if self.quantity == "ratio":
            value = next((b.get("ratio") for b in row.baselines if b["name"] == self.baseline), None)
        else:
            value = getattr(row, self.quantity)
        if value is None or row.us is None:
            return None
        return value >= self.bound if self.quantity in ("tb_s", "ratio") else value <= self.bound


@dataclass(frozen=True)
class Workload:
    """Data on the device, and what to do with it. `bytes` and `states` are per call, means over the phases."""

    phases: Callable[[Config | None], Sequence[Phase]]
    check: Callable[[Config | None], Sequence[Deviation]]
    bytes: float
    states: float | None = None
    baselines: Sequence[Baseline] = ()


@dataclass(frozen=True)
class Setup:
    """Where the data lives, how many bytes of it are gone through before the same is used again, and where a kernel
    comes from: `kernel(module, name)`."""

    device: str = "cuda"
    working_set: float = 4e8
    kernel: Callable[[str, str], Callable[..., Any]] = load

    def copies(self, size: float, most: int = 400) -> int:
        """How many copies of `size` bytes fill the working set."""
        return max(1, min(most, math.ceil(self.working_set / size)))


@dataclass(frozen=True)
class Case:
    """One row of the table. `configs`: launch parameters to try with --sweep besides the default; rows that are not
    `swept` are left out there unless --only names them."""

    op: str
    shape: str
    dtype: str
    prepare: Callable[[Setup], Workload]
    state_dtype: str = ""
    targets: Sequence[Target] = ()
    configs: Sequence[Config] | Callable[[Setup], Sequence[Config]] = ()
    swept: bool = True


@dataclass
class Row:
    """What is reported of a case; `note` says why there is no time. Times in µs per call, `tb_s` in 1e12 bytes/s."""

    op: str
    shape: str
    dtype: str
    state_dtype: str
    note: str = ""
    us: float | None = None
    iqr_us: float | None = None
    repeats: int | None = None
    bytes: float | None = None
    tb_s: float | None = None
    copy_share: float | None = None
    states_moved: float | None = None
    phases: list[dict[str, float]] = field(default_factory=list)
    deviations: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected tensor, in float64."""
    difference, scale = (value.double() - expected.double()).norm(), expected.double().norm()
    return (difference / scale.clamp_min(torch.finfo(torch.float64).tiny)).item()


def compare(values: Iterable[tuple[str, Tensor, Tensor]], tolerance: float) -> list[Deviation]:
    """Deviations of (name, value, expected) triples, all with one tolerance."""
    return [Deviation(name, relative_error(value, expected), tolerance) for name, value, expected in values]


def measure(case: Case, setup: Setup, timer: Timer, copy: float | None) -> tuple[Row, list[tuple[float, Call]]]:
    """Check, then time the case and its baselines. `copy`: the device's copy bandwidth in bytes/s.

    Returns the row and what is left to do: baselines that take long to compile, with their seconds; calling one adds
    it to the row.
    """
    row = Row(case.op, case.shape, case.dtype, case.state_dtype)
    later: list[tuple[float, Call]] = []
    try:
        work = case.prepare(setup)
        fault = _faults(work.check(None), row.deviations)
        if fault:
            row.note = f"wrong: {fault}"
            return row, later
        phases = work.phases(None)
        mean, timings = _mean(phases, timer)
    except Exception as error:  # a kernel that does not compile must not take the other rows with it
        row.note = _reason(error)
        return row, later
    row.us, row.iqr_us, row.repeats = mean.median_us, mean.iqr_us, mean.repeats
    if len(phases) > 1:
        row.phases = [{"weight": p.weight, **asdict(t)} for p, t in zip(phases, timings, strict=True)]
    row.bytes, row.states_moved = work.bytes, work.states
    row.tb_s = work.bytes / row.us * 1e-6
    row.copy_share = None if copy is None else row.tb_s * 1e12 / copy
    for baseline in work.baselines:
        if baseline.seconds:
            later.append((baseline.seconds, partial(_add_baseline, row, case, baseline, timer)))
        else:
            _add_baseline(row, case, baseline, timer)
    _judge(row, case)
    return row, later


def sweep(case: Case, setup: Setup, timer: Timer, copy: float | None, in_time: Callable[[], bool]) -> Row:
    """The case with its default launch parameters and with each of its `configs`, while there is time; no baselines."""
    try:
        work = replace(case.prepare(setup), baselines=())
        configs = case.configs(setup) if callable(case.configs) else case.configs
    except Exception as error:
        return Row(case.op, case.shape, case.dtype, case.state_dtype, note=_reason(error))
    row, _ = measure(replace(case, prepare=lambda setup: work), setup, timer, copy)
    for config in configs:
        entry: dict[str, Any] = {"config": dict(config)}
        row.sweep.append(entry)
        if not in_time():
            entry["note"] = "skipped: out of time"
            continue
        try:
            fault = _faults(work.check(config))
            if fault:
                entry["note"] = f"wrong: {fault}"
            else:
                entry["us"] = _mean(work.phases(config), timer)[0].median_us
        except Exception as error:
            entry["note"] = _reason(error)
    return row


def _mean(phases: Sequence[Phase], timer: Timer) -> tuple[Timing, list[Timing]]:
    """Time per call over the phases by their weights, and that of each; interquartile ranges add up likewise."""
    timings = [timer(phase.calls) for phase in phases]
    total = sum(phase.weight for phase in phases)
    shares = [phase.weight / total for phase in phases]
    mean = Timing(
        median_us=sum(share * t.median_us for share, t in zip(shares, timings, strict=True)),
        iqr_us=sum(share * t.iqr_us for share, t in zip(shares, timings, strict=True)),
        repeats=timings[0].repeats,
    )
    return mean, timings


def _faults(deviations: Sequence[Deviation], record: list[dict[str, Any]] | None = None) -> str:
    if record is not None:
        record.extend({**asdict(d), "value": d.value if math.isfinite(d.value) else None} for d in deviations)
    return ", ".join(str(d) for d in deviations if not d.within)


def _add_baseline(row: Row, case: Case, baseline: Baseline, timer: Timer) -> None:
    entry: dict[str, Any] = {"name": baseline.name}
    row.baselines.append(entry)
    try:
        candidates = baseline.candidates()
        fault = _faults(baseline.check()) if baseline.check else ""
        if fault:
            entry["note"] = f"wrong: {fault}"
            return
        best = min((timer(calls) for calls in candidates), key=lambda timing: timing.median_us)
    except Exception as error:
        entry["note"] = _reason(error)
        return
    entry.update(us=best.median_us, iqr_us=best.iqr_us)
    if row.us is not None:
        entry["ratio"] = best.median_us / row.us
    _judge(row, case)


def _judge(row: Row, case: Case) -> None:
    row.targets = [{"target": str(target), "met": target.judge(row)} for target in case.targets]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, UnavailableError):
        return lines[0]
    return f"failed: {type(error).__name__}: {lines[-1] if lines else ''}"[:200]
