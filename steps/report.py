"""Stage `report`: what the other stages left → report.html, report.json, rows.csv, flips.jsonl. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.stats import wilson
from reports.build import write_report
from reports.rows import load
from reports.verdict import tally
from steps.config import ReportConfig
from steps.stage import StageContext


def run(config: ReportConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """inputs: "lineage" (lineage.json) and the folders "benchmark_teacher", "<variant>.benchmark" and
    "<variant>.speculative_profile".

    A stage that is missing is shown as not run. Raises `reports.rows.ReportError` on unreadable files.
    """
    twin = write_report(load(inputs), out, title=config.title, samples=config.samples, interval=wilson)
    return {
        "bytes": (out / "report.html").stat().st_size,
        "variants": {
            v["name"]: {
                "verdicts": tally(v["comparisons"]),
                "flags": len(v["flags"]),
                "kl": v["quality"][-1]["kl"],
                "top1": v["quality"][-1]["top1"],
            }
            for v in twin["variants"]
        },
    }
