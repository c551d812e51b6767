"""The report's charts, drawn from the JSON twin. Each returns None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.svg import Axis, ForestRow, Point, Series, forest, layer_strip, line_chart, slot
from reports.text import benchmark_name, interval, number, percent, points, signed, size, tick, uncertain
from reports.verdict import Z95, is_share

STAGE_LABELS = {"init": "init", "align": "align", "kl_distill": "KL", "sft": "SFT", "dpo": "DPO", "benchmark": "final"}
LOSS_UNITS = {
    "align": "relative MSE",
    "kl_distill": "KL, nats per token",
    "sft": "cross entropy, nats",
    "dpo": "DPO loss, nats",
}


def draw(twin: Mapping[str, Any]) -> dict[str, Any]:
    """Every chart of the page by name; lists where a section has several."""
    variants = twin["variants"]
    return {
        "strips": {v["name"]: _strip(v, i) for i, v in enumerate(variants)},
        "forests": _forests(variants),
        "quality": [c for c in (_quality(variants, "kl"), _quality(variants, "top1")) if c],
        "layer_scores": _layer_scores(twin["layer_scores"]),
        "layers": _layers(variants),
        "curves": [c for stage in LOSS_UNITS if (c := _curves(variants, stage))],
        "memory": _memory(twin),
        "speed": _speed(twin),
        "speculation": _speculation(variants),
    }


def _strip(variant: Mapping[str, Any], index: int) -> Markup | None:
    if not variant["layers"]:
        return None
    kept = variant["attention_layers"]
    title = f"{variant['name']}: {len(kept)} of {variant['layers']} layers keep attention"
    return layer_strip(title, variant["layers"], kept, slot(index))


def _forests(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One chart a unit, because points, nats and perplexities share no axis."""
    pairs = [(i, v["name"], c) for i, v in enumerate(variants) for c in v["comparisons"] if c["difference"] is not None]
    kinds: dict[tuple[str, bool], list[tuple[int, str, Mapping[str, Any]]]] = {}
    for i, name, c in pairs:
        kind = "points" if is_share(c["metric"]) else str(c["metric"])
        kinds.setdefault((kind, bool(c.get("higher_is_better", True))), []).append((i, name, c))
    return [{"unit": kind, "chart": _forest(kind, higher, rows)} for (kind, higher), rows in kinds.items()]


def _forest(kind: str, higher: bool, pairs: Sequence[tuple[int, str, Mapping[str, Any]]]) -> Markup:
    scale = 100.0 if kind == "points" else 1.0
    labels = list(dict.fromkeys((c["benchmark"], c["metric"]) for _, _, c in pairs))
    rows = []
    for label in labels:
        for position, (i, name, c) in enumerate(p for p in pairs if (p[2]["benchmark"], p[2]["metric"]) == label):
            low = c["difference"] if c["ci_low"] is None else c["ci_low"]
            high = c["difference"] if c["ci_high"] is None else c["ci_high"]
            show = points if kind == "points" else signed
            note = f"{show(c['difference'])} {interval(c['ci_low'], c['ci_high'], show)}"
            rows.append(
                ForestRow(
                    f"{benchmark_name(c['benchmark'])}, n={c['n']}",
                    name,
                    slot(i),
                    scale * c["difference"],
                    scale * low,
                    scale * high,
                    note,
                    position == 0,
                )
            )
    margins = {c["delta"] for _, _, c in pairs if c.get("delta")}
    delta = (-scale if higher else scale) * margins.pop() if len(margins) == 1 else None
    better = "right" if higher else "left"
    unit = "percentage points" if kind == "points" else f"{kind}, nats per token" if kind in ("nll", "kl") else kind
    axis = Axis(f"student − teacher, {unit}; further {better} is better")
    return forest(f"Paired differences, student − teacher ({unit}), with 95 % intervals", rows, axis, delta=delta)


