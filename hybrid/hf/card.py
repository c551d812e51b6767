"""The model card of a student: what it is made of, how it was trained and what was measured, as far as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Lineage:
    """Manifests of a stage store: of the stage that made the student and of all that it came from, the first first;
    and the comparisons with the teacher that were made of it."""

    stages: Sequence[Mapping[str, Any]] = ()
    comparisons: Sequence[Mapping[str, Any]] = field(default=())


def lineage(folder: Path) -> Lineage:
    """Of a folder in a local stage store (<store>/<stage>/<key>/<attempt>); empty for any other folder."""
    own = _read(folder.resolve().parent / MANIFEST)
    if own is None or "payload" not in own:
        return Lineage()
    store = folder.resolve().parents[2]
    found: dict[str, Mapping[str, Any]] = {}

    def visit(manifest: Mapping[str, Any]) -> None:
        upstream = manifest["payload"]["upstream"]
        for role in sorted(
            upstream, key=lambda role: role == "student"
        ):  # what the student was made of comes before it
            for path in store.glob(f"*/{upstream[role]}/{MANIFEST}"):
                if upstream[role] not in found:
                    visit(_read(path))
        found[manifest["key"]] = manifest

    visit(own)
    return Lineage(list(found.values()), list(_comparisons(store, own["key"])))


def model_card(config: HybridConfig, name: str, history: Lineage, notes: Sequence[str] = ()) -> str:
    """README.md in Markdown. notes: paragraphs about this form of the model, such as how it is loaded."""
    metadata = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- mamba", "- hybrid"]
    parts = ["\n".join([*metadata, "---"]), f"# {name}", _shape(config), *notes]
    if history.stages:
        parts += ["## Lineage", _lineage(history.stages)]
    if history.comparisons:
        parts += ["## Figures", _figures(history.comparisons)]
    else:
        parts += ["## Figures", "No benchmark of this student was found beside it."]
    return "\n\n".join(parts) + "\n"


def _shape(config: HybridConfig) -> str:
    mixer = "Mamba-1" if config.mixer == "mamba1" else "Mamba-2"
    kept = ", ".join(map(str, config.attention_layers)) or "none"
    rows = (
        ("family of the teacher", config.family),
        ("layers with attention", kept),
        (
            "width, heads, key-value heads",
            f"{config.d_model}, {config.n_heads} of {config.head_dim}, {config.n_kv_heads}",
        ),
        ("groups of x and B in the mixers", config.groups),
        ("SiLU after the convolution", _yes(config.conv_silu)),
        ("B and C rotated by position", _yes(config.mixer_rope)),
        ("vocabulary", config.vocab_size),
    )
    told = (
        f"A Llama-like model of {config.n_layers} layers, {len(config.mamba_layers)} of which mix tokens by {mixer} "
        "instead of attention, made from an attention-only teacher as in *The Mamba in the Llama* (arXiv 2408.15237)."
    )
    return "\n".join([told, "", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _lineage(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| stage | key | made | tokens | held-out KL, nats/token | top-1 agreement |", "|---|---|---|---|---|---|"]
    for manifest in stages:
        summary = manifest["meta"].get("summary") or {}
        held_out = summary.get("held_out") if isinstance(summary.get("held_out"), Mapping) else {}
        cells = (
            manifest["stage"],
            f"`{manifest['key'][:12]}`",
            manifest["created"][:10],
            summary.get("tokens"),
            _number((held_out or {}).get("kl")),
            _number((held_out or {}).get("top1")),
        )
        rows.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    sources = [m["meta"]["summary"]["source"] for m in stages if m["stage"] == "teacher"]
    commits = sorted({str(m["meta"]["git_commit"]) for m in stages if m["meta"].get("git_commit")})
    told = [f"Teacher: `{source}`." for source in sources]
    told += [f"Code: commit {', '.join(f'`{commit}`' for commit in commits)}."] if commits else []
    return "\n".join(rows) + "\n\n" + " ".join(told)


def _figures(comparisons: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| benchmark | metric | items | teacher | student | difference, 95 % interval | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        interval = f"{_number(row['difference'])} [{_number(row['ci_low'])}, {_number(row['ci_high'])}]"
        cells = (row["benchmark"], row["metric"], row["n"], _number(row["teacher"]), _number(row["student"]), interval)
        rows.append("| " + " | ".join(map(str, (*cells, row["verdict"]))) + " |")
    return "\n".join(rows) + "\n\nTeacher and student saw the same items; the interval is of the paired difference."


def _comparisons(store: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Rows of the newest benchmark of the student."""
    of_it = [m for path in store.glob(f"benchmark/*/{MANIFEST}") if (m := _read(path)) is not None]
    of_it = [m for m in of_it if m["payload"]["upstream"].get("student") == key]
    if of_it:
        newest = max(of_it, key=lambda m: m["created"])
        rows = _read(store / newest["stage"] / newest["key"] / newest["attempt"] / "comparison.json")
        yield from rows or ()


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
