"""Renders the JSON twin as one self-contained page: no network, no script, light and dark, printable."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import figures, paper, tables, templates, text, verdict
from reports.flips import all_flips, shown, write_flips
from reports.rows import RunData, all_rows, write_rows
from reports.sections import Interval
from reports.svg import key, slot
from reports.twin import build_twin

TEMPLATES = Path(templates.__path__[0])


def write_report(
    data: RunData, out: Path, *, title: str, samples: int, interval: Interval | None = None
) -> dict[str, Any]:
    """report.html, report.json, rows.csv and flips.jsonl into `out`; returns the twin. Same inputs, same bytes.

    samples: prompts whose answers are shown. interval: (successes, n) → 95 % interval, for accuracies.
    """
    flips = all_flips(data)
    twin = build_twin(data, title, samples, interval, shown(flips))
    write_files(twin, all_rows(data), flips, out / "report.html")
    return twin


def write_files(
    twin: dict[str, Any], rows: pd.DataFrame, flips: Sequence[Mapping[str, Any]], page: Path, prefix: str = ""
) -> None:
    """The page and, beside it, the twin under the page's name and `<prefix>rows.csv` and `<prefix>flips.jsonl`."""
    files = {"twin": page.with_suffix(".json").name, "rows": f"{prefix}rows.csv", "flips": f"{prefix}flips.jsonl"}
    twin["files"] = files
    (page.parent / files["twin"]).write_text(to_json(twin), encoding="utf-8")
    write_rows(rows, page.parent / files["rows"])
    write_flips(flips, page.parent / files["flips"])
    page.write_text(render(twin), encoding="utf-8")


def to_json(twin: Mapping[str, Any]) -> str:
    return json.dumps(twin, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render(twin: Mapping[str, Any]) -> str:
    """The page. Everything in the twin is untrusted text: escaped by the templates, never marked safe."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    comparison = tables.comparison(twin)
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            twin=twin,
            run=twin["runs"][0],
            runs=twin["runs"],
            baseline=twin["baseline"],
            teacher=twin["teacher"],
            variants=twin["variants"],
            charts=figures.draw(twin),
            comparison=comparison,
            matrix=tables.matrix(twin),
            published=paper.tables({row["benchmark"] for group in comparison for row in group["rows"]}),
            style=Markup(style),
            policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        )
    )


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "count": text.count,
        "number": text.number,
        "percent": text.percent,
        "points": text.points,
        "ratio": text.ratio,
        "size": text.size,
        "duration": text.duration,
        "p_value": text.p_value,
        "benchmark": text.benchmark_name,
        "uncertain": text.uncertain,
        "indices": lambda variants: {v["name"]: i for i, v in enumerate(variants)},
        "json": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
    }
    env.globals |= {
        "interval": text.interval,
        "is_share": verdict.is_share,
        "reading": verdict.reading,
        "spans_zero": verdict.spans_zero,
        "tally": verdict.tally,
        "key": key,
        "slot": slot,
        "tiles": tables.tiles,
        "labels": figures.STAGE_LABELS,
        "units": figures.LOSS_UNITS,
        "families": verdict.FAMILIES,
        "z95": verdict.Z95,
        "missing": text.MISSING,
        "as_points": text.points,
        "as_percent": text.percent,
        "as_signed": text.signed,
    }
    return env
