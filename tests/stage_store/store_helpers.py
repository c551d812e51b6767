"""A small stage to compute, and ways to damage what it left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3_server import s3_files

from stage_store import StageRef, Store, stage_key


def payload(stage: str = "align", steps: int = 40, **more: Any) -> dict[str, Any]:
    base = {
        "schema": 1,
        "stage": stage,
        "version": 1,
        "config": {"steps": steps},
        "code": {},
        "data": {},
        "upstream": {},
    }
    return {**base, **more}


class Work:
    """A stage that writes two files and counts how often it ran."""

    def __init__(self, weights: bytes = b"w" * 100_000) -> None:
        self.weights, self.calls = weights, 0

    def __call__(self, out: Path, checkpoints: object) -> dict[str, Any]:
        self.calls += 1
        (out / "sub").mkdir()
        (out / "model.safetensors").write_bytes(self.weights)
        (out / "sub" / "config.json").write_text("{}")
        return {"summary": {"loss": 0.5}, "seconds": 1.0}


def compute(
    store: Store, given: Mapping[str, Any] | None = None, work: Any = None, **options: bool
) -> tuple[StageRef, bool]:
    given = given or payload()
    return store.compute(given["stage"], stage_key(given), given, work or Work(), **options)


def damage(store: Store, path: str, data: bytes | None) -> None:
    """Overwrite (or, with None, remove) a file where the store keeps it, behind its back."""
    if not store.backend.remote:
        target = Path(store.url) / path
        target.unlink() if data is None else target.write_bytes(data)
        return
    if data is None:
        s3_files().rm_file(f"{store.url}/{path}")
    else:
        s3_files().pipe_file(f"{store.url}/{path}", data)
