import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_helpers import Work, compute, damage, payload

import stage_store.errors
import stage_store.files
from stage_store import SCHEMA, CorruptStage, StageRef, Store, StoreError, stage_key

KEY = stage_key(payload())
PREFIX = f"align/{KEY}"


def test_computed_once_then_found(store, other_machine):
    work = Work()
    ref, hit = compute(store, work=work)
    again, hit_again = compute(other_machine(), work=work)
    assert (hit, hit_again, work.calls) == (False, True, 1)
    assert ref == again == StageRef.from_dict(ref.to_dict())
    assert (ref.stage, ref.key, ref.url) == ("align", KEY, store.url)


def test_manifest_accounts_for_every_file_and_keeps_payload_and_meta(store):
    ref, _ = compute(store)
    manifest = store.manifest(ref)
    assert [(file.path, file.size) for file in manifest.files] == [
        ("model.safetensors", 100_000),
        ("sub/config.json", 2),
    ]
    assert manifest.size == 100_002
    assert (manifest.payload, manifest.meta["summary"], manifest.schema) == (payload(), {"loss": 0.5}, SCHEMA)
    assert manifest.digest == ref.digest


def test_fetched_files_are_those_that_were_written(store, other_machine):
    ref, _ = compute(store)
    for reader in (store, other_machine()):
        folder = reader.fetch(reader.manifest(ref))
        assert (folder / "model.safetensors").read_bytes() == b"w" * 100_000
        assert (folder / "sub" / "config.json").read_text() == "{}"
        assert reader.fetch(reader.manifest(ref)) == folder


def test_meta_may_hold_figures_of_numpy_and_nan(folder_store):
    ref, _ = compute(folder_store, work=lambda out, _: {"summary": {"loss": np.float32(0.5), "rate": float("nan")}})
    summary = folder_store.manifest(ref).meta["summary"]
    assert summary["loss"] == 0.5
    assert np.isnan(summary["rate"])


def test_local_publish_leaves_the_files_where_work_wrote_them(tmp_path):
    written = {}

    def work(out: Path, _: object) -> dict[str, object]:
        (out / "model.safetensors").write_bytes(b"w")
        written["inode"] = (out / "model.safetensors").stat().st_ino
        return {}

    store = Store(tmp_path / "store")
    ref, _ = compute(store, work=work)
    assert (store.fetch(store.manifest(ref)) / "model.safetensors").stat().st_ino == written["inode"]


def test_each_file_is_hashed_once_at_publish_and_not_again_by_fetch(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    manifest = store.manifest(compute(store)[0])
    monkeypatch.setattr(stage_store.files.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    store.fetch(manifest)


@pytest.mark.parametrize(
    ("path", "data"),
    [("model.safetensors", b"w" * 99_999), ("model.safetensors", b""), ("sub/config.json", None)],
    ids=["truncated", "empty", "missing"],
)
def test_wrong_size_is_a_miss_and_is_computed_again(store, path, data, caplog):
    ref, _ = compute(store)
    damage(store, f"{store.manifest(ref).prefix}/{path}", data)
    assert store.lookup("align", KEY) is None
    assert "set aside" in caplog.text
    assert compute(store)[1] is False
    assert store.lookup("align", KEY) is not None


def test_flipped_bytes_are_found_by_fetch_and_quarantined(store, other_machine):
    ref, _ = compute(store)
    manifest = store.manifest(ref)
    damage(store, f"{manifest.prefix}/model.safetensors", b"x" * 100_000)
    reader = other_machine()
    with pytest.raises(CorruptStage, match=r"model\.safetensors: sha256 differs"):
        reader.fetch(reader.manifest(ref))
    assert reader.lookup("align", KEY) is None
    with pytest.raises(CorruptStage, match="run the flow again"):
        reader.manifest(ref)
    again, hit = compute(reader)
    assert (again, hit) == (ref, False)
    assert (reader.fetch(reader.manifest(again)) / "model.safetensors").read_bytes() == b"w" * 100_000


def test_late_quarantine_spares_what_was_computed_since(store):
    ref, _ = compute(store)
    stale = store.manifest(ref)
    compute(store, force=True)
    damage(store, f"{stale.prefix}/model.safetensors", b"x" * 100_000)
    if store.backend.remote:
        (store.backend.workspace(stale.prefix) / "model.safetensors").unlink()
    with pytest.raises(CorruptStage):
        store.fetch(stale)
    assert store.lookup("align", KEY) is not None


def test_damaged_cache_is_brought_again(s3_url):
    store = Store(s3_url)
    manifest = store.manifest(compute(store)[0])
    cached = store.fetch(manifest) / "model.safetensors"
    cached.write_bytes(b"x" * 100_000)
    assert (store.fetch(manifest) / "model.safetensors").read_bytes() == b"w" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-10],
        lambda data: b"",
        lambda data: data.replace(b'"loss": 0.5', b'"loss": 0.4'),
        lambda data: data.replace(b'"steps": 40', b'"steps": 41'),
    ],
    ids=["truncated", "empty", "meta altered", "payload altered"],
)
def test_altered_manifest_is_no_manifest(folder_store, change):
    compute(folder_store)
    data = folder_store.backend.read(f"{PREFIX}/MANIFEST.json")
    assert change(data) != data
    damage(folder_store, f"{PREFIX}/MANIFEST.json", change(data))
    assert folder_store.lookup("align", KEY) is None
    assert compute(folder_store)[1] is False