def _quality(variants: Sequence[Mapping[str, Any]], field: str) -> Markup | None:
    stages = list(STAGE_LABELS)
    series = []
    for i, v in enumerate(variants):
        marks = []
        for q in v["quality"]:
            value = q[field]
            if value is None:
                continue
            spread = Z95 * q["kl_se"] if field == "kl" and q["kl_se"] else None
            shown = f"KL {number(value)} nats per token" if field == "kl" else f"top-1 agreement {percent(value)}"
            note = f"{v['name']} after {q['stage']}: {shown}"
            low, high = (value - spread, value + spread) if spread else (None, None)
            marks.append(Point(stages.index(q["stage"]), value, low, high, note))
        series.append(Series(v["name"], slot(i), marks))
    if not any(s.points for s in series):
        return None
    x = Axis("after stage", ticks=[(i, STAGE_LABELS[s]) for i, s in enumerate(stages)])
    if field == "kl":
        return line_chart("KL to the teacher after each stage", series, x, Axis("KL, nats per token", log=True))
    y = Axis("top-1 agreement", include=(0.0, 1.0), show=lambda share: f"{100 * share:.0f} %")
    return line_chart("Top-1 agreement with the teacher after each stage", series, x, y)


def _layer_scores(scores: Mapping[str, Any] | None) -> Markup | None:
    if scores is None:
        return None
    marks = []
    for s in sorted(scores["layers"], key=lambda s: s["layer"]):
        score, spread = s["score"], None if s["se"] is None else Z95 * s["se"]
        low, high = (None, None) if spread is None else (score - spread, score + spread)
        marks.append(Point(s["layer"], score, low, high, f"layer {s['layer']}: {uncertain(score, spread)}"))
    title = "What the attention of each layer is worth, with 95 % intervals"
    series = [Series("", 0, marks, joined=False)]
    return line_chart(title, series, _layer_axis(series), Axis("score", include=(0.0,)), width=960)


def _layer_axis(series: Sequence[Series]) -> Axis:
    last = int(max(p.x for s in series for p in s.points))
    return Axis("layer", ticks=[(layer, str(layer)) for layer in range(0, last + 1, 5)])


def _layers(variants: Sequence[Mapping[str, Any]]) -> Markup | None:
    series = [
        Series(
            v["name"],
            slot(i),
            [Point(e["layer"], e["relative_error"]) for e in v["layer_errors"] if _has(e)],
            joined=False,
        )
        for i, v in enumerate(variants)
    ]
    if not any(s.points for s in series):
        return None
    y = Axis("relative error", include=(0.0,))
    title = "Error of every new mixer right after initialisation"
    return line_chart(title, series, _layer_axis(series), y, width=960)


def _has(error: Mapping[str, Any]) -> bool:
    return error.get("layer") is not None and error.get("relative_error") is not None


def _curves(variants: Sequence[Mapping[str, Any]], stage: str) -> Markup | None:
    series = []
    for i, v in enumerate(variants):
        curve: Sequence[Any] = next((t["curve"] for t in v["training"] if t["stage"] == stage and t["ran"]), [])
        marks = [Point(step, loss) for step, loss in curve if loss is not None]
        series.append(Series(v["name"], slot(i), marks, markers=len(marks) <= 25))
    found = [p.y for s in series for p in s.points]
    if len(found) < 2:
        return None
    wide = min(found) > 0 and max(found) / min(found) > 8
    return line_chart(f"Training loss of {stage}", series, Axis("step"), Axis(LOSS_UNITS[stage], log=wide))


