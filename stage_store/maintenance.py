"""Look after a store: what lies there, whether it is still whole, and what no run needs any more."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stage_store.backend import Entry
from stage_store.errors import StoreError
from stage_store.lease import LEASE
from stage_store.store import MANIFEST, RUNS, Store

State = Literal["ok", "leased", "checkpoint", "corrupt", "unfinished"]
_KEY = re.compile(r"[0-9a-f]{64}")
_DAY = 86400.0


@dataclass(frozen=True)
class Item:
    """One key of a store.

    modified: seconds since 1970 of its newest file; size: bytes of everything below it.
    state:    ok (finished), leased (being computed), checkpoint (can be continued), corrupt (set aside), unfinished.
    attempt:  the one that counts, if the state is ok.
    fault:    why it is corrupt.
    """

    stage: str
    key: str
    modified: float
    size: int
    state: State
    attempt: str = ""
    fault: str = ""

    @property
    def prefix(self) -> str:
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True)
class Removal:
    path: str
    size: int
    reason: str


def items(store: Store) -> list[Item]:
    """Every key of the store, newest first; changes nothing."""
    found = [_item(store, stage, key, files) for (stage, key), files in store.listing().items()]
    return sorted(found, key=lambda item: (-item.modified, item.prefix))


def find(store: Store, prefix: str) -> tuple[str, str]:
    """(stage, key) of the one key that begins with `prefix`. Raises StoreError for none or several."""
    matches = sorted(found for found in store.listing() if prefix and found[1].startswith(prefix))
    if not matches:
        raise StoreError(f"{prefix!r}: no key or pinned run of that name in {store.url}; `ls` shows all keys")
    if len(matches) > 1:
        names = ", ".join(f"{stage} {key[: len(prefix) + 4]}" for stage, key in matches[:4])
        raise StoreError(f"{prefix!r}: begins {len(matches)} keys ({names}); give more digits")
    return matches[0]


def verify(store: Store) -> Iterator[tuple[str, str, str]]:
    """(stage, key, fault) of every manifest, fault empty if all is well; hashes all bytes, quarantines what fails."""
    for (stage, key), files in sorted(store.listing().items()):
        if MANIFEST not in files:
            continue
        manifest, fault = store.inspect(stage, key, files)
        if manifest:
            wrong = [f.path for f in manifest.files if store.backend.sha256(f"{manifest.prefix}/{f.path}") != f.sha256]
            fault = f"sha256 differs: {', '.join(wrong)}" if wrong else ""
        if fault:
            store.quarantine(stage, key, fault)
        yield stage, key, fault


def collect(
    store: Store, keep_runs: Collection[str] | None = None, young_days: float = 7.0, dry_run: bool = False
) -> list[Removal]:
    """Remove what no run reaches, except what is leased or younger than `young_days`.

    keep_runs: pinned runs to keep; others are forgotten. None keeps all; if no run is pinned at all, finished stages
    stay, and only broken and abandoned pieces go.
    """
    runs = store.runs()
    if unknown := sorted(set(keep_runs or ()) - runs.keys()):
        raise StoreError(f"run {unknown[0]!r}: not pinned in {store.url}; pinned: {', '.join(runs) or 'none'}")
    kept = {run: refs for run, refs in runs.items() if keep_runs is None or run in keep_runs}
    reached = _reached(store, {(ref.stage, ref.key) for refs in kept.values() for ref in refs})
    horizon = time.time() - young_days * _DAY
    removals = []
    for (stage, key), files in store.listing().items():
        item = _item(store, stage, key, files)
        if (stage, key) in reached or (not runs and item.state == "ok"):
            removals += _remove(store, item, _leftovers(item, files, horizon), dry_run)
        elif item.modified < horizon:
            removals += _remove(store, item, {"": Removal(item.prefix, item.size, "no run reaches it")}, dry_run)
    for run in runs.keys() - kept.keys():
        removals.append(Removal(f"{RUNS}/{run}", 0, "run not kept"))
        if not dry_run:
            store.unpin(run)
    return removals


def _item(store: Store, stage: str, key: str, files: Mapping[str, Entry]) -> Item:
    manifest, fault = store.inspect(stage, key, files)
    state: State = "unfinished"
    if manifest:
        state = "ok"
    elif store.backend.leased(f"{stage}/{key}"):
        state = "leased"
    elif fault:
        state = "corrupt"
    elif any(name.startswith("ckpt/") for name in files):
        state = "checkpoint"
    elif any(name.startswith("CORRUPT-") for name in files):
        state, fault = "corrupt", "quarantined"
    modified = _modified(files)
    size = sum(entry.size for entry in files.values())
    return Item(stage, key, modified, size, state, manifest.attempt if manifest else "", fault)


def _modified(files: Mapping[str, Entry]) -> float:
    return max((entry.modified for name, entry in files.items() if name != LEASE), default=0.0)


def _leftovers(item: Item, files: Mapping[str, Entry], horizon: float) -> dict[str, Removal]:
    """Pieces of a kept key that count no more: attempts that were not committed, manifests that were set aside."""
    pieces: dict[str, list[Entry]] = {}
    for name, entry in files.items():
        top = name.split("/")[0]
        if (top.startswith("a-") and top != item.attempt) or top.startswith("CORRUPT-"):
            pieces.setdefault(top, []).append(entry)
    return {
        top: Removal(f"{item.prefix}/{top}", sum(e.size for e in entries), "left over from a failed attempt")
        for top, entries in pieces.items()
        if max(e.modified for e in entries) < horizon
    }


def _remove(store: Store, item: Item, pieces: Mapping[str, Removal], dry_run: bool) -> list[Removal]:
    """Remove pieces of a key under its lease (the key "" is the whole folder); nothing if somebody is at work there."""
    if not pieces or store.backend.leased(item.prefix):
        return []
    if dry_run:
        return list(pieces.values())
    with store.backend.lease(item.prefix, wait=False) as held:
        if not held or _modified(store.backend.walk(item.prefix)) != item.modified:
            return []  # somebody is, or was, at work on it since it was listed
        for name, removal in pieces.items():
            if not name:
                store.backend.remove(f"{item.prefix}/{MANIFEST}")  # first, so nobody finds half a stage
            if name.startswith("CORRUPT-"):
                store.backend.remove(removal.path)
            else:
                store.backend.remove_tree(removal.path)
    return list(pieces.values())


def _reached(store: Store, roots: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """`roots` and everything upstream of them."""
    stage_of = {key: stage for stage, key in store.listing()}
    reached, waiting = set(), list(roots)
    while waiting:
        found = waiting.pop()
        if found in reached:
            continue
        reached.add(found)
        payload = store.payload(*found) or {}
        waiting += [(stage_of[key], key) for key in _keys(payload.get("upstream")) if key in stage_of]
    return reached


def _keys(value: Any) -> Iterator[str]:
    """Every key anywhere in a payload's `upstream`."""
    if isinstance(value, str) and _KEY.fullmatch(value):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _keys(part)
    elif isinstance(value, list):
        for part in value:
            yield from _keys(part)
