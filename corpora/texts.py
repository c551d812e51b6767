"""Plain documents: text that the teacher did not write, for perplexity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpora import conversations, sources


class TextError(ValueError):
    """A file that holds no documents; the message names it and what is allowed."""


def read(source: str, root: Path = sources.PROJECT_ROOT) -> Iterator[tuple[str, str]]:
    """(name, text) of each document: a .txt or .md file is one; .jsonl, .json and hub rows have a `text` each."""
    if sources.parse(source).scheme == "hf":
        for where, row in conversations.rows(source, root, column="text"):
            yield conversations.record_id(where), _text(row, where)
        return
    resolved = sources.resolve(source, root)
    for path in resolved.paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            yield from _documents(file)


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for where, row in conversations.json_lines(path, str(path)):
            yield conversations.record_id(where), _text(row, where)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(rows, list):
            raise TextError(f"{path}: must be a list of texts or of objects with a 'text'")
        for number, row in enumerate(rows, 1):
            yield f"{path.name}:{number}", _text(row, f"{path}: item {number}")
    elif path.suffix in (".txt", ".md"):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
    else:
        raise TextError(f"{path}: is no text; allowed: .txt, .md, .json, .jsonl, .jsonl.gz")


def _text(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise TextError(f"{where}: has no 'text'")
    return text
