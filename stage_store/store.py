"""Finished stages by key, in a folder or an S3 bucket.

<root>/STORE.json                                schema of the store
<root>/<stage>/<key>/PAYLOAD.json                what the key is the hash of, for `explain`
<root>/<stage>/<key>/LEASE.json                  who computes it now
<root>/<stage>/<key>/ckpt/step-XXXXXXXX/         resumable state while it is computed
<root>/<stage>/<key>/a-<id>/                     files of one attempt
<root>/<stage>/<key>/MANIFEST.json               the commit: names the attempt that counts
<root>/<stage>/<key>/CORRUPT-<ns>.json           a manifest that was taken out of use, and why
<root>/_runs/<run>/<id>.json                     keys that a named run reaches
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from stage_store.backend import Entry, open_backend
from stage_store.checkpoints import Checkpoints
from stage_store.errors import CorruptStage, StoreError, os_errors, writing
from stage_store.files import faults, inventory
from stage_store.fingerprint import canonical_json, stage_key
from stage_store.lease import file_lease
from stage_store.manifest import SCHEMA, Manifest, new_manifest, newer_schema
from stage_store.refs import StageRef

logger = logging.getLogger(__name__)

MANIFEST, PAYLOAD, RUNS = "MANIFEST.json", "PAYLOAD.json", "_runs"
_STAGE, _KEY = re.compile(r"[a-z][a-z0-9_]*"), re.compile(r"[0-9a-f]{64}")

Work = Callable[[Path, Checkpoints], Mapping[str, Any]]
"""Writes a stage's files into an empty folder and returns what the manifest is to say of it."""


