from __future__ import annotations

import gzip
import json

import pytest

from corpora import conversations, sources
from tests.corpora import tiny

GOOD = json.dumps(tiny.conversation(1))


def read(tmp_path, text, name="a b.jsonl"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(conversations.read(f"file:{name}", tmp_path))


def test_reads_plain_and_gzip_whatever_the_name(tmp_path):
    records = [tiny.conversation(1), tiny.conversation(2, complete=False)]
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    expected = [{**records[0], "complete": True}, records[1]]
    assert read(tmp_path, text) == expected
    assert read(tmp_path, gzip.compress(text)) == expected
    assert read(tmp_path, text.rstrip(b"\n")) == expected


def test_folder_is_read_file_by_file_and_missing_ids_are_made_from_file_and_line(tmp_path):
    record = {"messages": [{"role": "user", "content": "u"}]}
    for name in ("b.jsonl", "a.jsonl"):
        tiny.write_jsonl(tmp_path / name, [record])
    assert [c["id"] for c in conversations.read(f"file:{tmp_path}")] == ["a.jsonl:1", "b.jsonl:1"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "the line is empty"),
        ('{"messages": [', "not valid JSON"),
        ("[1]", "must be one JSON object"),
        ('{"id": "x"}', "has no 'messages' .it has id"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": ["hi"]}', "message 1 is 'hi'"),
        ('{"messages": [{"content": "u"}]}', "message 1 has role None"),
        ('{"messages": [{"role": "user"}]}', "message 1 has content None"),
        ('{"messages": [{"role": "tool", "content": "u"}]}', "'tool'; allowed: system, user, assistant"),
        ('{"messages": [{"role": "assistant", "content": "u"}]}', "starts with the assistant"),
        ('{"id": 3, "messages": [{"role": "user", "content": "u"}]}', "id is 3"),
        ('{"complete": "no", "messages": [{"role": "user", "content": "u"}]}', "complete is 'no'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, said):
    with pytest.raises(conversations.ConversationError, match=f"a b.jsonl:2: .*{said}"):
        read(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")


def test_late_system_message_is_refused(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "system", "content": "s"}]
    with pytest.raises(conversations.ConversationError, match="message 2 is a system message"):
        read(tmp_path, json.dumps({"messages": messages}))


def test_empty_file_and_cut_gzip_are_named(tmp_path):
    with pytest.raises(conversations.ConversationError, match=r"a b\.jsonl: the file is empty"):
        read(tmp_path, "")
    with pytest.raises(conversations.ConversationError, match=r"a b\.jsonl:\d+: the gzip stream is damaged"):
        read(tmp_path, gzip.compress((GOOD + "\n").encode() * 500)[:-200])


def test_hub_rows_take_the_named_column(monkeypatch):
    import datasets

    rows = [{"chat": tiny.conversation(1)["messages"], "id": 5}]
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.update(k, name=a) or rows)
    (record,) = conversations.read("hf:org/name@main?split=test&column=chat")
    assert record["messages"] == rows[0]["chat"] and record["id"] == "name[test]:1"
    assert asked["split"] == "test" and asked["revision"] == "main"
    with pytest.raises(conversations.ConversationError, match=r"no column 'messages'; it has chat, id"):
        list(conversations.read("hf:org/name@main"))
    with pytest.raises(conversations.ConversationError, match="unknown option colum; allowed: column, config, split"):
        list(conversations.read("hf:org/name@main?colum=chat"))


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(sources.SourceError, match=r"^hf:org/name@main: cannot be had .*no route\).*$"):
        list(conversations.read("hf:org/name@main"))
