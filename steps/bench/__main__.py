"""`python -m steps.bench [--only NAME…] [--shape NAME…] [--json FILE]`.

Every stage as it trains, on random weights and random text, beside its naive form in the same run. A stage whose first
loss is not the naive form's has no time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels_ext.bench.circumstances import circumstances
from steps.bench import rows
from steps.bench.cases import LOADS, NAMES, Bench, Settings, free
from steps.utilisation import peak_flops

BUDGET_SECONDS = 150.0
FORMULA = (
    "of peak = FLOP per token · tokens/s / dense bf16 peak; FLOP per token = 6·N trained through + 2·N forward only "
    "(the teacher, self-chat); N: weights of the matrix products that a token passes (steps.utilisation)"
)
_PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")
_CPU = Settings("cpu", "float32", ("tiny-llama",), steps=4, naive_steps=2, warm_up=1, naive_warm_up=1, chat_repeats=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if a loss is wrong or a row failed, 2 if the machine does not allow a run."""
    started = time.monotonic()
    chosen = _parser().parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"steps.bench: needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
            "--device cpu tries a tiny shape\n"
        )
        return 2
    settings = _settings(chosen)
    found: dict[str, Any] = circumstances(_PACKAGES, chosen.device)
    peak = peak_flops(chosen.device)
    found |= {"peak_flops": peak, "utilisation": FORMULA}
    shown = "unknown" if peak is None else f"{peak / 1e12:.1f} TFLOP/s"
    _say(f"{found['hardware']}, peak {shown}\n{FORMULA}\n\n{rows.head()}")
    table: list[rows.Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for job in Bench(settings, Path(scratch), peak).jobs(chosen.only or NAMES):
            if time.monotonic() - started > chosen.budget:
                job.row.note = "skipped: out of time, raise --budget"
            else:
                job.run()
                free()
            if chosen.device == "cuda":
                rows.judge(job.row)
            table.append(job.row)
            _say(rows.line(job.row))
            if job.row.profile is not None:
                _say(job.row.profile.text(f"{job.row.stage} {job.row.shape}"))
    found.update(seconds=round(time.monotonic() - started, 1), rows=[row.to_dict() for row in table])
    line = json.dumps(found, ensure_ascii=False)
    if chosen.json:
        chosen.json.write_text(line + "\n")
    _say(f"\n{line}")
    return 1 if any(row.note.startswith(("wrong", "failed")) for row in table) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m steps.bench", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--only", metavar="NAME", nargs="+", choices=NAMES, help=f"stages: {', '.join(NAMES)}")
    add("--shape", metavar="SHAPE", nargs="+", choices=LOADS, dest="shapes", help=f"of {', '.join(LOADS)}")
    add("--steps", metavar="N", type=_positive, help="timed steps (10); the naive form at most 5")
    add("--json", metavar="FILE", type=Path, help="write the JSON line there too")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny shape, to see that everything runs")
    add("--budget", metavar="SECONDS", type=float, default=BUDGET_SECONDS, help="no row begins later (%(default)g)")
    add("--profile", action="store_true", help="print which kernels a step of kl and align consists of")
    add("--no-naive", dest="naive", action="store_false", help="time our form alone; its loss is checked all the same")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _settings(chosen: argparse.Namespace) -> Settings:
    """The device's defaults, changed by what was given."""
    given = {name: value for name, value in vars(chosen).items() if name in Settings.__dataclass_fields__}
    changes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    return replace(Settings() if chosen.device == "cuda" else _CPU, **changes)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
