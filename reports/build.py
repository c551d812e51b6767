"""Renders the JSON twin as one self-contained page: no network, no script, light and dark, printable."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import figures, tables, text, verdict
from reports.rows import RunData, all_rows
from reports.svg import key, slot
from reports.twin import Interval, build_twin

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    data: RunData, out: Path, *, title: str, samples: int, interval: Interval | None = None
) -> dict[str, Any]:
    """report.html, report.json and rows.csv into `out`; returns the twin. Same inputs, same bytes.

    samples: prompts whose answers are shown. interval: (successes, n) → 95 % interval, for accuracies.
    """
    twin = build_twin(data, title, samples, interval)
    (out / "report.json").write_text(to_json(twin), encoding="utf-8")
    (out / "report.html").write_text(render(twin), encoding="utf-8")
    all_rows(data).to_csv(out / "rows.csv", index=False, lineterminator="\n")
    return twin


def to_json(twin: Mapping[str, Any]) -> str:
    return json.dumps(twin, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render(twin: Mapping[str, Any]) -> str:
    """The page. Everything in the twin is untrusted text: escaped by the templates, never marked safe."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            twin=twin,
            run=twin["run"],
            teacher=twin["teacher"],
            variants=twin["variants"],
            charts=figures.draw(twin),
            comparison=tables.comparison(twin),
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
        "z95": verdict.Z95,
        "missing": text.MISSING,
        "as_points": text.points,
        "as_signed": text.signed,
    }
    return env
