"""A store in an S3 bucket. Endpoint, region and credentials come from the usual AWS_* variables.

The server must honour `If-None-Match` and `If-Match` on PUT, as AWS S3, MinIO, Ceph and SeaweedFS do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from stage_store.backend import Entry
from stage_store.errors import CorruptStage, StoreError, os_errors
from stage_store.files import StoredFile
from stage_store.lease import LEASE, ObjectLease

_ABSENT = {"404", "NoSuchKey"}
_CONDITION_FAILED = {"412", "PreconditionFailed"}
_CONFLICT = {"409", "ConditionalRequestConflict"}


class S3Backend:
    remote = True

    def __init__(self, url: str, lease_seconds: float, cache: Path | None) -> None:
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise StoreError(f"{url}: no bucket named; use s3://bucket/prefix")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix, self._lease_seconds = bucket, f"{prefix}/" if prefix else "", lease_seconds
        with self._errors():
            # The first request decides whether the endpoint is there at all; work under way deserves more patience.
            session = boto3.session.Session()
            self._probe, self._client = _client(session, attempts=2), _client(session, attempts=6)
        endpoint = self._client.meta.endpoint_url
        name = hashlib.sha256(f"{endpoint} {self.url}".encode()).hexdigest()[:16]
        self._cache = (cache or _default_cache()) / name
        self._probed = False

    def read(self, path: str) -> bytes | None:
        client = self._client if self._probed else self._probe
        with self._errors():
            try:
                data = client.get_object(Bucket=self._bucket, Key=self._key(path))["Body"].read()
            except ClientError as error:
                if _code(error) not in _ABSENT:
                    raise
                data = None
        self._probed = True
        return data

    def create(self, path: str, data: bytes) -> bool:
        return self.put(path, data, if_absent=True) is not None

    def put(self, path: str, data: bytes, *, if_absent: bool = False, if_tag: str = "") -> str | None:
        """Entity tag of what was written, or None if the condition did not hold.

        A request whose answer got lost is repeated by the client and then fails on its own first success, so a failed
        condition is checked against what lies there: equal bytes were ours (owners and attempts carry unique names).
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_tag} if if_tag else {}
        where = {"Bucket": self._bucket, "Key": self._key(path)}
        with self._errors():
            while True:
                try:
                    return self._client.put_object(**where, Body=data, **condition)["ETag"]
                except ClientError as error:
                    if _code(error) in _CONFLICT:  # two conditional writes at once: the server asks to repeat
                        continue
                    if _code(error) not in _CONDITION_FAILED | _ABSENT:
                        raise
                    break
            try:
                found = self._client.get_object(**where)
            except ClientError as error:
                if _code(error) not in _ABSENT:
                    raise
                return None
            return found["ETag"] if found["Body"].read() == data else None

    def tag_and_age(self, path: str) -> tuple[str, float] | None:
        """Entity tag and seconds since the last write, both by the server's clock; None if absent."""
        with self._errors():
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._key(path))
            except ClientError as error:
                if _code(error) not in _ABSENT:
                    raise
                return None
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        return head["ETag"], now - head["LastModified"].timestamp()

    def remove(self, path: str) -> None:
        with self._errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(path))

    def remove_tree(self, prefix: str) -> None:
        names = [{"Key": self._key(f"{prefix}/{name}")} for name in self.walk(prefix)]
        with self._errors():
            for start in range(0, len(names), 1000):  # the protocol's limit
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": names[start : start + 1000], "Quiet": True}
                )
                if failed := answer.get("Errors"):
                    raise StoreError(f"{self.url}: cannot delete {failed[0]['Key']}: {failed[0].get('Message')}")
        shutil.rmtree(self.workspace(prefix), ignore_errors=True)

    def walk(self, prefix: str = "") -> dict[str, Entry]:
        start = self._key(f"{prefix}/" if prefix else "")
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
            return {
                found["Key"][len(start) :]: Entry(found["Size"], found["LastModified"].timestamp())
                for page in pages
                for found in page.get("Contents", [])
            }

    def sha256(self, path: str) -> str | None:
        digest = hashlib.sha256()
        with self._errors():
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=self._key(path))["Body"]
            except ClientError as error:
                if _code(error) not in _ABSENT:
                    raise
                return None
            for chunk in body.iter_chunks(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def workspace(self, prefix: str) -> Path:
        return self._cache / prefix

    def upload(self, prefix: str, names: Iterable[str]) -> None:
        for name in names:
            with self._errors():
                self._client.upload_file(
                    str(self.workspace(prefix) / name), self._bucket, self._key(f"{prefix}/{name}")
                )

    def download(self, prefix: str, files: Iterable[StoredFile], folder: Path) -> None:
        for file in files:
            target = folder / file.path
            with os_errors(target), self._errors():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._client.download_file(self._bucket, self._key(f"{prefix}/{file.path}"), str(target))
                except ClientError as error:
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

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if _code(error) == "NoSuchBucket":
                raise StoreError(f"{self.url}: bucket {self._bucket!r} does not exist; create it first") from error
            raise StoreError(
                f"{self.url}: {_one_line(error)}; check AWS_* credentials and the bucket's rights"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(
                f"{self.url}: {_one_line(error)}; check AWS_ENDPOINT_URL_S3 and the AWS_* variables"
            ) from error


def _client(session: boto3.session.Session, attempts: int) -> Any:
    own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return session.client(
        "s3",
        config=Config(
            connect_timeout=3,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": attempts},
            s3={"addressing_style": "path"} if own_server else None,  # own servers rarely have a name per bucket
        ),
    )


def _default_cache() -> Path:
    return Path(os.environ.get("MAMBALLAMA_CACHE") or "~/.cache/mamballama").expanduser() / "stages"


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
