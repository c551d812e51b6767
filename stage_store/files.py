"""Files on a local disk: hashed once, written durably, listed with their hashes."""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stage_store.errors import StoreError

_CHUNK = 1 << 20
_known: dict[tuple[str, int, int], str] = {}
"""(path, size, mtime in ns) → sha256, for the life of this process."""


@dataclass(frozen=True)
class StoredFile:
    """path: relative to its folder, with forward slashes; size: bytes; sha256: hex."""

    path: str
    size: int
    sha256: str


def sha256_file(path: Path, fresh: bool = False) -> str:
    """sha256 (hex) of a file's bytes; a file unchanged in size and mtime is read once per process unless `fresh`."""
    status = path.stat()
    seen = (str(path), status.st_size, status.st_mtime_ns)
    if fresh or seen not in _known:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        _known[seen] = digest.hexdigest()
    return _known[seen]


def inventory(folder: Path) -> tuple[StoredFile, ...]:
    """Every file below `folder`, hashed, in order of path. Raises StoreError for links and special files."""
    found = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        name = path.relative_to(folder).as_posix()
        if not stat.S_ISREG(mode):
            raise StoreError(f"{name}: is a link or a special file; a stage may write regular files only")
        found.append(StoredFile(name, path.stat().st_size, sha256_file(path)))
    return tuple(found)


def faults(folder: Path, files: Iterable[StoredFile]) -> list[str]:
    """What is wrong with `files` below `folder`, one line each: missing, other size, other sha256."""
    found = []
    for file in files:
        path = folder / file.path
        if not path.is_file():
            found.append(f"{file.path}: missing")
        elif (size := path.stat().st_size) != file.size:
            found.append(f"{file.path}: {size} bytes instead of {file.size}")
        elif sha256_file(path) != file.sha256:
            found.append(f"{file.path}: sha256 differs")
    return found


def sync(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync everything below `folder`, `folder` itself and its entry in the parent."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    sync(folder.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Write `path` whole and durably only if it is absent; False if it was there. Readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike rename, fails when the target exists
        except FileExistsError:
            return False
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)
    return True
