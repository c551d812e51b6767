"""What a stage's result depends on, as hashes: its payload, its data files and the first-party code it can reach."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stage_store.errors import StoreError, os_errors
from stage_store.files import inventory, sha256_file

DATA_FILES: Mapping[str, tuple[str, ...]] = {
    "kernels_ext": (".cu", ".cuh", ".cpp", ".h"),
    "reports": (".html", ".css", ".js", ".json"),
    "evals": (".yaml", ".json", ".jsonl", ".jsonl.gz"),
}
"""By top-level package, files that are code in all but name. One counts where a module of its own folder is reached; in
a folder without modules, of the nearest folder above that has some. A module must therefore read data files of its own
folder and those below it, and reach others by importing a module that lies beside them."""

_GENERATED = {"out", "build", "__pycache__"}


def canonical_json(value: Any) -> bytes:
    """One byte string for equal values: keys sorted, no spaces, UTF-8, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"a key is made of JSON values only: {error}") from error


def stage_key(payload: Mapping[str, Any]) -> str:
    """sha256 (hex) of everything that a stage's result depends on.

    payload: schema, stage, version, config (the stage's own slice), code (`code_modules`), data (fingerprints),
    upstream (role → key), and hardware where the stage measures it.
    """
    return hashlib.sha256(canonical_json(payload)).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, or of the paths and bytes of all files in a folder; never of a time stamp."""
    path = Path(path)
    with os_errors(path):
        if path.is_dir():
            return hashlib.sha256(canonical_json([[f.path, f.sha256] for f in inventory(path)])).hexdigest()
        return sha256_file(path)


def code_hash(module: str, root: Path, first_party: tuple[str, ...]) -> str:
    """sha256 (hex) over `code_modules`."""
    return hashlib.sha256(canonical_json(code_modules(module, root, first_party))).hexdigest()


def code_modules(module: str, root: Path, first_party: tuple[str, ...]) -> dict[str, str]:
    """Name → sha256 (hex) of `module` and of all first-party code that it imports, directly or not.

    Imports inside functions and `import_module("…")` with a literal name are followed. Comments, docstrings and layout
    do not count; neither does the Python version. Files of `DATA_FILES` are entered under their path where they count.

    root:        folder that holds the top-level packages.
    first_party: top-level packages to follow; everything else is a library.
    """
    if _source(root, module) is None:
        raise StoreError(f"{module}: no such module below {root}")
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        source = _source(root, name)
        if name in found or source is None or name.split(".")[0] not in first_party:
            continue  # `from steps.loop import train` also asks for a module `steps.loop.train`: there is none
        package = name if source.name == "__init__.py" else name.rpartition(".")[0]
        found[name], imported = _parsed(source.read_bytes(), str(source), package)
        waiting += _parents(name)
        waiting += imported
    return dict(sorted((found | _data_files(found, root)).items()))


def _data_files(modules: Iterable[str], root: Path) -> dict[str, str]:
    """Path → sha256 (hex) of the files of `DATA_FILES` that count where these modules are reached."""
    sources = {name: path for name in modules if (path := _source(root, name))}
    folders = {path.parent for path in sources.values()}
    found = {}
    for package in {name.split(".")[0] for name in sources} & DATA_FILES.keys():
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root)
            if not path.name.endswith(DATA_FILES[package]) or _GENERATED & set(inside.parts):
                continue
            if next(folder for folder in path.parents if any(folder.glob("*.py"))) in folders:
                found[inside.as_posix()] = sha256_file(path)
    return found


@functools.lru_cache(maxsize=1024)
def _parsed(text: bytes, filename: str, package: str) -> tuple[str, tuple[str, ...]]:
    """sha256 (hex) of a module's syntax tree, and what it may import. Kept by its text: the stages of a plan reach the
    same modules again and again."""
    tree = ast.parse(text, filename=filename)
    return hashlib.sha256(_dump(tree).encode()).hexdigest(), tuple(_imports(tree, package))


def _source(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((p for p in (path / "__init__.py", path.with_name(f"{path.name}.py")) if p.is_file()), None)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules that `tree`, a module of `package`, may import; a name may turn out to be no module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "import_module" and isinstance(node.args[0].value, str):
                yield node.args[0].value


def _dump(node: Any) -> str:
    """Text of a syntax tree without positions, strings that are statements (docstrings) and empty fields.

    Newer Python versions add fields that are empty in older code, so leaving those out keeps hashes stable.
    """
    if isinstance(node, ast.AST):
        fields = [(n, v) for n, v in ast.iter_fields(node) if n != "kind" and v is not None and v != []]
        return f"{type(node).__name__}({','.join(f'{n}={_dump(v)}' for n, v in fields)})"
    if isinstance(node, list):
        return f"[{','.join(_dump(item) for item in node if not _is_bare_string(item))}]"
    return repr(node)


def _is_bare_string(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
