"""What a store needs of the place where it keeps things: a folder (`local`) or an S3 bucket (`s3`).

Paths are relative to the store's root, with forward slashes. Everything that fails raises StoreError.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stage_store.errors import StoreError
from stage_store.files import StoredFile


@dataclass(frozen=True)
class Entry:
    """size: bytes; modified: seconds since 1970."""

    size: int
    modified: float


class Backend(Protocol):
    url: str
    remote: bool
    """Whether `workspace` is a copy (S3) or the store itself (folder)."""

    def read(self, path: str) -> bytes | None:
        """Bytes of a small file; None if absent."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file whole and durably if it is absent; False if another was there first."""

    def remove(self, path: str) -> None:
        """Remove one file, if it is there."""

    def remove_tree(self, prefix: str) -> None:
        """Remove everything below `prefix`, the workspace's copy included."""

    def walk(self, prefix: str = "") -> dict[str, Entry]:
        """Every file below `prefix`, by its path relative to `prefix`."""

    def sha256(self, path: str) -> str | None:
        """Hash (hex) of the bytes as they lie in the store now; None if absent."""

    def workspace(self, prefix: str) -> Path:
        """Local folder for the files below `prefix`; it may not exist yet."""

    def upload(self, prefix: str, names: Iterable[str]) -> None:
        """Make these files of the workspace durable in the store."""

    def download(self, prefix: str, files: Iterable[StoredFile], folder: Path) -> None:
        """Copy files of the store into `folder`; remote only. Raises CorruptStage if one is absent."""

    def lease(self, prefix: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Be the only one to work on `prefix`; yields False if another is and `wait` is False."""

    def leased(self, prefix: str) -> bool:
        """Whether somebody is at work on `prefix`."""


def open_backend(url: str, lease_seconds: float, cache: Path | None) -> Backend:
    """Backend for a folder, `file://` or `s3://` URL."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        from stage_store.local import LocalBackend

        return LocalBackend(Path(rest if separator else url))
    if scheme == "s3":
        from stage_store.s3 import S3Backend

        return S3Backend(url, lease_seconds, cache)
    raise StoreError(f"{url}: unknown kind of store {scheme!r}; use a folder, file:// or s3://bucket/prefix")
