"""The report's content as plain JSON, before any layout: this is `report.json`, and all that the page is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from reports.rows import TEACHER, TEACHER_ROLE, RunData, clean
from reports.sections import Interval, against, benchmark, named
from reports.verdict import headline, run_flags, variant_flags

SCHEMA = 4
MIXERS = {"mamba2": "Mamba-2", "mamba1": "Mamba-1"}
TRAINING = ("align", "kl_distill", "sft", "dpo")
THROUGHPUT = (
    *("steps", "tokens", "positions", "train_seconds", "tokens_per_second", "flops_per_token", "utilisation"),
    *("peak_memory_bytes", "processes"),
)
"""How training ran, as `steps.loop` writes it; `steps.utilisation` defines the utilisation."""
SAMPLE_CHARACTERS = 1500
CURVE_POINTS = 120

COMPARISON = (
    *("benchmark", "metric", "unit", "higher_is_better", "n", "clusters", "teacher", "student", "difference"),
    *("ci_low", "ci_high", "bound", "p", "p_holm", "test", "flips_up", "flips_down", "mde", "delta", "verdict"),
)
MEAN = (
    *("family", "tasks", "missing", "n", "clusters", "teacher", "student", "difference", "ci_low", "ci_high", "bound"),
    *("retention", "retention_low", "retention_high", "mde", "delta", "verdict"),
)
"""Means over tasks, as `evals.stats.mean_of_tasks` gives them: shares between 0 and 1."""
SPECULATION = (
    *("k", "acceptance", "effective_acceptance", "acceptance_by_position", "proposed", "accepted", "verifications"),
    *("tokens_per_verification", "ci_low", "ci_high", "tokens_per_second", "speedup", "steady_speedup"),
    *("predicted_speedup", "break_even_acceptance", "ssm_bytes_per_round", "ssm_microseconds"),
    *("copy_bandwidth_share", "peak_memory_bytes", "identical_to_greedy"),
)
PHASES = ("draft", "verify", "accept", "other", "round")
CACHE = ("kv", "ssm", "conv", "ring")
IDENTITY = ("exact", "near_tie", "wrong", "largest_gap")
LAYER_SCORES = ("method", "rounds", "unit", "start", "texts", "tokens", "layers")
DRAFT = ("kind", "parameters", "steps", "tokens", "loss_first", "loss_last", "text", "start", "held_out")


def build_twin(
    data: RunData,
    title: str,
    samples: int,
    interval: Interval | None = None,
    flips: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """samples: how many prompts to show. interval: for accuracies; without it they stand without one. flips: those to
    show."""
    stages = [_stage(s) for s in data.lineage.get("stages", [])]
    run = _run(data.lineage, stages)
    made = _teacher_stage(stages)
    teacher: dict[str, Any] = {
        "name": teacher_name(data.lineage),
        "parameters": made.get("parameters"),
        "context": made.get("max_position_embeddings"),
        "benchmark": benchmark(data.benchmarks.get(TEACHER), interval),
    }
    for section in ("length", "needle"):
        found = (teacher["benchmark"] or {}).get(section) or {}
        teacher["context"] = teacher["context"] or found.get("max_position_embeddings")
    twin: dict[str, Any] = {
        "schema": SCHEMA,
        "title": title,
        "runs": [run],
        "baseline": {"name": TEACHER, "kind": TEACHER},
        "teacher": teacher,
        "layer_scores": _layer_scores(stages),
        "variants": [_variant(name, data, stages, teacher["benchmark"], interval) for name in data.variants],
        "not_comparable": [
            named(r, ("benchmark", "metric", "reason")) | {"model": name}
            for name in data.variants
            if name in data.benchmarks
            for r in data.benchmarks[name].summary.get("not_compared") or []
        ],
        "flips": list(flips),
        "samples": _samples(data, samples),
        "lineage": [_lineage(s, run["label"]) for s in stages],
        "configuration": flat(data.lineage.get("config", {})),
        "configuration_differences": [],
    }
    twin["differences"] = differences(twin["variants"])
    finish(twin)
    return clean(twin)


def finish(twin: dict[str, Any]) -> None:
    """Sentences and flags, which follow from all that the twin holds, are put into it."""
    baseline = twin["baseline"]["name"]
    for variant in twin["variants"]:
        own = [s for s in twin["lineage"] if (s["run"], s["variant"]) == (variant["run"], variant["own_name"])]
        variant["headline"] = headline(variant, baseline)
        variant["flags"] = variant_flags(variant, twin["teacher"]["benchmark"], own, baseline)
    twin["flags"] = run_flags(twin)


def teacher_name(lineage: Mapping[str, Any]) -> str:
    """The readable part of a teacher source: `wheel:…/SmolLM2.Q4_1.gguf#sha256=…` → "SmolLM2.Q4_1"."""
    source = str((lineage.get("config", {}).get("teacher") or {}).get("source", ""))
    kind, _, rest = source.partition(":")
    if not rest:
        return "teacher"
    if kind == "hf":
        return rest.partition("@")[0]
    name = PurePosixPath(rest.partition("#")[0].rpartition("!")[2]).name
    return name.removesuffix(".gguf").removesuffix(".safetensors") or "teacher"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mapping → dotted leaves; lists are leaves."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _run(lineage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ran = [s for s in stages if s["hit"] is not None]
    return {
        "id": str(lineage.get("run", "")),
        "label": "",
        "teacher": teacher_name(lineage),
        "chat_template": _teacher_stage(stages).get("chat_template_opening"),
        "device": next((s["device"] for s in stages if s["stage"] == TEACHER_ROLE), None),
        "created": lineage.get("created"),
        "command": lineage.get("command"),
        "git_commit": lineage.get("git_commit"),
        "host": flat(lineage.get("host") or {}),
        "versions": dict(lineage.get("versions") or {}),
        "stages": len(ran),
        "hits": sum(bool(s["hit"]) for s in ran),
        "off": len(stages) - len(ran),
        "seconds_computed": sum(s["seconds"] or 0 for s in ran if not s["hit"]),
        "seconds_reused": sum(s["seconds"] or 0 for s in ran if s["hit"]),
    }


def _teacher_stage(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((s["summary"] for s in stages if s["stage"] == "teacher"), {})


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("stage", "variant", "key", "digest", "hit", "seconds", "device")
    return named(stage, fields) | {
        "summary": stage.get("summary") or {},
        "config": stage.get("config") or {},
    }


def _lineage(stage: Mapping[str, Any], run: str) -> dict[str, Any]:
    brief = {k: v for k, v in stage.items() if k != "config"} | {"summary": _brief(stage["summary"])}
    return {"run": run} | brief


def _brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's single figures; series and layers stand elsewhere in the twin."""
    return {k: v for k, v in summary.items() if isinstance(v, int | float | str | bool) or v is None}


