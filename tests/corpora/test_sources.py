from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from corpora import sources
from corpora.sources import SourceError

EMPTY = "0" * 64


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBALLAMA_CACHE", str(tmp_path / "cache folder"))
    return tmp_path / "cache folder"


@pytest.fixture
def wheel(cache):
    """A wheel in the cache, as pip would have left it."""
    folder = cache / "wheels" / "data-pack-1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "data_pack-1.0-py3-none-any.whl", "w") as archive:
        for name, text in (("b.txt", "two"), ("a.txt", "one"), ("c.json", "{}"), ("deep/d.txt", "three")):
            archive.writestr(f"data_pack/texts/{name}", text)
    return folder


def test_importing_it_loads_no_model_library():
    code = "import sys; import corpora.sources; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sources.PROJECT_ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_parse_takes_every_form_apart():
    wheel = sources.parse(f"wheel:a-b==1.0+cpu!x/y z.gguf#sha256={EMPTY}")
    assert (wheel.package, wheel.version, wheel.location, wheel.sha256) == ("a-b", "1.0+cpu", "x/y z.gguf", EMPTY)
    assert sources.parse("s3://bucket/a/b.jsonl").location == "bucket/a/b.jsonl"
    hub = sources.parse("hf:org/name@v1.0?split=train_sft&column=messages")
    assert (hub.location, hub.revision) == ("org/name", "v1.0")
    assert hub.options == {"split": "train_sft", "column": "messages"}


@pytest.mark.parametrize(
    "text",
    ["", "file:", "ftp:x", "plain.jsonl", "wheel:x!y", "wheel:x==1", "hf:org/name", "s3://bucket", "s3:bucket/key"],
)
def test_anything_else_is_refused_with_the_forms(text):
    with pytest.raises(SourceError, match="is not a source; a source is wheel:"):
        sources.parse(text)


def test_a_hash_that_is_none_is_refused():
    with pytest.raises(SourceError, match="64 hexadecimal digits.*'abc'"):
        sources.parse("file:x#sha256=abc")
    with pytest.raises(SourceError, match="pinned by its revision"):
        sources.parse(f"hf:org/name@main#sha256={EMPTY}")


def test_file_with_spaces_is_relative_to_the_root(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "a b.txt").write_bytes(b"hi")
    resolved = sources.resolve(f"file:my data/a b.txt#sha256={sha(b'hi')}", tmp_path)
    assert resolved.path == tmp_path / "my data" / "a b.txt"
    assert resolved.fingerprint == f"sha256:{sha(b'hi')}" == sources.fingerprint("file:my data/a b.txt", tmp_path)


def test_folder_changes_its_fingerprint_with_any_file(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "x").write_bytes(b"1")
    (tmp_path / "d" / "y").write_bytes(b"2")
    first = sources.resolve("file:d", tmp_path)
    assert first.path == tmp_path / "d"
    (tmp_path / "d" / "sub" / "x").write_bytes(b"3")
    assert sources.fingerprint("file:d", tmp_path) != first.fingerprint
    (tmp_path / "d" / "y").unlink()
    assert sources.resolve("file:d", tmp_path).path == tmp_path / "d"


def test_missing_and_empty_are_named(tmp_path):
    with pytest.raises(
        SourceError, match=rf"file:no: there is no file or folder .*a relative path counts from {tmp_path}"
    ):
        sources.resolve("file:no", tmp_path)
    (tmp_path / "d").mkdir()
    with pytest.raises(SourceError, match="holds no file"):
        sources.resolve("file:d", tmp_path)


def test_wrong_hash_names_both(tmp_path):
    (tmp_path / "x").write_bytes(b"hi")
    with pytest.raises(SourceError, match=f"{EMPTY}: sha256 of what was found is {sha(b'hi')}"):
        sources.resolve(f"file:x#sha256={EMPTY}", tmp_path)


def test_pinned_sources_have_a_fingerprint_without_being_there():
    assert sources.fingerprint(f"wheel:no-such==1!x#sha256={EMPTY}") == f"sha256:{EMPTY}"
    assert sources.fingerprint(f"hf:org/name@{'a' * 40}") == f"commit:{'a' * 40}"


