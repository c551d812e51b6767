"""The report's content as plain JSON, before any layout: this is `report.json`, and all that the page is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from reports.rows import Benchmark, RunData, finite
from reports.verdict import headline, run_flags, variant_flags

SCHEMA = 1
TRAINING = ("align", "kl_distill", "sft", "dpo")
THROUGHPUT = (
    *("steps", "tokens", "positions", "train_seconds", "tokens_per_second", "flops_per_token", "utilisation"),
    *("peak_memory_bytes", "processes"),
)
"""How training ran, as `steps.loop` writes it; `steps.utilisation` defines the utilisation."""
SAMPLE_CHARACTERS = 1500
CURVE_POINTS = 120

FIDELITY = ("kl_mean", "kl_p50", "kl_p90", "kl_p99", "kl_se", "top1", "ppl", "ppl_ratio", "tokens", "documents")
DECODE = ("batch", "tokens_per_second", "new_tokens", "repeats")
STATE = ("kv", "ssm", "conv")
COMPARISON = (
    *("benchmark", "metric", "higher_is_better", "n", "clusters", "teacher", "student", "difference", "ci_low"),
    *("ci_high", "bound", "p", "p_holm", "test", "flips_up", "flips_down", "mde", "delta", "verdict"),
)
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

Interval = Callable[[float, int], tuple[float, float]]
"""(successes, n) → 95 % interval of the share."""


def build_twin(data: RunData, title: str, samples: int, interval: Interval | None = None) -> dict[str, Any]:
    """samples: how many prompts to show. interval: for accuracies; without it they stand without one."""
    stages = [_stage(s) for s in data.lineage.get("stages", [])]
    teacher = _benchmark(data.benchmarks.get("teacher"), interval)
    twin = {
        "schema": SCHEMA,
        "title": title,
        "run": _run(data.lineage, stages),
        "teacher": {"name": teacher_name(data.lineage), "benchmark": teacher},
        "layer_scores": _layer_scores(stages),
        "variants": [_variant(name, data, stages, teacher, interval) for name in data.variants],
        "samples": _samples(data, samples),
        "lineage": [{k: v for k, v in s.items() if k != "config"} | {"summary": _brief(s["summary"])} for s in stages],
        "configuration": flat(data.lineage.get("config", {})),
        "differences": _differences(data.variants, stages),
    }
    twin["flags"] = run_flags(twin)
    return finite(twin)


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


def _named(record: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """These fields and no others; what the stage did not write is None."""
    return {name: record.get(name) for name in fields}


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("stage", "variant", "key", "digest", "hit", "seconds", "device")
    return _named(stage, fields) | {
        "summary": stage.get("summary") or {},
        "config": stage.get("config") or {},
    }


def _brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's single figures; series and layers stand elsewhere in the twin."""
    return {k: v for k, v in summary.items() if isinstance(v, int | float | str | bool) or v is None}


