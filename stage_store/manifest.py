"""`MANIFEST.json`: the commit of a stage. Without it there is no stage; with it, every byte is accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from stage_store.errors import CorruptStage, StoreError
from stage_store.files import StoredFile
from stage_store.fingerprint import canonical_json
from stage_store.refs import StageRef

SCHEMA = 1
"""Layout of the store. It is part of every key; a store of a larger number is refused."""


@dataclass(frozen=True)
class Manifest:
    """A finished stage.

    digest:  sha256 (hex) over the paths and hashes of `files`.
    attempt: folder below the key that holds `files`.
    payload: what the key is the hash of.
    meta:    what the computation said of itself: summary, seconds, device and so on.
    created: UTC, ISO 8601.
    url:     store it was read from; not written.
    """

    schema: int
    stage: str
    key: str
    digest: str
    attempt: str
    files: tuple[StoredFile, ...]
    payload: Mapping[str, Any]
    meta: Mapping[str, Any]
    created: str
    url: str

    @property
    def ref(self) -> StageRef:
        return StageRef(self.stage, self.key, self.digest, self.url)

    @property
    def prefix(self) -> str:
        """Path of its files below the store's root."""
        return f"{self.stage}/{self.key}/{self.attempt}"

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        fields = asdict(self)
        del fields["url"]
        fields = json.loads(json.dumps(fields, default=_plain))
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes, stage: str, key: str, url: str) -> Manifest:
        """Raises CorruptStage for anything but the bytes that were written for this stage and key."""
        try:
            fields = json.loads(data)
            checksum, schema = fields.pop("checksum"), fields["schema"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptStage(f"{stage}/{key}: manifest cannot be read: {error}") from error
        if isinstance(schema, int) and schema > SCHEMA:
            raise newer_schema(f"{url}/{stage}/{key}", schema)
        if checksum != _checksum(fields):
            raise CorruptStage(f"{stage}/{key}: manifest was altered")
        if (fields["stage"], fields["key"]) != (stage, key):
            raise CorruptStage(f"{stage}/{key}: holds the manifest of {fields['stage']}/{fields['key']}")
        files = tuple(StoredFile(**file) for file in fields.pop("files"))
        if any(PurePosixPath(f.path).is_absolute() or ".." in PurePosixPath(f.path).parts for f in files):
            raise CorruptStage(f"{stage}/{key}: manifest names files outside its folder")
        return cls(**fields, files=files, url=url)


def new_manifest(
    stage: str,
    key: str,
    attempt: str,
    files: tuple[StoredFile, ...],
    payload: Mapping[str, Any],
    meta: Mapping[str, Any],
    url: str,
) -> Manifest:
    digest = hashlib.sha256(canonical_json([[f.path, f.sha256] for f in files])).hexdigest()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(SCHEMA, stage, key, digest, attempt, files, dict(payload), dict(meta), created, url)


def newer_schema(where: str, schema: int) -> StoreError:
    return StoreError(
        f"{where}: written with store schema {schema}, this version reads up to {SCHEMA}; "
        "upgrade mamballama or choose another store"
    )


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Figures of numpy and torch as Python numbers, paths as text: hours of training must not end in a TypeError."""
    return value.item() if hasattr(value, "item") else str(value)
