"""A store in an S3 bucket. Endpoint, region and credentials come from the usual AWS_* variables.

The server must honour `If-None-Match` and `If-Match` on PUT, as AWS S3, MinIO, Ceph and SeaweedFS do. s3fs runs its
requests on a thread of its own, which a fork does not copy: processes that share a store are started afresh.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any

from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from stage_store.backend import Entry
from stage_store.errors import CorruptStage, StoreError, os_errors
from stage_store.files import StoredFile
from stage_store.lease import LEASE, ObjectLease

_ABSENT = {"404", "NoSuchKey"}
_CONDITION_FAILED = {"412", "PreconditionFailed"}
_CONFLICT = {"409", "ConditionalRequestConflict"}
_BLOCK = 16 << 20  # bytes of one request when hashing


class S3Backend:
    remote = True

    def __init__(self, url: str, lease_seconds: float, cache: Path | None) -> None:
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise StoreError(f"{url}: no bucket named; use s3://bucket/prefix")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix, self._lease_seconds = bucket, f"{prefix}/" if prefix else "", lease_seconds
        with self._errors():
            self._files = _file_system(attempts=5, rounds=3)
            endpoint = self._files.s3.meta.endpoint_url
        name = hashlib.sha256(f"{endpoint} {self.url}".encode()).hexdigest()[:16]
        self._cache = (cache or _default_cache()) / name
        self._answered = False

    def read(self, path: str) -> bytes | None:
        with self._errors():
            # The first request decides whether the endpoint is there at all; work under way deserves more patience.
            files = self._files if self._answered else _file_system(attempts=2, rounds=1)
            try:
                data = files.cat_file(self._url(path), max_concurrency=1)  # else it asks for the size first
            except FileNotFoundError as error:
                if _code(error) not in _ABSENT:
                    raise
                data = None
        self._answered = True
        return data

    def create(self, path: str, data: bytes) -> bool:
        return self.put(path, data, if_absent=True) is not None

    def put(self, path: str, data: bytes, *, if_absent: bool = False, if_tag: str = "") -> str | None:
        """Entity tag of what was written, or None if the condition did not hold.

        A request whose answer got lost is repeated by the client and then fails on its own first success, so a failed
        condition is checked against what lies there: equal bytes were ours (owners and attempts carry unique names).
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_tag} if if_tag else {}
        with self._errors():
            while True:
                try:
                    return self._call("put_object", Key=self._key(path), Body=data, **condition)["ETag"]
                except OSError as error:
                    if _code(error) in _CONFLICT:  # two conditional writes at once: the server asks to repeat
                        continue
                    if _code(error) not in _CONDITION_FAILED | _ABSENT:
                        raise
                    break
        seen = self.tag_and_age(path)  # first: nobody else writes these bytes, so if they lie there now, they did then
        return seen[0] if seen and self.read(path) == data else None

    def tag_and_age(self, path: str) -> tuple[str, float] | None:
        """Entity tag and seconds since the last write, both by the server's clock; None if absent."""
        with self._errors():
            try:
                head = self._call("head_object", Key=self._key(path))
            except FileNotFoundError as error:
                if _code(error) not in _ABSENT:
                    raise
                return None
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        return head["ETag"], now - head["LastModified"].timestamp()

    def remove(self, path: str) -> None:
        with self._errors():
            self._call("delete_object", Key=self._key(path))

    def remove_tree(self, prefix: str) -> None:
        names = [{"Key": self._key(f"{prefix}/{name}")} for name in self.walk(prefix)]
        with self._errors():
            for start in range(0, len(names), 1000):  # the protocol's limit
                # Not `rm`, which keeps what could not be deleted to itself.
                answer = self._call("delete_objects", Delete={"Objects": names[start : start + 1000], "Quiet": True})
                if failed := answer.get("Errors"):
                    raise StoreError(f"{self.url}: cannot delete {failed[0]['Key']}: {failed[0].get('Message')}")
        shutil.rmtree(self.workspace(prefix), ignore_errors=True)

    def walk(self, prefix: str = "") -> dict[str, Entry]:
        start = self._key(f"{prefix}/" if prefix else "")
        entries: dict[str, Entry] = {}
        more: dict[str, str] = {}
        with self._errors():
            while True:
                page = self._call("list_objects_v2", Prefix=start, **more)
                for found in page.get("Contents", []):
                    entries[found["Key"][len(start) :]] = Entry(found["Size"], found["LastModified"].timestamp())
                if not page["IsTruncated"]:
                    return entries
                more = {"ContinuationToken": page["NextContinuationToken"]}

    def sha256(self, path: str) -> str | None:
        with self._errors():
            try:
                with self._files.open(self._url(path), block_size=_BLOCK) as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                return None

    def workspace(self, prefix: str) -> Path:
        return self._cache / prefix

    def upload(self, prefix: str, names: Iterable[str]) -> None:
        for name in names:
            source = self.workspace(prefix) / name
            with self._errors(source):
                self._files.put_file(str(source), self._url(f"{prefix}/{name}"))

    def download(self, prefix: str, files: Iterable[StoredFile], folder: Path) -> None:
        for file in files:
            target = folder / file.path
            with self._errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    # One stream: s3fs takes a broken one up where it broke, but gives up on one of several.
                    self._files.get_file(self._url(f"{prefix}/{file.path}"), str(target), max_concurrency=1)
                except FileNotFoundError as error:
                    if _code(error) not in _ABSENT:
                        raise
                    raise CorruptStage(f"{prefix}/{file.path}: missing") from error

    @contextmanager
    def lease(self, prefix: str, wait: bool = True) -> Iterator[bool]:
        lease = ObjectLease(self, f"{prefix}/{LEASE}", self._lease_seconds)
        held = lease.acquire(wait)
        try:
            yield held
        finally:
            if held:
                lease.release()

    def leased(self, prefix: str) -> bool:
        seen = self.tag_and_age(f"{prefix}/{LEASE}")
        return seen is not None and seen[1] <= self._lease_seconds

    def _key(self, path: str) -> str:
        return self._prefix + path

    def _url(self, path: str) -> str:
        return f"s3://{self._bucket}/{self._key(path)}"

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._files.call_s3(method, Bucket=self._bucket, **parameters)

    @contextmanager
    def _errors(self, local: Path | None = None) -> Iterator[None]:
        """Turn what s3fs raises into a StoreError; `local` is the file on this side, if the block has one."""
        try:
            yield
        except (BotoCoreError, ValueError, *S3_RETRYABLE_ERRORS) as error:
            raise StoreError(
                f"{self.url}: {_one_line(error)}; check AWS_ENDPOINT_URL_S3 and the AWS_* variables"
            ) from error
        except OSError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                raise StoreError(f"{self.url}: bucket {self._bucket!r} does not exist; create it first") from error
            if code:
                raise StoreError(
                    f"{self.url}: {_one_line(error.__cause__)}; check AWS_* credentials and the bucket's rights"
                ) from error
            with os_errors(local or self.url):
                raise


