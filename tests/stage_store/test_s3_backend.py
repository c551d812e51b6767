"""What only an S3 store has to get right; what it shares with a folder is in the other files."""

from __future__ import annotations

import hashlib
import time

import pytest

from stage_store import CorruptStage, Store, StoreError
from stage_store.files import StoredFile


def test_swap_needs_the_tag_last_seen(s3_url):
    backend = Store(s3_url).backend
    first = backend.put("lease", b"one", if_absent=True)
    second = backend.put("lease", b"two", if_tag=first)
    assert second not in (None, first)
    assert backend.put("lease", b"three", if_tag=first) is None
    assert backend.put("absent", b"one", if_tag=first) is None
    assert backend.put("lease", b"two", if_tag=first) == second == backend.tag_and_age("lease")[0]


def test_lost_answer_to_a_conditional_write_is_recognised(s3_url):
    """The server has the object, the client never learned it and asks again."""
    backend = Store(s3_url).backend
    assert backend.create("one", b"unique")
    assert backend.create("one", b"unique")
    assert not backend.create("one", b"other")
    assert backend.read("one") == b"unique"


def test_age_is_by_the_clock_of_the_server(s3_url, monkeypatch):
    backend = Store(s3_url).backend
    backend.create("one", b"1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)  # this machine's clock is an hour fast
    assert backend.tag_and_age("one")[1] < 600


def test_what_another_machine_does_is_seen_at_once(s3_url):
    """s3fs would keep listings, and what is not in them would not exist."""
    here, there = Store(s3_url).backend, Store(s3_url).backend
    there.create("runs/one", b"1")
    assert list(here.walk("runs")) == ["one"]
    assert here.sha256("runs/two") is None
    there.create("runs/two", b"22")
    assert {path: entry.size for path, entry in here.walk("runs").items()} == {"one": 1, "two": 2}
    assert here.sha256("runs/two") == hashlib.sha256(b"22").hexdigest()
    there.remove_tree("runs")
    assert here.walk("runs") == {}


def test_long_listings_come_whole(s3_url, monkeypatch):
    backend = Store(s3_url).backend
    for name in ["a", "b", "c/d", "e f", "g+h"]:
        backend.create(f"long/{name}", b"")
    call = backend._call
    monkeypatch.setattr(backend, "_call", lambda method, **parameters: call(method, **parameters, MaxKeys=2))
    assert sorted(backend.walk("long")) == ["a", "b", "c/d", "e f", "g+h"]


def test_empty_file_has_a_hash(s3_url):
    backend = Store(s3_url).backend
    backend.create("empty", b"")
    assert backend.sha256("empty") == hashlib.sha256().hexdigest()


def test_download_tells_what_is_missing_from_a_disk_that_is_full(s3_url, tmp_path):
    backend = Store(s3_url).backend
    backend.create("align/model", b"w")
    (tmp_path / "model").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"model: no space left") as caught:
        backend.download("align", [StoredFile("model", 1, "")], tmp_path)
    assert not isinstance(caught.value, CorruptStage)
    with pytest.raises(CorruptStage, match=r"align/none: missing"):
        backend.download("align", [StoredFile("none", 1, "")], tmp_path)


def test_file_that_cannot_be_read_is_named_by_upload(s3_url):
    backend = Store(s3_url).backend
    with pytest.raises(StoreError, match=r"align/none: No such file"):
        backend.upload("align", ["none"])


def test_unreachable_endpoint_is_told_within_seconds(monkeypatch, s3_url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(StoreError, match="check AWS_ENDPOINT_URL_S3") as caught:
        Store(s3_url)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_endpoint_without_scheme_is_one_clear_line(monkeypatch, s3_url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
    with pytest.raises(StoreError, match="Invalid endpoint: localhost:9000; check AWS_ENDPOINT_URL_S3"):
        Store(s3_url)


def test_missing_bucket_and_wrong_secret_are_named(monkeypatch, s3_url):
    with pytest.raises(StoreError, match="bucket 'nobucket' does not exist"):
        Store("s3://nobucket/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="check AWS_\\* credentials"):
        Store(s3_url)
