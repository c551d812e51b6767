"""Sources on a real S3 server on loopback."""

from __future__ import annotations

import json

import pytest
from s3_server import s3_files

from corpora import conversations, sources
from tests.corpora import tiny


@pytest.fixture
def bucket(s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))

    def put(key, records):
        body = "".join(json.dumps(r) + "\n" for r in records).encode()
        s3_files().pipe_file(f"{s3_url}/{key}", body)
        return f"{s3_url}/{key}"

    return put


def test_jsonl_is_read_from_a_bucket_and_a_changed_object_is_fetched_again(bucket):
    url = bucket("my data.jsonl", [tiny.conversation(1)])
    first = sources.fingerprint(url)
    assert [c["id"] for c in conversations.read(url)] == ["c1"]
    bucket("my data.jsonl", [tiny.conversation(1), tiny.conversation(2)])
    assert [c["id"] for c in conversations.read(url)] == ["c1", "c2"]
    assert sources.fingerprint(url) != first


def test_bad_line_and_missing_object_are_named_by_their_url(bucket):
    url = bucket("x.jsonl", [tiny.conversation(1), {"messages": 3}])
    with pytest.raises(conversations.ConversationError, match=rf"{url}:2: messages is 3"):
        list(conversations.read(url))
    with pytest.raises(sources.SourceError, match="none.jsonl: there is no such object"):
        list(conversations.read(f"{url[:-7]}none.jsonl"))