def _file_system(attempts: int, rounds: int) -> S3FileSystem:
    """A connection that asks the server anew each time.

    attempts: of one request, on failures of the server and of the network.
    rounds:   of such attempts if it was the network, and of a download that breaks off.
    """
    config = {
        "connect_timeout": 3,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
    }
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        config["s3"] = {"addressing_style": "path"}  # own servers rarely have a name per bucket
    files = S3FileSystem(
        session=_session(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))),
        config_kwargs=config,
        max_concurrency=4,  # parts of 50 MiB in memory at a time
        use_listings_cache=False,  # a listing kept would hide what others write
        skip_instance_cache=True,  # an instance kept would outlive a changed environment
    )
    files.retries = rounds
    return files


@cache
def _session(_environment: frozenset[tuple[str, str]]) -> AioSession:
    """Credentials and the description of the service; to read them takes longer than a request, so they are shared."""
    return AioSession()


def _default_cache() -> Path:
    return Path(os.environ.get("MAMBALLAMA_CACHE") or "~/.cache/mamballama").expanduser() / "stages"


def _code(error: OSError) -> str:
    """What the server said, which s3fs keeps as the cause; empty if the error is not the server's."""
    return str(error.__cause__.response["Error"].get("Code")) if isinstance(error.__cause__, ClientError) else ""


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())
