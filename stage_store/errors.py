"""Everything that a store can say no with, and the one place where system errors become such a line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoreError(RuntimeError):
    """The store cannot be used as asked; the message is one line: what was met, where, what to do."""


class CorruptStage(StoreError):
    """A finished stage does not hold what its manifest promises; it has been quarantined and can be computed anew."""


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOTHING_LEFT = 1 << 20  # bytes; torch.save says nothing of a full disk, but leaves less than this


@contextmanager
def os_errors(where: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that names `where`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(where) from error
        raise StoreError(f"{where}: {error.strerror or error}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Run code of others that writes below `folder`: a full disk becomes a StoreError, all else passes unchanged."""
    try:
        yield
    except Exception as error:
        told = getattr(error, "errno", None) in _DISK_FULL or os.strerror(errno.ENOSPC) in str(error)
        if told or shutil.disk_usage(folder.parent).free < _NOTHING_LEFT:
            raise _disk_full(folder) from error
        raise


def _disk_full(where: Path | str) -> StoreError:
    return StoreError(f"{where}: no space left; free some (`python -m stage_store gc`) or choose another store")
