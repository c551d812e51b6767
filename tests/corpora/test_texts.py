from __future__ import annotations

import json

import pytest

from corpora import texts


def test_one_document_a_text_file_and_one_a_row(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "c.jsonl").write_text('{"text": "see"}\n{"text": "dee"}\n')
    (tmp_path / "d.json").write_text(json.dumps(["ee", {"text": "eff"}]))
    found = list(texts.read(f"file:{tmp_path}"))
    assert [text for _, text in found] == ["ay", "bee", "see", "dee", "ee", "eff"]
    assert [name for name, _ in found] == ["a.md", "b.txt", "c.jsonl:1", "c.jsonl:2", "d.json:1", "d.json:2"]


def test_pattern_takes_the_files_that_fit(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "x.py").write_text("code")
    assert list(texts.read("file:*.txt", tmp_path)) == [("b.txt", "bee")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", "?", "is no text; allowed: .txt"),
        ("x.json", "{", "x.json: not valid JSON"),
        ("x.json", "{}", "x.json: must be a list"),
        ("x.json", "[1]", "x.json: item 1: has no 'text'"),
        ("x.jsonl", '{"txt": "a"}\n', "x.jsonl:1: has no 'text'"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(texts.TextError, match=message):
        list(texts.read(f"file:{name}", tmp_path))