def test_manifest_of_another_key_is_no_manifest(store):
    other = payload(steps=1)
    compute(store)
    compute(store, other)
    damage(store, f"align/{stage_key(other)}/MANIFEST.json", store.backend.read(f"{PREFIX}/MANIFEST.json"))
    assert store.lookup("align", stage_key(other)) is None


def test_crash_before_the_manifest_leaves_no_stage(store, monkeypatch):
    def crash(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", crash)
        with pytest.raises(KeyboardInterrupt):
            compute(store)
    assert store.lookup("align", KEY) is None
    assert compute(store)[1] is False


def test_interruption_after_the_commit_keeps_the_stage(store, monkeypatch):
    publish = store._publish

    def interrupted(*arguments: object) -> None:
        publish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute(store)
    ref, hit = compute(store)
    assert hit
    assert (store.fetch(store.manifest(ref)) / "model.safetensors").is_file()


def test_failed_work_passes_its_error_and_leaves_neither_stage_nor_lease(store):
    def fail(out: Path, _: object) -> dict[str, object]:
        (out / "half").write_bytes(b"h")
        raise ZeroDivisionError("loss is not a number")

    with pytest.raises(ZeroDivisionError, match="not a number"):
        compute(store, work=fail)
    assert not any(path.endswith("half") for path in store.backend.walk())
    assert not store.backend.leased(PREFIX)
    assert compute(store)[1] is False


def test_first_manifest_wins_and_the_later_attempt_adopts_it(store, other_machine):
    """As when an owner was suspended, lost its lease and comes back."""

    def late(out: Path, _: object) -> dict[str, object]:
        (out / "model.safetensors").write_bytes(b"late")
        rival = other_machine()
        rival.backend.workspace(f"{PREFIX}/a-rival").mkdir(parents=True)
        rival._publish("align", KEY, "a-rival", payload(), {"summary": {}})
        return {}

    ref, hit = compute(store, work=late)
    assert hit
    assert store.manifest(ref).attempt == "a-rival"
    assert not any(path.endswith("model.safetensors") for path in store.backend.walk())


def test_force_computes_again_from_the_start(store):
    compute(store, work=Work(b"one"))
    work = Work(b"two")
    ref, hit = compute(store, work=work, force=True)
    assert (hit, work.calls) == (False, 1)
    assert (store.fetch(store.manifest(ref)) / "model.safetensors").read_bytes() == b"two"


def test_recomputed_stage_is_told_from_the_one_referred_to(folder_store, caplog):
    old, _ = compute(folder_store, work=Work(b"one"))
    compute(folder_store, work=Work(b"two"), force=True)
    folder_store.manifest(old)
    assert "computed again since" in caplog.text


def test_key_must_be_that_of_the_payload(folder_store):
    for stage, key, given in [
        ("align", stage_key(payload(steps=1)), payload()),
        ("sft", KEY, payload()),
    ]:
        with pytest.raises(StoreError, match="not the key of the payload"):
            folder_store.compute(stage, key, given, Work())


@pytest.mark.parametrize("stage, key", [("../align", KEY), ("Align", KEY), ("align", "abc"), ("align", f"{KEY}/..")])
def test_names_cannot_leave_the_store(folder_store, stage, key):
    with pytest.raises(StoreError, match="64 hex digits"):
        folder_store.lookup(stage, key)


def test_links_are_refused(folder_store):
    def link(out: Path, _: object) -> dict[str, object]:
        (out / "model.safetensors").symlink_to("/etc/hostname")
        return {}

    with pytest.raises(StoreError, match=r"model\.safetensors: is a link"):
        compute(folder_store, work=link)


def test_full_disk_while_working_is_one_clear_line(store):
    def work(out: Path, _: object) -> dict[str, object]:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"w")
        return {}

    with pytest.raises(StoreError, match=r"no space left; free some .* or choose another store"):
        compute(store, work=work)
    assert store.lookup("align", KEY) is None


