"""Conversations from JSONL files (plain or gzip, local, in a wheel or on S3) and from data sets of the hub.

A record is {"id": str, "messages": [{"role", "content"}, …], "complete": bool}; a missing `id` is made from file and
line, a missing `complete` is true. Anything that does not fit stops with the file and the line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corpora import sources

ROLES = ("system", "user", "assistant")


class ConversationError(ValueError):
    """Data that is no conversation; the message names file and line (from 1), what was found and what is allowed."""


def read(source: str, root: Path = sources.PROJECT_ROOT) -> Iterator[dict[str, Any]]:
    """The conversations of a source, in its order; `hf:…?split=train&column=messages` reads a data set."""
    for where, row in rows(source, root):
        yield conversation(row, where)


def rows(
    source: str, root: Path = sources.PROJECT_ROOT, column: str = "messages"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of JSONL files or a hub data set; a data set's chosen column is renamed to `column`."""
    parsed = sources.parse(source)
    if parsed.scheme == "hf":
        yield from _hub_rows(parsed, column)
        return
    resolved = sources.resolve(source, root)
    for path in _files(resolved):
        is_local = parsed.scheme == "file" or len(resolved.paths) > 1
        yield from json_lines(path, str(path) if is_local else source.partition("#")[0])


def conversation(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A checked record in the common form; keys of no meaning here (seed, score, …) are left out."""
    if not isinstance(row.get("id", ""), str):
        raise ConversationError(f"{where}: id is {row['id']!r}; it must be a string")
    complete = row.get("complete", True)
    if not isinstance(complete, bool):
        raise ConversationError(f"{where}: complete is {complete!r}; it must be true or false")
    if "messages" not in row:
        raise ConversationError(f"{where}: has no 'messages' (it has {', '.join(sorted(row)) or 'nothing'})")
    return {"id": row.get("id") or record_id(where), "messages": messages(row["messages"], where), "complete": complete}


def record_id(where: str) -> str:
    """An id for a record without one: file name and line, the same on every machine."""
    return where.rsplit("/", 1)[-1]


def messages(value: Any, where: str) -> list[dict[str, str]]:
    """A checked list of messages: known roles, text contents, at most one system message and that at the start."""
    if not isinstance(value, list) or not value:
        raise ConversationError(f"{where}: messages is {_shown(value)}; it must be a list with at least one message")
    checked = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise ConversationError(
                f"{where}: message {number} is {_shown(message)}; it must have a role and a content"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ConversationError(
                    f"{where}: message {number} has {key} {_shown(message.get(key))}; it must be text"
                )
        if message["role"] not in ROLES:
            raise ConversationError(
                f"{where}: message {number} has the role {message['role']!r}; allowed: {', '.join(ROLES)}"
            )
        if message["role"] == "system" and number > 1:
            raise ConversationError(f"{where}: message {number} is a system message; only the first may be one")
        checked.append({"role": message["role"], "content": message["content"]})
    if checked[0]["role"] == "assistant":
        raise ConversationError(f"{where}: starts with the assistant; it must start with a system or user message")
    return checked


def _files(resolved: sources.Resolved) -> list[Path]:
    paths: list[Path] = []
    for path in resolved.paths:
        found = (
            sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz"))) if path.is_dir() else [path]
        )
        paths.extend(found)
    if not paths:
        raise ConversationError(f"{resolved.source}: the folder holds no .jsonl or .jsonl.gz file")
    return paths


def json_lines(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one JSONL file that messages call `name`; gzip is recognised by its first bytes."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{name}:{number}", _json_object(line, f"{name}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConversationError(f"{name}:{number + 1}: the gzip stream is damaged or cut short: {error}") from None
    if not number:
        raise ConversationError(f"{name}: the file is empty; it must hold one JSON object a line")


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise ConversationError(f"{where}: the line is empty; every line must be one JSON object")
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversationError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConversationError(f"{where}: is {_shown(row)}; every line must be one JSON object")
    return row


def _hub_rows(source: sources.Source, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    known = {"split", "column", "config"}
    if unknown := sorted(set(source.options) - known):
        raise ConversationError(f"{source}: unknown option {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    split, chosen = source.options.get("split", "train"), source.options.get("column", column)
    try:
        data = iter(
            load_dataset(
                source.location, source.options.get("config"), split=split, revision=source.revision, streaming=True
            )
        )
        for number, row in enumerate(data):
            where = f"{source.location}[{split}]:{number + 1}"
            if chosen not in row:
                raise ConversationError(f"{where}: has no column {chosen!r}; it has {', '.join(sorted(row))}")
            yield where, {**{k: v for k, v in row.items() if k != "id"}, column: row[chosen]}
    except ConversationError:
        raise
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated classes when offline
        raise sources.hub_error(source, error) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
