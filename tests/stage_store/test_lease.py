"""Two processes and one key."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_helpers import compute, payload

import stage_store.lease
from stage_store import Store, stage_key
from stage_store.lease import ObjectLease

ROOT = Path(__file__).parents[2]
PREFIX = f"align/{stage_key(payload())}"
LIMIT = 40.0  # seconds; only a broken lease comes near
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    """Start a worker on the store; all that are left are killed at the end."""
    started: list[subprocess.Popen[str]] = []
    paths = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", Path(__file__).parent]))}

    def start(lease_seconds: float) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), url, str(lease_seconds)]
        started.append(subprocess.Popen(command, text=True, env={**os.environ, **paths}, **pipes))
        return started[-1]

    def kill() -> None:
        for process in started:
            process.kill()

    limit = threading.Timer(LIMIT, kill)  # ends the streams, so that a test that waits in vain fails
    limit.start()
    yield start
    limit.cancel()
    kill()
    for process in started:
        process.communicate()


def line_with(text: str, stream) -> str:
    """Read on to the first line that holds `text`; fails at the end of the stream."""
    seen = []
    for line in stream:
        seen.append(line)
        if text in line:
            return line
    pytest.fail(f"no {text!r} in {''.join(seen)!r}")


def go_on(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_second_process_waits_and_adopts(start, url):
    owner = start(60)
    line_with("computing", owner.stdout)
    other = start(60)
    assert f"process {owner.pid} on" in line_with("waiting for", other.stderr)
    go_on(owner)
    computed, adopted = line_with("computed", owner.stdout), line_with("adopted", other.stdout)
    assert computed.split()[1] == adopted.split()[1]
    assert "adopting align" in other.stderr.read()
    assert Store(url).lookup("align", stage_key(payload())) is not None


def test_killed_owner_is_taken_over(start, url):
    owner = start(2)
    line_with("computing", owner.stdout)
    other = start(2)
    line_with("waiting for", other.stderr)
    owner.kill()
    assert f"process {owner.pid} on" in line_with("taking over", other.stderr)
    line_with("computing", other.stdout)
    go_on(other)
    line_with("computed", other.stdout)
    found = Store(url).lookup("align", stage_key(payload()))
    assert [file.path for file in found.files] == ["half", "model.safetensors"]


def test_lookup_needs_no_lease(store):
    ref, _ = compute(store)
    with store.backend.lease(PREFIX):
        assert store.backend.leased(PREFIX)
        assert store.lookup("align", ref.key) is not None
        assert compute(store) == (ref, True)
    assert not store.backend.leased(PREFIX)


def test_lease_without_waiting_says_no(store):
    with store.backend.lease(PREFIX) as held, store.backend.lease(PREFIX, wait=False) as second:
        assert (held, second) == (True, False)
    with store.backend.lease(PREFIX, wait=False) as free:
        assert free


def test_lease_survives_removal_of_its_folder_while_waiting(tmp_path, monkeypatch):
    """gc may remove the very file that a waiting process has open; the waiter must not hold a ghost."""
    store = Store(tmp_path / "store")
    file_is_open = threading.Event()
    monkeypatch.setattr(stage_store.lease.logger, "info", lambda *_: file_is_open.set())
    seen = []

    def wait() -> None:
        with store.backend.lease(PREFIX):
            seen.append(store.backend.leased(PREFIX))

    thread = threading.Thread(target=wait, daemon=True)
    with store.backend.lease(PREFIX):
        thread.start()
        assert file_is_open.wait(LIMIT)
        store.backend.remove_tree(PREFIX)
    thread.join(LIMIT)
    assert seen == [True]


class Objects:
    """An object store with a clock that is set by hand; counts as S3 does."""

    url = "s3://stages"

    def __init__(self) -> None:
        self.held: dict[str, tuple[bytes, int, float]] = {}
        self.now, self.writes = 0.0, 0

    def read(self, path: str) -> bytes | None:
        return self.held[path][0] if path in self.held else None

    def put(self, path: str, data: bytes, *, if_absent: bool = False, if_tag: str = "") -> str | None:
        if (if_absent and path in self.held) or (if_tag and if_tag != str(self.held.get(path, (b"", 0, 0.0))[1])):
            return None
        self.writes += 1
        self.held[path] = (data, self.writes, self.now)
        return str(self.writes)

    def tag_and_age(self, path: str) -> tuple[str, float] | None:
        return (str(self.held[path][1]), self.now - self.held[path][2]) if path in self.held else None

    def remove(self, path: str) -> None:
        del self.held[path]


def test_only_a_silent_lease_is_taken_over_and_its_owner_leaves_the_thief_alone():
    objects = Objects()
    owner, thief, late = (ObjectLease(objects, "LEASE.json", 1000.0) for _ in range(3))
    assert owner.acquire(wait=False)
    objects.now = 999.0
    assert not thief.acquire(wait=False)
    objects.now = 1001.0
    assert thief.acquire(wait=False)
    assert not late.acquire(wait=False)
    owner.release()
    assert objects.read("LEASE.json") is not None
    thief.release()
    assert objects.read("LEASE.json") is None


def test_a_beat_between_look_and_take_defeats_the_thief(monkeypatch):
    objects = Objects()
    owner, thief = (ObjectLease(objects, "LEASE.json", 1000.0) for _ in range(2))
    assert owner.acquire(wait=False)
    objects.now = 1001.0
    seen = objects.tag_and_age("LEASE.json")
    objects.put("LEASE.json", owner._body(), if_tag=seen[0])
    monkeypatch.setattr(objects, "tag_and_age", lambda path: seen)
    assert not thief.acquire(wait=False)
    owner.release()


def test_beats_never_have_equal_bytes():
    lease = ObjectLease(Objects(), "LEASE.json", 1.0)
    assert lease._body() != lease._body()
