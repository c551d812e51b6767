"""What was costly to get, one line of JSON each, written down before it is used."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from threading import Lock
from typing import Any

logger = logging.getLogger(__name__)


class Ledger:
    """An append-only file of {"key", "value"}, read at opening; a later line of a key wins.

    A line is on the disk when `add` returns. The last line of a process that died in the middle of it is cut off, so
    that the next one begins on its own. One process writes at a time; threads may share it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = {}
        self._lock = Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path.read_bytes()) if path.exists() else 0
        self._file = path.open("ab")
        if self._file.tell() > whole:
            logger.warning("%s: the last %d bytes are half a line and are dropped", path, self._file.tell() - whole)
            self._file.truncate(whole)

    def _read(self, data: bytes) -> int:
        """Take in all whole lines; the number of their bytes. Raises ValueError for a line that is not JSON."""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.found[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}: line {number} is broken; delete it, or the file") from None
        return whole

    def add(self, key: str, value: Any) -> None:
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.found[key] = value

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
