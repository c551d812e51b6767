"""Fetch what a configuration's benchmark reads, so that it can run where there is no network.

    python -m steps.prefetch CONFIG [--set leaf=value …]

Files go below MAMBALLAMA_CACHE (default ~/.cache/mamballama); one line a source says its bytes and sha256. With that
folder on a machine without network, benchmarks run there. The teacher's and the corpus' own sources are fetched by the
stages that read them, not here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from corpora.sources import SourceError
from steps import config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if a source cannot be had; the others are fetched all the same."""
    parser = argparse.ArgumentParser(prog="python -m steps.prefetch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="TOML file, for example configs/smollm2_gpu.toml")
    parser.add_argument("--set", action="append", default=[], metavar="leaf=value", help="as for the flow")
    options = parser.parse_args(argv)
    try:
        section = config.load(options.config, options.set).benchmark
    except config.ConfigError as error:
        parser.exit(2, f"{error}\n")

    from evals import data
    from evals.judge import data as judge_data
    from evals.tasks import TASKS

    wanted = data.wanted_by([TASKS[name] for name in section.tasks], section.data)
    wanted += [(text, "") for text in judge_data.sources(section.judge)]
    lost = 0
    for text, split in dict.fromkeys(wanted):
        try:
            found = data.fetch(text, split)
        except SourceError as error:
            lost += 1
            sys.stderr.write(f"{error}\n")
        else:
            sys.stdout.write(f"{found.bytes:>12,} bytes  {found.sha256}  {found.source}\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
