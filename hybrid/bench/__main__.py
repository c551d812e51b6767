"""`python -m hybrid.bench [--only NAME…] [--json FILE]`.

What decodes wrongly is not timed; what is timed stands beside what it is compared with, from the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hybrid.bench import rows, trace
from hybrid.bench.cases import NAMES, Bench, Settings
from hybrid.bench.timed import free
from hybrid.shapes import SHAPES
from kernels_ext.bench.circumstances import circumstances

BUDGET_SECONDS = 240.0
_PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if something decoded wrongly or failed, 2 if the machine or the request does not allow a run."""
    started = time.monotonic()
    chosen = _parser().parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"hybrid.bench: needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
            "--device cpu tries tiny shapes\n"
        )
        return 2
    names = chosen.only or [name for name in NAMES if name != "speculative" or chosen.model]
    if "speculative" in names and not (chosen.model and chosen.prompts):
        sys.stderr.write("hybrid.bench: the row speculative needs --model FOLDER and --prompts FILE\n")
        return 2
    bench = Bench(_settings(chosen))
    found = {**circumstances(_PACKAGES, chosen.device), "copy_bandwidth": bench.bandwidth}
    _say(f"{found['hardware']}, copy {bench.bandwidth / 1e12:.2f} TB/s\n\n{rows.head()}")
    table: list[rows.Row] = []
    for job in bench.jobs(names):
        if time.monotonic() - started > chosen.budget:
            job.row.note = "skipped: out of time, raise --budget"
        else:
            job.run()
            free()
        table.append(job.row)
        _say(rows.line(job.row))
    if chosen.device == "cuda":
        rows.judge(table)
        _say("\n" + "\n".join(rows.verdicts(table)))
    if chosen.trace:
        found["trace"] = {}
        for name, kernels in bench.traces(names):
            _say("\n" + trace.table(f"kernels of one round of {name}:", kernels))
            found["trace"][name] = [asdict(kernel) for kernel in kernels]
    found.update(seconds=round(time.monotonic() - started, 1), rows=[asdict(row) for row in table])
    line = json.dumps(found, ensure_ascii=False)
    if chosen.json:
        chosen.json.write_text(line + "\n")
    _say(f"\n{line}")
    return 1 if any(row.note.startswith(("wrong", "failed")) for row in table) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hybrid.bench", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--only", metavar="NAME", nargs="+", choices=NAMES, help=f"rows: {', '.join(NAMES)}")
    add("--json", metavar="FILE", type=Path, help="write the JSON line there too")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to see that everything runs")
    add("--budget", metavar="SECONDS", type=float, default=BUDGET_SECONDS, help="no row begins later (%(default)g)")
    add("--trace", action="store_true", help="print which kernels a round consists of")
    add("--shape", choices=SHAPES, help="of plain and synthetic (8b)")
    add("--batches", metavar="B", type=int, nargs="+", help="of plain, synthetic and speculative (1 8 64)")
    add("--context", metavar="TOKENS", type=int, help="of plain and synthetic (4096)")
    add("--k", metavar="K", dest="ks", type=int, nargs="+", help="proposals per round (1 to 8)")
    add("--acceptance", metavar="RATE", type=float, help="of synthetic's proposals (0.8)")
    add("--repeats", metavar="N", type=int, help="of every measurement (5)")
    add("--model", metavar="FOLDER", type=Path, help="of speculative")
    add("--draft", metavar="FOLDER", dest="drafts", nargs="+", help="of speculative: folders, or ngram (ngram)")
    add("--prompts", metavar="FILE", type=Path, help="of speculative: .jsonl of token lists, or a corpus shard (.npz)")
    add("--tokens", metavar="N", dest="new_tokens", type=int, help="of a reply of speculative (128)")
    add("--teacher", metavar="FOLDER", type=Path, help="of selfchat and transformers (random weights of smollm2)")
    add("--chat-batch", metavar="B", type=int, help="of selfchat (2048)")
    add("--chat-tokens", metavar="N", type=int, help="of a reply of selfchat (512)")
    add("--no-transformers", dest="transformers", action="store_false", help="without transformers, which compiles")
    return parser


def _settings(chosen: argparse.Namespace) -> Settings:
    """The device's defaults, changed by what was given."""
    given = {name: value for name, value in vars(chosen).items() if name in Settings.__dataclass_fields__}
    changes: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    settings = replace(Settings() if chosen.device == "cuda" else Settings.tiny(), **changes)
    return replace(settings, few_ks=settings.ks) if chosen.ks else settings


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
