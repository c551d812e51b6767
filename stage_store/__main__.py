"""`python -m stage_store [--store URL] ls | explain KEY|RUN | verify | gc`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stage_store.errors import StoreError
from stage_store.explain import nearest
from stage_store.maintenance import Item, collect, find, items, verify
from stage_store.store import Store

_SHORT = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if `verify` found something broken, 2 if the request cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m stage_store", description="Look into the store of finished stages."
    )
    parser.add_argument(
        "--store",
        default=os.environ.get("MAMBALLAMA_STORE") or ".mamballama/store",
        help="folder or s3://bucket/prefix (default: $MAMBALLAMA_STORE, else .mamballama/store)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("ls", help="all keys: stage, age, size, state")
    explain = commands.add_parser("explain", help="what differs from the nearest finished key of the same stage")
    explain.add_argument("name", metavar="KEY|RUN", help="a key, the beginning of one, or a pinned run")
    commands.add_parser("verify", help="hash every finished stage; what fails is set aside")
    gc = commands.add_parser("gc", help="remove what no pinned run reaches")
    gc.add_argument("--keep-run", nargs="+", action="extend", metavar="RUN", help="keep these runs only (default: all)")
    gc.add_argument("--young-days", type=float, default=7.0, help="keep whatever is younger (default: %(default)s)")
    gc.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    chosen = parser.parse_args(arguments)
    try:
        store = Store(chosen.store, create=False)
        if chosen.command == "ls":
            return _ls(store)
        if chosen.command == "explain":
            return _explain(store, chosen.name)
        if chosen.command == "verify":
            return _verify(store)
        return _gc(store, chosen.keep_run, chosen.young_days, chosen.dry_run)
    except StoreError as error:
        print(f"stage_store: {error}", file=sys.stderr)
        return 2


def _ls(store: Store) -> int:
    found = items(store)
    if not found:
        print(f"no stages in {store.url}")
        return 0
    width = max(len(item.stage) for item in found)
    print(f"{'stage':{width}}  {'key':{_SHORT}}  {'age':>8}  {'size':>9}  state")
    for item in found:
        print(
            f"{item.stage:{width}}  {item.key[:_SHORT]}  {_age(item.modified):>8}  {_size(item.size):>9}  {item.state}"
        )
    return 0


def _explain(store: Store, name: str) -> int:
    refs = store.runs().get(name)
    keys = [(ref.stage, ref.key) for ref in refs] if refs else [find(store, name)]
    found = items(store)
    stage_of = {item.key: item.stage for item in found}
    known: dict[str, Mapping[str, Any] | None] = {}

    def payload_of(key: str) -> Mapping[str, Any] | None:
        if key not in known:
            known[key] = store.payload(stage_of[key], key) if key in stage_of else None
        return known[key]

    for stage, key in keys:
        _explain_key(found, stage, key, payload_of)
    return 0


def _explain_key(found: Sequence[Item], stage: str, key: str, payload_of: Any) -> None:
    item = next((item for item in found if item.key == key), None)
    payload = payload_of(key)
    print(f"{stage} {key[:_SHORT]}  {item.state if item else 'no longer in the store'}")
    if not item or not payload:
        return
    finished = [other for other in found if other.stage == stage and other.key != key and other.state == "ok"]
    earlier = [other for other in finished if other.modified <= item.modified]
    others = {other.key: payload_of(other.key) for other in earlier or finished}
    best = nearest(payload, {k: p for k, p in others.items() if p}, payload_of)
    if best is None:
        print("  no other finished key of this stage to compare with")
        return
    print(f"  nearest finished key: {best[0][:_SHORT]}")
    for line in best[1]:
        print(f"  {line}")


def _verify(store: Store) -> int:
    broken = checked = 0
    for stage, key, fault in verify(store):
        checked += 1
        broken += bool(fault)
        print(f"{stage} {key[:_SHORT]}  {f'corrupt: {fault}' if fault else 'ok'}")
    print(f"{checked} checked, {broken} corrupt")
    return 1 if broken else 0


def _gc(store: Store, keep_runs: list[str] | None, young_days: float, dry_run: bool) -> int:
    removed = collect(store, keep_runs, young_days, dry_run)
    verb = "would remove" if dry_run else "removed"
    for removal in removed:
        print(f"{verb} {removal.path}  {_size(removal.size)}  ({removal.reason})")
    if keep_runs is None and not store.runs():
        print("no run is pinned: finished stages are kept")
    print(f"{verb} {len(removed)} items, {_size(sum(removal.size for removal in removed))}")
    return 0


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