@pytest.mark.parametrize(
    ("free", "message"),
    [(0, "file write failed"), (10**9, "I/O error: No space left on device (os error 28)")],
    ids=["as torch hides it", "as safetensors words it"],
)
def test_full_disk_is_recognised_behind_libraries(folder_store, monkeypatch, free, message):
    def work(out: Path, _: object) -> dict[str, object]:
        raise RuntimeError(message)

    usage = stage_store.errors.shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(stage_store.errors.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="no space left"):
        compute(folder_store, work=work)


@pytest.mark.parametrize("nth", range(6))
def test_full_disk_at_any_point_of_the_commit_leaves_all_or_nothing(tmp_path, monkeypatch, nth):
    store = Store(tmp_path / "store")
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="no space left"):
            compute(store)
    found = store.lookup("align", KEY)
    assert found is None or (store.fetch(found) / "model.safetensors").stat().st_size == 100_000
    ref, _ = compute(store)
    assert (store.fetch(store.manifest(ref)) / "model.safetensors").stat().st_size == 100_000


def test_newer_store_is_refused(store, url):
    damage(store, "STORE.json", json.dumps({"schema": SCHEMA + 1}).encode())
    with pytest.raises(StoreError, match=f"schema {SCHEMA + 1}, this version reads up to {SCHEMA}; upgrade"):
        Store(url)


def test_newer_manifest_is_refused_but_not_quarantined(store):
    compute(store)
    data = json.loads(store.backend.read(f"{PREFIX}/MANIFEST.json"))
    damage(store, f"{PREFIX}/MANIFEST.json", json.dumps({**data, "schema": SCHEMA + 1}).encode())
    with pytest.raises(StoreError, match="upgrade"):
        store.lookup("align", KEY)
    assert store.backend.read(f"{PREFIX}/MANIFEST.json") is not None


def test_something_that_is_no_store_is_refused(store, url):
    damage(store, "STORE.json", b"hello")
    with pytest.raises(StoreError, match="is this a stage store"):
        Store(url)


def test_pins_add_up(store):
    ref, _ = compute(store)
    other, _ = compute(store, payload(steps=60))
    store.pin("DistillFlow/7", [ref])
    store.pin("DistillFlow/7", [ref, other])
    assert store.runs() == {"DistillFlow/7": [ref, other]}


def test_store_in_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        Store(tmp_path / "file" / "store")


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://"])
def test_unknown_place_is_refused(url):
    with pytest.raises(StoreError, match=r"use (a folder, file:// or )?s3://bucket/prefix"):
        Store(url)


def test_import_stays_cheap():
    check = (
        "import stage_store, sys; sys.exit(bool({'torch', 'transformers', 'metaflow', 's3fs'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2]).returncode == 0
