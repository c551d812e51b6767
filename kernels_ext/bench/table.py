"""The bench's rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernels_ext.bench.measure import Row

_COLUMNS = (
    ("op", -16),
    ("shape", -40),
    ("dtype", -9),
    ("µs", 9),
    ("iqr", 6),
    ("MB", 9),
    ("TB/s", 5),
    ("copy", 5),
    ("states", 6),
)
HEADER = """\
Medians of repeated replays of a CUDA graph, µs per call, with their interquartile range. dtype: activations/state.
MB: bytes that must be moved (kernels_ext/bench/traffic.py). copy: share of the measured copy bandwidth.
states: bytes in units of the batch's states, the window's writes into the rings included."""
_NONE = "–"


def head() -> str:
    """Names of the columns, underlined."""
    titles = _line([name for name, _ in _COLUMNS])
    return f"{titles}\n{'─' * len(titles)}"


def lines(row: Row) -> str:
    """One line of numbers, or of why there are none; below it what the row was compared with, and its targets."""
    dtype = f"{row.dtype}/{row.state_dtype}" if row.state_dtype else row.dtype
    if row.us is None:
        return f"{_line([row.op, row.shape, dtype])} {row.note}"
    numbers = [
        _number(row.us),
        _number(row.iqr_us),
        _number(None if row.bytes is None else row.bytes / 1e6),
        _number(row.tb_s),
        _NONE if row.copy_share is None else f"{row.copy_share:.0%}",
        _number(row.states_moved),
    ]
    found = [_line([row.op, row.shape, dtype, *numbers])]
    if row.phases:
        parts = (f"{_number(phase['median_us'])} µs in {phase['weight']:.1%} of rounds" for phase in row.phases)
        found.append(f"    {', '.join(parts)}")
    found += [f"    than {_baseline(entry)}" for entry in row.baselines]
    found += [f"    target {entry['target']}: {_VERDICT[entry['met']]}" for entry in row.targets]
    return "\n".join(found)


def sweep_lines(row: Row) -> str:
    """The default's time beside the best configuration's, and the configurations that gave no time."""
    timed = [entry for entry in row.sweep if "us" in entry]
    found = [lines(row)]
    if row.us is not None and timed:
        best = min(timed, key=lambda entry: entry["us"])
        found.append(
            f"    default {_number(row.us)} µs; best of {len(timed)} others {_number(best['us'])} µs "
            f"({row.us / best['us']:.2f}×): {_config(best['config'])}"
        )
        others = sorted(timed, key=lambda entry: entry["us"])[1:]
        found += [f"      {_number(entry['us']):>8} µs  {_config(entry['config'])}" for entry in others]
    found += [f"      {entry['note']}: {_config(entry['config'])}" for entry in row.sweep if "note" in entry]
    return "\n".join(found)


_VERDICT = {True: "met", False: "MISSED", None: "not measured"}


def _baseline(entry: Mapping) -> str:
    if "us" not in entry:
        return f"{entry['name']}: {entry['note']}"
    return f"{entry['name']}: {_number(entry['us'])} µs (iqr {_number(entry['iqr_us'])}), {entry['ratio']:.2f}×"


def _config(config: Mapping) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _number(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    padded = zip(cells, _COLUMNS, strict=False)
    return " ".join(f"{c:<{-width}}" if width < 0 else f"{c:>{width}}" for c, (_, width) in padded)
