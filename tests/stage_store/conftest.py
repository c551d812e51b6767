"""Stores to test on: a folder, and a bucket of a real S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from stage_store import Store


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAMBALLAMA_STORE", raising=False)
    return tmp_path / "cache"


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
