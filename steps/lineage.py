"""How a run's results came about, and the report that tells of it."""

from __future__ import annotations

import importlib
import json
import platform
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stage_store import Store
from steps import device, provenance
from steps.config import Config, store_url
from steps.pipeline import Refs, Run, fetch, one_line, stored_ref, walk
from steps.stage import StageContext


def make_report(config: Config, refs: Mapping[str, Refs], run: Run) -> Path:
    """Write reports/out/<run id>/ and return its report.html.

    refs: variant → stage → reference; what all variants share is looked up under "".
    The report stage's inputs are the folders "benchmark_teacher", "<variant>.benchmark" and
    "<variant>.speculative_profile", as far as these are on, and "lineage", a JSON file (`lineage`).
    """
    wanted = [("benchmark_teacher", "")]
    wanted += [(stage, variant) for variant in config.variants for stage in ("benchmark", "speculative_profile")]
    out = run.root / "reports" / "out" / run.id
    with one_line("report"):
        store = Store(store_url(config, run.root))
        inputs = {
            f"{variant}.{stage}" if variant else stage: fetch(store, refs[variant][stage])
            for stage, variant in wanted
            if stage in refs[variant]
        }
        out.mkdir(parents=True, exist_ok=True)
        inputs["lineage"] = out / "lineage.json"
        inputs["lineage"].write_text(json.dumps(lineage(config, refs, run, store), indent=1))
        with tempfile.TemporaryDirectory(prefix="mamballama-") as scratch:
            context = StageContext("cpu", config.compute, config.seed, Path(scratch))
            importlib.import_module("steps.report").run(config.report, inputs, out, context)
        store.pin(run.id, [stored_ref(ref) for of_variant in refs.values() for ref in of_variant.values()])
    return out / "report.html"


def lineage(config: Config, refs: Mapping[str, Refs], run: Run, store: Store) -> dict[str, Any]:
    """How a run's results came about, JSON-ready: the run, its configuration and one entry a stage and variant.

    An entry has stage, variant and hit: True if reused, False if this run ran it, None if switched off. Unless off it
    also has key, digest, upstream (role → key), config (leaf → value), bytes, created, and all that `_execute`
    recorded.
    """
    entries = []
    for stage, variant, _ in walk(config):
        entry: dict[str, Any] = {"stage": stage.name, "variant": variant, "hit": None}
        if ref := refs[variant].get(stage.name):
            manifest = store.manifest(stored_ref(ref))
            entry |= manifest.meta
            entry |= {
                # A variant that continues from this one may have been the first to need it.
                "hit": ref["hit"] and manifest.meta.get("run") != run.id,
                "key": manifest.key,
                "digest": manifest.digest,
                "upstream": manifest.payload["upstream"],
                "config": manifest.payload["config"],
                "bytes": manifest.size,
                "created": manifest.created,
            }
        entries.append(entry)
    host = device.hardware(device.resolve(config.device))
    return {
        "run": run.id,
        "command": run.command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": provenance.git_commit(run.root),
        "host": host | {"system": f"{platform.system()} {platform.machine()}"},
        "versions": provenance.versions(),
        "config": config.model_dump(mode="json"),
        "stages": entries,
    }
