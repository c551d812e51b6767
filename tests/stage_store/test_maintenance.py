import os
import time
from pathlib import Path

import pytest
from store_helpers import compute, damage, payload

from stage_store import Checkpoints, Store, StoreError, stage_key
from stage_store.maintenance import collect, find, items, verify

KEY = stage_key(payload())
NOW = -1.0  # days: even what was written this second is old


def states(store: Store) -> dict[int, str]:
    return {store.payload(item.stage, item.key)["config"]["steps"]: item.state for item in items(store)}


def crash(out: Path, checkpoints: Checkpoints) -> dict[str, object]:
    checkpoints.save(10, lambda folder: (folder / "weights").write_text("w") and None)
    raise ZeroDivisionError


def crashed(store: Store, **more: object) -> None:
    with pytest.raises(ZeroDivisionError):
        compute(store, payload(**more), work=crash)


def test_every_state_is_told(store):
    compute(store)
    crashed(store, steps=1)
    broken, _ = compute(store, payload(steps=2))
    damage(store, f"{store.manifest(broken).prefix}/sub/config.json", None)
    with pytest.raises(StoreError, match="link"):
        compute(store, payload(steps=3), work=lambda out, _: (out / "x").symlink_to("y") or {})
    seen = {}
    compute(store, payload(steps=4), work=lambda out, _: seen.update(states(store)) or {})
    assert seen == {40: "ok", 1: "checkpoint", 2: "corrupt", 3: "unfinished", 4: "leased"}
    store.lookup("align", broken.key)
    assert states(store) == {40: "ok", 1: "checkpoint", 2: "corrupt", 3: "unfinished", 4: "ok"}


def test_item_has_size_and_age(store):
    compute(store)
    (item,) = items(store)
    assert 100_002 < item.size < 110_000
    assert abs(time.time() - item.modified) < 60


def test_find_takes_a_unique_beginning(store):
    compute(store)
    assert find(store, KEY[:6]) == find(store, KEY) == ("align", KEY)
    with pytest.raises(StoreError, match="no key or pinned run"):
        find(store, "zzz")


def test_find_refuses_an_ambiguous_beginning(tmp_path):
    store = Store(tmp_path)
    for key in ("ab" * 32, "ac" * 32):
        store.backend.create(f"align/{key}/PAYLOAD.json", b"{}")
    with pytest.raises(StoreError, match="begins 2 keys .*give more digits"):
        find(store, "a")


def test_verify_hashes_all_and_quarantines_what_fails(store):
    compute(store)
    broken, _ = compute(store, payload(steps=2))
    damage(store, f"{store.manifest(broken).prefix}/model.safetensors", b"x" * 100_000)
    assert {key: fault for _, key, fault in verify(store)} == {
        KEY: "",
        broken.key: "sha256 differs: model.safetensors",
    }
    assert store.lookup("align", broken.key) is None
    assert [key for _, key, _ in verify(store)] == [KEY]


def test_gc_keeps_what_runs_reach_upstream_included(store):
    teacher, _ = compute(store, payload(stage="teacher"))
    align, _ = compute(store, payload(upstream={"teacher": teacher.key}))
    stray, _ = compute(store, payload(steps=1))
    store.pin("run/1", [align])
    planned = collect(store, young_days=NOW, dry_run=True)
    assert [removal.path for removal in planned] == [f"align/{stray.key}"]
    assert store.lookup("align", stray.key) is not None
    assert collect(store, young_days=NOW) == planned
    assert store.lookup("align", stray.key) is None
    assert store.lookup("align", align.key) is not None
    assert store.lookup("teacher", teacher.key) is not None
    assert collect(store, young_days=NOW) == []


def test_gc_keep_run_forgets_the_others(store):
    one, _ = compute(store, payload(steps=1))
    two, _ = compute(store, payload(steps=2))
    store.pin("run/1", [one])
    store.pin("run/2", [two])
    collect(store, ["run/2"], young_days=NOW)
    assert store.runs() == {"run/2": [two]}
    assert (store.lookup("align", one.key), store.lookup("align", two.key)) == (None, store.manifest(two))


def test_gc_of_an_unknown_run_removes_nothing(store):
    ref, _ = compute(store)
    store.pin("run/1", [ref])
    with pytest.raises(StoreError, match=r"run 'run/2': not pinned .*pinned: run/1"):
        collect(store, ["run/1", "run/2"], young_days=NOW)
    assert store.lookup("align", KEY) is not None


def test_gc_without_pins_keeps_finished_stages_and_drops_leftovers(store):
    old = store.manifest(compute(store)[0])
    new = store.manifest(compute(store, force=True)[0])
    crashed(store, steps=1)
    removed = {removal.path for removal in collect(store, young_days=NOW)}
    (aside,) = removed - {old.prefix, f"align/{stage_key(payload(steps=1))}"}
    assert aside.startswith(f"align/{KEY}/CORRUPT-")
    assert (states(store), store.lookup("align", KEY)) == ({40: "ok"}, new)
    assert not any(path.startswith(old.prefix) for path in store.backend.walk())


def test_gc_spares_the_young_and_the_leased(store):
    crashed(store, steps=1)
    stray, _ = compute(store, payload(steps=2))
    store.pin("run/1", [compute(store)[0]])
    assert collect(store) == []
    with store.backend.lease(f"align/{stray.key}"):
        assert [removal.path for removal in collect(store, young_days=NOW)] == [f"align/{stage_key(payload(steps=1))}"]
    assert store.lookup("align", stray.key) is not None


def test_gc_spares_what_was_touched_since_it_was_listed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    stray, _ = compute(store)
    store.pin("run/1", [compute(store, payload(steps=1))[0]])
    lease = store.backend.lease

    def touched_first(prefix: str, wait: bool = True):
        os.utime(tmp_path / prefix / "MANIFEST.json", (time.time() + 5, time.time() + 5))
        return lease(prefix, wait)

    monkeypatch.setattr(store.backend, "lease", touched_first)
    assert collect(store, young_days=NOW) == []
    assert store.lookup("align", stray.key) is not None