def test_wheel_file_folder_and_pattern(wheel):
    one = sources.resolve(f"wheel:data-pack==1.0!data_pack/texts/a.txt#sha256={sha(b'one')}")
    assert one.path.read_text() == "one" and one.path.is_relative_to(wheel)
    folder = sources.resolve("wheel:data-pack==1.0!data_pack/texts/deep/")
    assert [p.name for p in folder.path.iterdir()] == ["d.txt"]
    several = sources.resolve("wheel:data-pack==1.0!data_pack/texts/[ab].txt")
    assert [p.read_text() for p in several.paths] == ["one", "two"]
    with pytest.raises(SourceError, match="names 2 files where one"):
        _ = several.path
    listing = f"{sha(b'one')}  data_pack/texts/a.txt\n{sha(b'two')}  data_pack/texts/b.txt\n"
    assert several.fingerprint == f"sha256:{sha(listing.encode())}"


def test_what_a_wheel_does_not_hold_is_named(wheel):
    with pytest.raises(SourceError, match="holds nothing of the name 'data_pack/none'"):
        sources.resolve("wheel:data-pack==1.0!data_pack/none")
    with pytest.raises(SourceError, match=r"must be relative and without"):
        sources.resolve("wheel:data-pack==1.0!../x")


def test_damaged_wheel_is_named(wheel):
    (path,) = wheel.glob("*.whl")
    path.write_bytes(b"no zip")
    with pytest.raises(SourceError, match="is no wheel.*delete it"):
        sources.resolve("wheel:data-pack==1.0!data_pack/texts/a.txt")


def test_a_shortened_extracted_file_is_taken_out_again(wheel):
    path = sources.resolve("wheel:data-pack==1.0!data_pack/texts/a.txt").path
    path.write_text("o")
    assert sources.resolve("wheel:data-pack==1.0!data_pack/texts/a.txt").path.read_text() == "one"


def test_installed_package_is_read_in_place_and_not_imported(tmp_path, cache, monkeypatch):
    site = tmp_path / "site"
    (site / "evil_data").mkdir(parents=True)
    (site / "evil_data" / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "evil_data" / "x.txt").write_text("in place")
    info = site / "evil_data-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil-data\nVersion: 2.0\n")
    (info / "RECORD").write_text("evil_data/__init__.py,,\nevil_data/x.txt,,\n")
    monkeypatch.syspath_prepend(str(site))
    resolved = sources.resolve("wheel:evil-data==2.0!evil_data/x.txt")
    assert resolved.path == site / "evil_data" / "x.txt" and not cache.exists()


def test_pip_is_asked_once_and_its_error_is_one_line(tmp_path, cache, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        if command[-1] == "gone==9":
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: w\nERROR: No matching distribution found for gone==9\n"
            )
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "pack-1-py3-none-any.whl", "w") as archive:
            archive.writestr("pack/x", "data")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert sources.resolve("wheel:pack==1!pack/x").path.read_text() == "data"
    assert len(calls) == 1 and "--no-deps" in calls[0]
    with pytest.raises(SourceError, match="cannot download gone==9: ERROR: No matching distribution.*check the name"):
        sources.resolve("wheel:gone==9!x")


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/null")
def test_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("MAMBALLAMA_CACHE", "/dev/null/cache")
    with pytest.raises(SourceError, match="cannot be kept in /dev/null/cache"):
        sources.resolve("wheel:pack==1!pack/x")


def test_s3_that_cannot_be_reached_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(SourceError, match=r"^s3://bucket/key: cannot be read: .*; check AWS_ENDPOINT_URL.*$"):
        sources.resolve("s3://bucket/key")


def test_hub_offline_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("offline mode is enabled\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        SourceError, match=r"^hf:org/name@main: cannot be had .*offline mode is enabled\); check name.*$"
    ):
        sources.resolve("hf:org/name@main")
