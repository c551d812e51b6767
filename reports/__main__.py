"""`python -m reports compare RUN RUN… [--baseline teacher] [-o FILE]`: one page of one or several finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.comparison import compare_runs
from reports.build import write_files
from reports.combine import combine, load_finished
from reports.rows import ReportError
from reports.verdict import tally

HOME = Path(__file__).parent / "out"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason on standard error where the runs cannot be compared."""
    options = _parser().parse_args(argv)
    try:
        runs = [load_finished(run, options.runs) for run in options.run]
        title = options.title or (f"{len(runs)} runs compared" if len(runs) > 1 else str(runs[0].twin["title"]))
        combined = combine(runs, options.baseline, compare_runs, title)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_files(combined.twin, combined.rows, combined.flips, options.out, f"{options.out.stem}.")
    except (ReportError, OSError) as error:
        print(f"reports compare: {error}", file=sys.stderr)
        return 1
    for variant in combined.twin["variants"]:
        counted = ", ".join(f"{n} {verdict}" for verdict, n in tally(variant["comparisons"]).items())
        print(f"{variant['name']}: {counted}")
    for refused in combined.twin["not_comparable"]:
        print(f"not comparable: {refused['model']}: {refused['reason']}")
    print(f"report: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="runs side by side, every model paired with one baseline")
    compare.add_argument("run", nargs="+", help="id of a run whose report is in reports/out, or the report's folder")
    compare.add_argument(
        "--baseline", default="teacher", help='"teacher" (of the first run) or a student: half, B/half'
    )
    compare.add_argument("-o", "--out", type=Path, default=HOME / "comparison.html", help="the page's file")
    compare.add_argument("--title", default="", help="heading of the page")
    compare.add_argument("--runs", type=Path, default=HOME, help="where run ids are looked up")
    return parser


if __name__ == "__main__":
    sys.exit(main())
