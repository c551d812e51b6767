"""`python -m kernels_ext.bench [--only PATTERN] [--sweep] [--json FILE]`.

Every kernel is compared with its plain PyTorch reference at the shape that is timed; what is wrong is not timed. Then
each is timed under a CUDA graph, beside what else does the same work on the same GPU in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels_ext.bench import table
from kernels_ext.bench.cases import all_cases
from kernels_ext.bench.circumstances import circumstances
from kernels_ext.bench.measure import Case, Row, Setup, measure, sweep
from kernels_ext.bench.timing import copy_bandwidth, time_graph

BUDGET_SECONDS = 100.0
SWEEP_BUDGET_SECONDS = 140.0
_PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if a kernel is wrong or failed, 2 if the machine or the request does not allow a run."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m kernels_ext.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", metavar="PATTERN", help="rows whose op and shape this regular expression finds")
    parser.add_argument("--sweep", action="store_true", help="try other launch parameters, leave the baselines out")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the JSON line there too")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, help=f"default {BUDGET_SECONDS:g}, {SWEEP_BUDGET_SECONDS:g} to sweep"
    )
    chosen = parser.parse_args(arguments)
    missing = _missing()
    if missing:
        sys.stderr.write(f"kernels_ext.bench: needs an NVIDIA GPU, CUDA and Triton; {missing}\n")
        return 2
    cases = [case for case in all_cases() if re.search(chosen.only or "", f"{case.op} {case.shape}")]
    if chosen.sweep and not chosen.only:
        cases = [case for case in cases if case.swept]
    if not cases:
        sys.stderr.write(f"kernels_ext.bench: no row matches --only {chosen.only!r}\n")
        return 2
    budget = chosen.budget or (SWEEP_BUDGET_SECONDS if chosen.sweep else BUDGET_SECONDS)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the references run in float32
    copy = copy_bandwidth()
    found = {**circumstances(_PACKAGES), "copy_bandwidth": copy}
    _say(f"{found['hardware']}, driver {found['driver']}, copy {copy / 1e12:.2f} TB/s")
    _say(f"{table.HEADER}\n\n{table.head()}")
    with torch.no_grad():
        rows = _run(cases, chosen.sweep, copy, lambda: budget - (time.monotonic() - started))
    found.update(seconds=round(time.monotonic() - started, 1), rows=[asdict(row) for row in rows])
    line = json.dumps(found, ensure_ascii=False)
    if chosen.json:
        chosen.json.write_text(line + "\n")
    _say(f"\n{line}")
    return 1 if any(row.note.startswith(("wrong", "failed")) for row in rows) else 0


def _run(cases: Sequence[Case], sweeping: bool, copy: float, seconds_left: Any) -> list[Row]:
    """Measure in order while there is time. Baselines that take long to compile come last, their rows again."""
    rows, waiting = [], []
    for case in cases:
        if seconds_left() <= 0:
            row = Row(case.op, case.shape, case.dtype, case.state_dtype, note="skipped: out of time, raise --budget")
            _say(table.lines(row))
        elif sweeping:
            row = sweep(case, Setup(), time_graph, copy, lambda: seconds_left() > 0)
            _say(table.sweep_lines(row))
        else:
            row, later = measure(case, Setup(), time_graph, copy)
            waiting += [(row, seconds, add) for seconds, add in later]
            _say(table.lines(row))
        rows.append(row)
    for row, seconds, add in waiting:
        if seconds_left() >= seconds:
            add()
            _say(f"\nonce more, with what takes long to compile:\n{table.lines(row)}")
        else:
            _say(f"\n{row.op} {row.shape}: no time for the slow baseline ({seconds:.0f} s), raise --budget")
    return rows


def _missing() -> str:
    """What the machine lacks, or nothing."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
