"""A store in a folder: results are written where they stay, so publishing copies nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from stage_store.backend import Entry
from stage_store.errors import os_errors
from stage_store.files import StoredFile, create_file, sha256_file, sync, sync_tree
from stage_store.lease import LEASE, file_lease, file_leased


class LocalBackend:
    remote = False

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().resolve()
        self.url = str(self._root)

    def read(self, path: str) -> bytes | None:
        with os_errors(self._root / path):
            try:
                return (self._root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def create(self, path: str, data: bytes) -> bool:
        with os_errors(self._root / path):
            return create_file(self._root / path, data)

    def remove(self, path: str) -> None:
        with os_errors(self._root / path):
            (self._root / path).unlink(missing_ok=True)
            if (self._root / path).parent.is_dir():
                sync((self._root / path).parent)

    def remove_tree(self, prefix: str) -> None:
        with os_errors(self._root / prefix):
            if (self._root / prefix).exists():
                shutil.rmtree(self._root / prefix)

    def walk(self, prefix: str = "") -> dict[str, Entry]:
        folder = self._root / prefix
        found = {}
        for parent, _, names in os.walk(folder):
            for path in (Path(parent, name) for name in names):
                try:
                    status = path.stat()
                except FileNotFoundError:  # removed by its owner meanwhile
                    continue
                found[path.relative_to(folder).as_posix()] = Entry(status.st_size, status.st_mtime)
        return found

    def sha256(self, path: str) -> str | None:
        with os_errors(self._root / path):
            try:
                return sha256_file(self._root / path, fresh=True)
            except FileNotFoundError:
                return None

    def workspace(self, prefix: str) -> Path:
        return self._root / prefix

    def upload(self, prefix: str, names: Iterable[str]) -> None:
        with os_errors(self._root / prefix):
            sync_tree(self._root / prefix)

    def download(self, prefix: str, files: Iterable[StoredFile], folder: Path) -> None:
        raise NotImplementedError("a folder's workspace is the store itself")

    def lease(self, prefix: str, wait: bool = True) -> AbstractContextManager[bool]:
        return file_lease(self._root / prefix / LEASE, wait)

    def leased(self, prefix: str) -> bool:
        return file_leased(self._root / prefix / LEASE)