class Store:
    """One store. Raises StoreError where it cannot be used.

    url:           folder, `file://` or `s3://bucket/prefix`.
    create:        make the store if there is none.
    lease_seconds: silence after which an owner's lease on S3 may be taken over.
    cache:         folder for local copies of an S3 store; default $MAMBALLAMA_CACHE, else ~/.cache/mamballama.
    """

    def __init__(
        self, url: str | Path, *, create: bool = True, lease_seconds: float = 60.0, cache: Path | None = None
    ) -> None:
        self.backend = open_backend(str(url), lease_seconds, cache)
        self.url = self.backend.url
        self._check_schema(create)

    # Reading

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """The finished stage, its files present and of the right size; anything else is quarantined and None."""
        manifest, fault = self.inspect(stage, key)
        if fault:
            self.quarantine(stage, key, fault)
        return manifest

    def inspect(self, stage: str, key: str, listing: Mapping[str, Entry] | None = None) -> tuple[Manifest | None, str]:
        """Like `lookup`, but changes nothing: manifest and an empty string, or None and the fault, if there is one.

        listing: files below the key, where the caller has them already.
        """
        prefix = self.prefix(stage, key)
        data = self.backend.read(f"{prefix}/{MANIFEST}")
        if data is None:
            return None, ""
        try:
            manifest = Manifest.from_bytes(data, stage, key, self.url)
        except CorruptStage as error:
            return None, str(error)
        listing = self.backend.walk(prefix) if listing is None else listing
        for file in manifest.files:
            entry = listing.get(f"{manifest.attempt}/{file.path}")
            if entry is None:
                return None, f"{file.path}: missing"
            if entry.size != file.size:
                return None, f"{file.path}: {entry.size} bytes instead of {file.size}"
        return manifest, ""

    def manifest(self, ref: StageRef) -> Manifest:
        """The manifest that a ref stands for. Raises CorruptStage if it is gone or broken."""
        manifest = self.lookup(ref.stage, ref.key)
        if manifest is None:
            raise CorruptStage(f"{ref.stage}/{ref.key}: no longer in {self.url}; run the flow again to recompute it")
        if manifest.digest != ref.digest:
            logger.warning("%s/%s was computed again since it was referred to", ref.stage, ref.key)
        return manifest

    def fetch(self, manifest: Manifest) -> Path:
        """Local folder with the stage's files, every sha256 verified; not to be written to.

        A folder store is used in place, an S3 store is copied once to the cache. A file unchanged in size and mtime is
        hashed once per process. Raises CorruptStage, after quarantine, if the store does not hold what it promised.
        """
        folder = self.backend.workspace(manifest.prefix)
        wrong = faults(folder, manifest.files)
        try:
            if wrong and self.backend.remote:
                wrong = self._download(manifest, folder)
            if wrong:
                raise CorruptStage("; ".join(wrong))
        except CorruptStage as error:
            self.quarantine(manifest.stage, manifest.key, str(error), manifest.attempt)
            raise CorruptStage(f"{manifest.stage}/{manifest.key}: {error}") from None
        return folder

    # Computing

    def compute(
        self, stage: str, key: str, payload: Mapping[str, Any], work: Work, *, force: bool = False
    ) -> tuple[StageRef, bool]:
        """The stage's ref, and whether it was there (or another run delivered it while this one waited).

        Otherwise `work` is called under the key's lease. An exception leaves no stage behind, but its checkpoints.
        With `force`, a finished stage and its checkpoints are set aside first.
        """
        if payload.get("stage") != stage or stage_key(payload) != key:
            raise StoreError(f"{stage}/{key}: is not the key of the payload given; use stage_key(payload)")
        if not force and (found := self.lookup(stage, key)):
            return found.ref, True
        prefix = self.prefix(stage, key)
        with self.backend.lease(prefix):
            checkpoints = Checkpoints(self, stage, key)
            if force:
                self.quarantine(stage, key, "computed again on request")
                checkpoints.clear()
            elif found := self.lookup(stage, key):
                logger.info("adopting %s %s, finished by another run", stage, key[:12])
                return found.ref, True
            self.backend.create(f"{prefix}/{PAYLOAD}", canonical_json(payload))
            attempt = f"a-{uuid.uuid4().hex}"
            out = self.backend.workspace(f"{prefix}/{attempt}")
            try:
                with os_errors(out):
                    out.mkdir(parents=True)
                with writing(out):
                    meta = work(out, checkpoints)
                manifest, won = self._publish(stage, key, attempt, payload, meta)
            except BaseException:
                self._discard(prefix, attempt)
                raise
            checkpoints.clear()
        return manifest.ref, not won

    def pin(self, run_id: str, refs: Iterable[StageRef]) -> None:
        """Remember that a run reaches these keys; several calls add up."""
        data = canonical_json({"run": run_id, "refs": [ref.to_dict() for ref in refs]})
        self.backend.create(f"{RUNS}/{quote(run_id, safe='')}/{hashlib.sha256(data).hexdigest()[:32]}.json", data)

    def runs(self) -> dict[str, list[StageRef]]:
        """Pinned runs and what they reach, without repeats, in order of pinning."""
        pins = sorted(self.backend.walk(RUNS).items(), key=lambda item: item[1].modified)
        found: dict[str, dict[StageRef, None]] = {}
        for path, _ in pins:
            if data := self.backend.read(f"{RUNS}/{path}"):
                refs = (StageRef.from_dict(ref) for ref in json.loads(data)["refs"])
                found.setdefault(unquote(path.split("/")[0]), {}).update(dict.fromkeys(refs))
        return {run: list(refs) for run, refs in found.items()}

    def unpin(self, run_id: str) -> None:
        self.backend.remove_tree(f"{RUNS}/{quote(run_id, safe='')}")

    def payload(self, stage: str, key: str) -> Mapping[str, Any] | None:
        """What a key is the hash of, finished or not; None if it was never begun here."""
        data = self.backend.read(f"{self.prefix(stage, key)}/{PAYLOAD}")
        try:
            payload = json.loads(data or b"null")
        except ValueError:
            return None
        return payload if payload and stage_key(payload) == key else None

    def quarantine(self, stage: str, key: str, reason: str, attempt: str = "") -> None:
        """Take a manifest out of use; with `attempt`, only if it is still that one's."""
        prefix = self.prefix(stage, key)
        data = self.backend.read(f"{prefix}/{MANIFEST}")
        if data is None or (attempt and attempt.encode() not in data):
            return
        logger.warning("%s %s set aside: %s", stage, key[:12], reason)
        record = {"reason": reason, "manifest": data.decode(errors="replace")}
        self.backend.create(f"{prefix}/CORRUPT-{time.time_ns()}.json", json.dumps(record, indent=1).encode())
        self.backend.remove(f"{prefix}/{MANIFEST}")

    def prefix(self, stage: str, key: str) -> str:
        if not _STAGE.fullmatch(stage) or not _KEY.fullmatch(key):
            raise StoreError(f"{stage!r}/{key!r}: a stage is a lower-case name, a key 64 hex digits")
        return f"{stage}/{key}"

    def listing(self) -> dict[tuple[str, str], dict[str, Entry]]:
        """(stage, key) → every file below it, finished or not."""
        found: dict[tuple[str, str], dict[str, Entry]] = {}
        for path, entry in self.backend.walk().items():
            stage, _, rest = path.partition("/")
            key, _, name = rest.partition("/")
            if _STAGE.fullmatch(stage) and _KEY.fullmatch(key) and name:
                found.setdefault((stage, key), {})[name] = entry
        return found

    def _check_schema(self, create: bool) -> None:
        data = self.backend.read("STORE.json")
        if data is None:
            if not create:
                raise StoreError(f"{self.url}: there is no store")
            born = {"schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds")}
            self.backend.create("STORE.json", canonical_json(born))
            return
        try:
            schema = int(json.loads(data)["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.url}: STORE.json cannot be read ({error}); is this a stage store?") from error
        if schema > SCHEMA:
            raise newer_schema(self.url, schema)

    def _publish(
        self, stage: str, key: str, attempt: str, payload: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> tuple[Manifest, bool]:
        """Commit an attempt; the manifest that counts, and whether it is this attempt's."""
        prefix = f"{self.prefix(stage, key)}/{attempt}"
        folder = self.backend.workspace(prefix)
        with os_errors(folder):
            files = inventory(folder)
        self.backend.upload(prefix, [file.path for file in files])
        manifest = new_manifest(stage, key, attempt, files, payload, meta, self.url)
        while not self.backend.create(f"{stage}/{key}/{MANIFEST}", manifest.to_bytes()):
            if found := self.lookup(stage, key):  # else it was broken and is gone: try again
                logger.info("adopting %s %s, another run finished first", stage, key[:12])
                self.backend.remove_tree(prefix)
                return found, False
        return manifest, True

    def _discard(self, prefix: str, attempt: str) -> None:
        """Remove what a failed attempt wrote here, unless it failed after its commit (interrupted, say)."""
        committed = not self.backend.remote and attempt.encode() in (self.backend.read(f"{prefix}/{MANIFEST}") or b"")
        if not committed:
            shutil.rmtree(self.backend.workspace(f"{prefix}/{attempt}"), ignore_errors=True)

    def _download(self, manifest: Manifest, folder: Path) -> list[str]:
        """Bring files to the cache, in one piece and by one process; what is wrong with them."""
        draft = folder.with_name(f"{folder.name}.part")
        with file_lease(folder.with_name(f"{folder.name}.lock")), os_errors(draft):
            if not faults(folder, manifest.files):
                return []
            for old in (draft, folder):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir()
            self.backend.download(manifest.prefix, manifest.files, draft)
            wrong = faults(draft, manifest.files)
            if not wrong:
                draft.rename(folder)
            return wrong