def _layer_scores(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the choice of layers by score was made by; None where they interleave or are listed."""
    summary: Mapping[str, Any] = next((s["summary"] for s in stages if s["stage"] == "layer_scores"), {})
    return named(summary, LAYER_SCORES) if summary.get("layers") else None


def _variant(
    name: str,
    data: RunData,
    stages: Sequence[Mapping[str, Any]],
    teacher: Mapping[str, Any] | None,
    interval: Interval | None,
) -> dict[str, Any]:
    own = {s["stage"]: s for s in stages if s["variant"] == name and s["hit"] is not None}
    init = own.get("init_from_attention", {}).get("summary", {})
    attention, replaced = init.get("attention_layers") or [], init.get("replaced_layers") or []
    found = data.benchmarks.get(name)
    measured = benchmark(found, interval)
    training = [_training(stage, own.get(stage)) for stage in TRAINING]
    return {
        "name": name,
        "own_name": name,
        "run": "",
        "attention_layers": attention,
        "replaced_layers": replaced,
        "mixer": MIXERS.get(init.get("mixer") or "", "Mamba"),
        "layers": len(attention) + len(replaced),
        "continues": _continues(data.lineage, name),
        "method": init.get("method"),
        "layer_choice": (init.get("layer_choice") or {}).get("method"),
        "starts": [
            {"method": m, "kl": v.get("kl"), "top1": v.get("top1")} for m, v in (init.get("start") or {}).items()
        ],
        "layer_errors": init.get("layers") or [],
        "quality": _quality(init, training, measured),
        "training": training,
        "draft": _training("draft", own.get("draft")),
        "benchmark": measured,
        "comparisons": [named(c, COMPARISON) for c in found.comparisons] if found else [],
        "means": [named(m, MEAN) for m in found.means] if found else [],
        "speculation": _speculation(data.speculation.get(name), own),
        "against_teacher": against(measured, teacher),
        "settings": _settings(name, stages),
    }


def _continues(lineage: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The student, and its stage, whose weights this one starts from; None for one that is made from the teacher."""
    settings: Mapping[str, Any] = (lineage.get("config", {}).get("variants") or {}).get(name) or {}
    return {"variant": settings["from"], "stage": settings.get("from_stage")} if settings.get("from") else None


def _quality(
    init: Mapping[str, Any], training: Sequence[Mapping[str, Any]], benchmark: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Distance to the teacher after each stage; the last entry is the benchmark's own, larger measurement."""
    start = (init.get("start") or {}).get(init.get("method") or "", {})
    rows = [{"stage": "init", "ran": bool(init), "kl": start.get("kl"), "top1": start.get("top1"), "kl_se": None}]
    for t in training:
        held_out = t.get("held_out") or {}
        rows.append(
            {
                "stage": t["stage"],
                "ran": t["ran"],
                "kl": held_out.get("kl"),
                "top1": held_out.get("top1"),
                "kl_se": None,
            }
        )
    final = (benchmark or {}).get("fidelity", {}).get("held_out") or {}
    rows.append(
        {
            "stage": "benchmark",
            "ran": bool(final),
            "kl": final.get("kl_mean"),
            "top1": final.get("top1"),
            "kl_se": final.get("kl_se"),
        }
    )
    return rows


def _training(stage: str, record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {"stage": stage, "ran": False}
    s = record["summary"]
    names = (*THROUGHPUT, "loss_first", "loss_last", "held_out")
    return (
        {"stage": stage, "ran": True, "hit": record["hit"], "seconds": record["seconds"], "device": record["device"]}
        | named(s, names)
        | {"curve": thin(s.get("curve") or [])}
    )


def thin(curve: Sequence[Any], limit: int = CURVE_POINTS) -> list[Any]:
    """At most `limit` + 1 points: every k-th, and always the last."""
    stride = max(1, -(-len(curve) // limit))
    kept = list(curve[::stride])
    if curve and kept[-1] != curve[-1]:
        kept.append(curve[-1])
    return kept


def _speculation(profile: Mapping[str, Any] | None, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The profile, on what it was measured, and how its draft was made, if it was; own: stage → record."""
    if not profile:
        return None
    draft = own.get("draft")
    names = ("synthetic", "injected_acceptance", "dtype", "new_tokens", "copy_bandwidth", "identity_rule", "parameters")
    return named(profile, names) | {
        "device": own.get("speculative_profile", {}).get("device"),
        "draft": named(draft["summary"], DRAFT) if draft else None,
        "best": named(profile.get("best") or {}, ("draft", "batch", "best_k", "speedup")),
        "groups": [
            named(group, ("draft", "batch", "temperature", "prompts", "best_k"))
            | {"rows": [_speculation_row(row) for row in group.get("rows") or []]}
            for group in profile.get("groups") or []
        ],
    }


def _speculation_row(row: Mapping[str, Any]) -> dict[str, Any]:
    identity = row.get("identity")
    return named(row, SPECULATION) | {
        "milliseconds": named(row.get("milliseconds") or {}, PHASES),
        "cache_bytes": named(row.get("cache_bytes") or {}, CACHE),
        "identity": named(identity, IDENTITY) if identity else None,
    }


def _samples(data: RunData, limit: int) -> list[dict[str, Any]]:
    """The first prompts with every model's answer; shared: how many leading characters equal the teacher's."""
    answers = {name: {s["prompt"]: s["response"] for s in b.samples} for name, b in data.benchmarks.items()}
    reference = answers.get("teacher", {})
    prompts = list(dict.fromkeys(p for name in ("teacher", *data.variants) for p in answers.get(name, {})))
    shown = []
    for prompt in prompts[:limit]:
        expected = reference.get(prompt)
        responses = []
        for name in ("teacher", *data.variants):
            text = answers.get(name, {}).get(prompt)
            shared = _shared(text, expected) if name != "teacher" and text and expected else 0
            cut = None if text is None else text[:SAMPLE_CHARACTERS]
            responses.append(
                {"model": name, "text": cut, "shared": shared, "cut": bool(text and len(text) > SAMPLE_CHARACTERS)}
            )
        shown.append({"prompt": prompt[-SAMPLE_CHARACTERS:], "responses": responses})
    return shown


def _shared(a: str, b: str) -> int:
    a, b = a[:SAMPLE_CHARACTERS], b[:SAMPLE_CHARACTERS]
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _settings(variant: str, stages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Stage → leaves of the configuration that it was handed; None for a stage that was off."""
    own = [s for s in stages if s["variant"] == variant]
    return {s["stage"]: flat(s["config"]) if s["hit"] is not None else None for s in own}


def differences(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages that not all variants run, and leaves of the stages' own configuration that are not the same for all
    variants that run them."""
    variants = [v for v in variants if v["settings"]]
    found = []
    for stage in dict.fromkeys(stage for v in variants for stage in v["settings"]):
        ran = {v["name"]: s for v in variants if (s := v["settings"].get(stage)) is not None}
        if ran and len(ran) < len(variants):
            found.append({"leaf": stage, "values": {v["name"]: "on" if v["name"] in ran else "off" for v in variants}})
        found += leaf_differences(ran, f"{stage}.")
    return found


def leaf_differences(settings: Mapping[str, Mapping[str, Any]], prefix: str = "") -> list[dict[str, Any]]:
    """settings: name → leaves. The leaves that are not the same for all, each with its value for those that have it."""
    found = []
    for leaf in dict.fromkeys(leaf for leaves in settings.values() for leaf in leaves):
        if len({repr(leaves.get(leaf)) for leaves in settings.values()}) > 1:
            values = {name: leaves[leaf] for name, leaves in settings.items() if leaf in leaves}
            found.append({"leaf": f"{prefix}{leaf}", "values": values})
    return found
