"""Resumable state of a stage that is being computed, kept under its key, so it can only meet its own configuration."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stage_store.errors import CorruptStage, StoreError, os_errors, writing
from stage_store.files import StoredFile, create_file, faults, inventory, sync, sync_tree

if TYPE_CHECKING:
    from stage_store.store import Store

logger = logging.getLogger(__name__)

META = "meta.json"
WORK = "work"


class Checkpoints:
    """The two newest checkpoints of one stage and key.

    A checkpoint is a folder `step-XXXXXXXX` of whatever `write` put there, plus `meta.json` with the step and each
    file's size and sha256. It appears under its name only when it is whole and on the disk. For an S3 store the local
    copy comes first, then its files are uploaded, `meta.json` last.
    """

    KEEP = 2

    def __init__(self, store: Store, stage: str, key: str) -> None:
        self._backend = store.backend
        self._prefix = f"{stage}/{key}/ckpt"
        self._folder = self._backend.workspace(self._prefix)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill an empty folder and keep it as the state after `step` steps."""
        name = _name(step)
        draft = self._folder / f".draft-{uuid.uuid4().hex}"
        try:
            with os_errors(draft):
                draft.mkdir(parents=True)
            with writing(draft):
                write(draft)
            with os_errors(draft):
                files = inventory(draft)
                meta = {"step": step, "files": [asdict(file) for file in files]}
                if not create_file(draft / META, json.dumps(meta, indent=1).encode()):
                    raise StoreError(f"checkpoint {name}: {META} is written by the store; name that file otherwise")
                sync_tree(draft)
                if (self._folder / name).exists():
                    (self._folder / name).rename(draft.with_name(f"{draft.name}-old"))
                draft.rename(self._folder / name)
                sync(self._folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        if self._backend.remote:
            self._backend.remove(f"{self._prefix}/{name}/{META}")
            self._backend.upload(f"{self._prefix}/{name}", [*(file.path for file in files), META])
        self._prune(step)

    def latest(self) -> tuple[int, Path] | None:
        """Step and read-only folder of the newest checkpoint whose every byte is right; broken ones are removed."""
        local, remote = self._steps_here(), self._steps_there()
        for step in sorted(local | remote, reverse=True):
            folder = self._folder / _name(step)
            fault = _fault(folder, step)
            if fault and step in remote:
                fault = self._download(step)
            if not fault:
                return step, folder
            logger.warning("checkpoint %s of %s skipped and removed: %s", _name(step), self._prefix, fault)
            self._backend.remove_tree(f"{self._prefix}/{_name(step)}")
        return None

    def work(self) -> Path:
        """A local folder for what is costly to make again: it outlives a crash and ends with the checkpoints, but stays
        on this machine and unchecked."""
        folder = self._folder / WORK
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self) -> None:
        self._backend.remove_tree(self._prefix)

    def _steps_here(self) -> set[int]:
        return {int(path.name[5:]) for path in self._folder.glob("step-*")}

    def _steps_there(self) -> set[int]:
        """Steps of uploads that were finished; none for a folder store, whose workspace is the store."""
        if not self._backend.remote:
            return set()
        parts = (path.split("/", 1) for path in self._backend.walk(self._prefix))
        return {int(name[5:]) for name, file in parts if file == META}

    def _download(self, step: int) -> str:
        """Bring a checkpoint here; what is wrong with it, or an empty string."""
        prefix = f"{self._prefix}/{_name(step)}"
        draft = self._folder / f".draft-{uuid.uuid4().hex}"
        meta = self._backend.read(f"{prefix}/{META}") or b""
        try:
            with os_errors(draft):
                draft.mkdir(parents=True)
                create_file(draft / META, meta)
                self._backend.download(prefix, _files(meta), draft)
                if fault := _fault(draft, step):
                    return fault
                shutil.rmtree(self._folder / _name(step), ignore_errors=True)
                draft.rename(self._folder / _name(step))
                return ""
        except (ValueError, KeyError, TypeError, CorruptStage) as error:
            return str(error)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Keep the newest up to `newest`; later ones belong to a history that was abandoned."""
        kept = sorted(step for step in self._steps_here() if step <= newest)[-self.KEEP :]
        names = {path.split("/")[0] for path in self._backend.walk(self._prefix)}
        names |= {path.name for path in self._folder.iterdir()}
        for name in names - {_name(step) for step in kept} - {WORK}:
            self._backend.remove_tree(f"{self._prefix}/{name}")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _files(meta: bytes) -> list[StoredFile]:
    return [StoredFile(**file) for file in json.loads(meta)["files"]]


def _fault(folder: Path, step: int) -> str:
    """What is wrong with a checkpoint folder, or an empty string."""
    try:
        meta = (folder / META).read_bytes()
        if json.loads(meta)["step"] != step:
            return f"{META} is of step {json.loads(meta)['step']}"
        return "; ".join(faults(folder, _files(meta)))
    except FileNotFoundError:
        return f"{META}: missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{META}: {error}"
