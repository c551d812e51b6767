"""Sources on a real S3 server on loopback."""

from __future__ import annotations

import json
import os

import boto3
import pytest

from corpora import conversations, sources
from tests.corpora import tiny
from tests.stage_store.conftest import s3_environment, s3_url

__all__ = ["s3_environment", "s3_url"]


@pytest.fixture
def bucket(s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache"))
    name, _, prefix = s3_url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])

    def put(key, records):
        body = "".join(json.dumps(r) + "\n" for r in records).encode()
        client.put_object(Bucket=name, Key=f"{prefix}/{key}", Body=body)
        return f"s3://{name}/{prefix}/{key}"

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