def _models(twin: Mapping[str, Any]) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(name, style slot, benchmark) of all models that were benchmarked, teacher first."""
    teacher = twin["teacher"]["benchmark"]
    found = [("teacher", 0, teacher)] if teacher else []
    return found + [(v["name"], slot(i), v["benchmark"]) for i, v in enumerate(twin["variants"]) if v["benchmark"]]


def _memory(twin: Mapping[str, Any]) -> Markup | None:
    series = [
        Series(
            name,
            number_,
            [Point(b["context"], b["total"] / 2**20, note=_memory_note(name, b)) for b in m["state_bytes"]],
        )
        for name, number_, m in _models(twin)
    ]
    if not any(s.points for s in series):
        return None
    contexts = sorted({p.x for s in series for p in s.points})
    x = Axis("context, tokens", log=True, ticks=[(c, tick(c)) for c in contexts])
    return line_chart("State of one sequence against context length", series, x, Axis("state, MiB", log=True))


def _memory_note(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name}: {size(entry['total'])} at {tick(entry['context'])} tokens"


def _speed(twin: Mapping[str, Any]) -> Markup | None:
    series = [
        Series(
            name,
            number_,
            [Point(d["batch"], d["tokens_per_second"]) for d in m["decode"] if d.get("tokens_per_second") is not None],
        )
        for name, number_, m in _models(twin)
    ]
    batches = sorted({p.x for s in series for p in s.points})
    if len(batches) < 2:
        return None
    x = Axis("sequences decoded at once", log=True, ticks=[(b, tick(b)) for b in batches])
    return line_chart("Decode speed against batch size", series, x, Axis("tokens per second", include=(0.0,)))


def _speculation(variants: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Greedy groups alone: acceptance by position and yield at the first batch, speed-up at every batch."""
    groups = [
        (f"{v['name']}, {g['draft']}", g)
        for v in variants
        if v["speculation"]
        for g in v["speculation"]["groups"]
        if not g["temperature"]
    ]
    batches = list(dict.fromkeys(g["batch"] for _, g in groups))
    names = list(dict.fromkeys(name for name, _ in groups))
    charts = []
    for batch in batches:
        chosen = [(name, slot(names.index(name)), g["rows"]) for name, g in groups if g["batch"] == batch]
        if batch == batches[0]:
            charts += [_by_position(chosen), _yield(chosen)]
        charts.append(_speedup(chosen, batch))
    return [chart for chart in charts if chart]


SpeculationRows = Sequence[tuple[str, int, Sequence[Mapping[str, Any]]]]
"""(series' name, style slot, rows of one draft and batch)."""


def _by_position(chosen: SpeculationRows) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        longest = max(rows, key=lambda row: row["k"], default=None)
        shares = (longest or {}).get("acceptance_by_position") or []
        marks = [
            Point(i, a, note=f"{name}: {percent(a)} at position {i}") for i, a in enumerate(shares, 1) if a is not None
        ]
        series.append(Series(name, number_, marks))
    return _over_k(
        "Acceptance by position, of the longest window",
        series,
        "position in the window; all before it accepted",
        Axis("accepted", include=(0.0, 1.0), show=lambda share: f"{100 * share:.0f} %"),
    )


def _yield(chosen: SpeculationRows) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        marks = [
            Point(
                row["k"],
                row["tokens_per_verification"],
                row["ci_low"],
                row["ci_high"],
                f"{name}, K={row['k']}: {number(row['tokens_per_verification'])}",
            )
            for row in rows
            if row["tokens_per_verification"] is not None
        ]
        series.append(Series(name, number_, marks))
    axis = Axis("tokens per verification")
    return _over_k("Tokens gained per verification", series, "K, drafted tokens", axis, rule=1.0)


def _speedup(chosen: SpeculationRows, batch: int) -> Markup | None:
    series = []
    for name, number_, rows in chosen:
        for field, label in (("speedup", name), ("predicted_speedup", f"{name}, predicted")):
            marks = [
                Point(row["k"], row[field], note=f"{label}, K={row['k']}: {number(row[field])}×")
                for row in rows
                if row[field] is not None
            ]
            predicted = field != "speedup"
            series.append(Series(label, number_, marks, markers=not predicted, dashed=predicted))
    title = f"Speed against plain greedy decoding, batch {batch}"
    return _over_k(title, series, "K, drafted tokens", Axis("speed, × plain greedy"), rule=1.0)


def _over_k(title: str, series: Sequence[Series], label: str, y: Axis, rule: float | None = None) -> Markup | None:
    ks = sorted({p.x for s in series for p in s.points})
    if not ks:
        return None
    return line_chart(title, series, Axis(label, ticks=[(k, tick(k)) for k in ks]), y, rule=rule)