def _layer_scores(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the choice of layers by score was made by; None where they interleave or are listed."""
    summary: Mapping[str, Any] = next((s["summary"] for s in stages if s["stage"] == "layer_scores"), {})
    return _named(summary, LAYER_SCORES) if summary.get("layers") else None


def _variant(
    name: str,
    data: RunData,
    stages: Sequence[Mapping[str, Any]],
    teacher: dict[str, Any] | None,
    interval: Interval | None,
) -> dict[str, Any]:
    own = {s["stage"]: s for s in stages if s["variant"] == name and s["hit"] is not None}
    init = own.get("init_from_attention", {}).get("summary", {})
    attention, replaced = init.get("attention_layers") or [], init.get("replaced_layers") or []
    found = data.benchmarks.get(name)
    benchmark = _benchmark(found, interval)
    training = [_training(stage, own.get(stage)) for stage in TRAINING]
    variant: dict[str, Any] = {
        "name": name,
        "attention_layers": attention,
        "replaced_layers": replaced,
        "layers": len(attention) + len(replaced),
        "continues": _continues(data.lineage, name),
        "method": init.get("method"),
        "layer_choice": (init.get("layer_choice") or {}).get("method"),
        "starts": [
            {"method": m, "kl": v.get("kl"), "top1": v.get("top1")} for m, v in (init.get("start") or {}).items()
        ],
        "layer_errors": init.get("layers") or [],
        "quality": _quality(init, training, benchmark),
        "training": training,
        "draft": _training("draft", own.get("draft")),
        "benchmark": benchmark,
        "comparisons": [_named(c, COMPARISON) for c in found.comparisons] if found else [],
        "speculation": _speculation(data.speculation.get(name), own),
        "against_teacher": _against(benchmark, teacher),
    }
    variant["headline"] = headline(variant, teacher)
    variant["flags"] = variant_flags(variant, teacher, list(own.values()))
    return variant


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
        | _named(s, names)
        | {"curve": thin(s.get("curve") or [])}
    )


def thin(curve: Sequence[Any], limit: int = CURVE_POINTS) -> list[Any]:
    """At most `limit` + 1 points: every k-th, and always the last."""
    stride = max(1, -(-len(curve) // limit))
    kept = list(curve[::stride])
    if curve and kept[-1] != curve[-1]:
        kept.append(curve[-1])
    return kept


def _benchmark(found: Benchmark | None, interval: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    s = found.summary
    tasks = []
    for task, figures in (s.get("tasks") or {}).items():
        n = figures.get("n")
        for metric, score in figures.items():
            if metric in ("n", "chance") or not isinstance(score, int | float):
                continue
            low, high = interval(score * n, n) if interval and n and 0 <= score <= 1 else (None, None)
            entry = {"task": task, "metric": metric, "score": score, "n": n, "ci_low": low, "ci_high": high}
            tasks.append(entry | {"chance": figures.get("chance")})
    return {
        "device": s.get("device"),
        "fidelity": {text: _named(f, FIDELITY) for text, f in (s.get("fidelity") or {}).items() if f},
        "tasks": tasks,
        "decode": [_named(d, DECODE) for d in s.get("decode") or []],
        "state_bytes": [
            _named(b, ("context", *STATE)) | {"total": sum(b.get(part) or 0 for part in STATE)}
            for b in s.get("state_bytes") or []
        ],
        "rows": None if found.rows is None else len(found.rows),
    }


def _against(benchmark: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    """Speed and memory as multiples of the teacher's, where both were measured at the same setting."""
    if not benchmark or not teacher:
        return {"decode": [], "state_bytes": []}
    speed = {d["batch"]: d.get("tokens_per_second") for d in teacher["decode"]}
    memory = {b["context"]: b["total"] for b in teacher["state_bytes"]}
    return {
        "decode": [
            {"batch": d["batch"], "ratio": d["tokens_per_second"] / speed[d["batch"]]}
            for d in benchmark["decode"]
            if speed.get(d["batch"]) and d.get("tokens_per_second")
        ],
        "state_bytes": [
            {"context": b["context"], "ratio": b["total"] / memory[b["context"]]}
            for b in benchmark["state_bytes"]
            if memory.get(b["context"])
        ],
    }


def _speculation(profile: Mapping[str, Any] | None, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The profile, on what it was measured, and how its draft was made, if it was; own: stage → record."""
    if not profile:
        return None
    draft = own.get("draft")
    names = ("synthetic", "injected_acceptance", "dtype", "new_tokens", "copy_bandwidth", "identity_rule", "parameters")
    return _named(profile, names) | {
        "device": own.get("speculative_profile", {}).get("device"),
        "draft": _named(draft["summary"], DRAFT) if draft else None,
        "best": _named(profile.get("best") or {}, ("draft", "batch", "best_k", "speedup")),
        "groups": [
            _named(group, ("draft", "batch", "temperature", "prompts", "best_k"))
            | {"rows": [_speculation_row(row) for row in group.get("rows") or []]}
            for group in profile.get("groups") or []
        ],
    }


def _speculation_row(row: Mapping[str, Any]) -> dict[str, Any]:
    identity = row.get("identity")
    return _named(row, SPECULATION) | {
        "milliseconds": _named(row.get("milliseconds") or {}, PHASES),
        "cache_bytes": _named(row.get("cache_bytes") or {}, CACHE),
        "identity": _named(identity, IDENTITY) if identity else None,
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


def _differences(variants: Sequence[str], stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages that not all variants run, and leaves of the stages' own configuration that are not the same for all
    variants that run them."""
    staged: dict[str, dict[str, Mapping[str, Any]]] = {}
    for s in stages:
        if s["variant"] in variants:
            staged.setdefault(s["stage"], {})[s["variant"]] = s
    found = []
    for stage, records in staged.items():
        ran = {v: flat(s["config"]) for v, s in records.items() if s["hit"] is not None}
        if ran and len(ran) < len(variants):
            found.append({"leaf": stage, "values": {v: "on" if v in ran else "off" for v in variants}})
        for leaf in dict.fromkeys(leaf for settings in ran.values() for leaf in settings):
            values = {v: settings[leaf] for v, settings in ran.items() if leaf in settings}
            if len({repr(settings.get(leaf)) for settings in ran.values()}) > 1:
                found.append({"leaf": f"{stage}.{leaf}", "values": values})
    return found
