"""Who computes a key. A lease saves double work; safety rests on the manifest, which is created only if absent."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from stage_store.errors import StoreError, os_errors

logger = logging.getLogger(__name__)

LEASE = "LEASE.json"


@contextmanager
def file_lease(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold `path` by flock: the kernel frees it when the owner dies, kill -9 included.

    Yields False at once, holding nothing, if it is taken and `wait` is False. On network file systems flock must reach
    the server (NFS 4 does).
    """
    with os_errors(path):
        descriptor = _lock(path, wait)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        os.ftruncate(descriptor, 0)  # a name found in a free lock is that of an owner that was killed
        os.close(descriptor)


def file_leased(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # gc removed the folder between the two calls
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                return None
            logger.info("waiting for %s, held by %s", path.parent, _name(os.pread(descriptor, 4096, 0)))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _same_file(path, descriptor):
            break
        os.close(descriptor)  # gc removed the file while we waited: what we hold is nobody's lease
    if previous := os.pread(descriptor, 4096, 0):
        logger.info("taking over %s from %s, which died", path.parent, _name(previous))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _owner(), 0)
    return descriptor


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(**more: str | int) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **more}).encode()


def _name(owner: bytes | None) -> str:
    try:
        fields = json.loads(owner or b"")
        return f"process {fields['pid']} on {fields['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


class ConditionalObjects(Protocol):
    """What a lease needs of an object store; S3 offers all of it."""

    url: str

    def read(self, path: str) -> bytes | None: ...

    def put(self, path: str, data: bytes, *, if_absent: bool = False, if_tag: str = "") -> str | None:
        """Entity tag of what was written, or None if the condition did not hold."""

    def tag_and_age(self, path: str) -> tuple[str, float] | None:
        """Entity tag and seconds since the last write, both by the server's clock; None if absent."""

    def remove(self, path: str) -> None: ...


class ObjectLease:
    """An object with the owner's name, rewritten every `seconds` / 3; silent for `seconds`, it may be taken over.

    All writes after the first are conditional on the entity tag last seen, so of several thieves one wins, and an
    owner that was robbed (suspended machine, lost network) learns it at its next beat.
    """

    def __init__(self, objects: ConditionalObjects, path: str, seconds: float) -> None:
        self._objects, self._path, self._seconds = objects, path, seconds
        self._id = uuid.uuid4().hex
        self._beats = 0
        self._tag: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {path}", daemon=True)

    def acquire(self, wait: bool = True) -> bool:
        told = False
        while not self._try():
            if not wait:
                return False
            if not told:
                logger.info("waiting for %s/%s, held by %s", self._objects.url, self._path, self._holder())
                told = True
            time.sleep(min(1.0, self._seconds / 4))
        self._thread.start()
        return True

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            body = self._objects.read(self._path)
            if body and json.loads(body).get("id") == self._id:
                self._objects.remove(self._path)
        except StoreError as error:  # the result is safe already, and the lease runs out by itself
            logger.warning("lease %s not given back: %s", self._path, error)

    def _try(self) -> bool:
        self._tag = self._objects.put(self._path, self._body(), if_absent=True)
        if self._tag is None:
            seen = self._objects.tag_and_age(self._path)
            if seen and seen[1] > self._seconds:
                holder = self._holder()
                self._tag = self._objects.put(self._path, self._body(), if_tag=seen[0])
                if self._tag is not None:
                    logger.info(
                        "taking over %s/%s from %s, silent for %.0f s", self._objects.url, self._path, holder, seen[1]
                    )
        return self._tag is not None

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds / 3):
            try:
                tag = self._objects.put(self._path, self._body(), if_tag=self._tag or "")
                if tag is None:
                    logger.warning("lease %s was taken over by %s; first to finish wins", self._path, self._holder())
                    return
                self._tag = tag
            except StoreError as error:
                logger.warning("lease %s not renewed, will try again: %s", self._path, error)

    def _body(self) -> bytes:
        self._beats += 1  # equal bytes would have equal entity tags, and a thief could not tell a beat from silence
        return _owner(id=self._id, beat=self._beats)

    def _holder(self) -> str:
        return _name(self._objects.read(self._path))
