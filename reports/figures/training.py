"""How near the student came stage by stage, which layers it kept, and the curves of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.figures.models import whisker
from reports.svg import Axis, Point, Series, line_chart, slot
from reports.text import count, duration, number, percent, uncertain
from reports.verdict import Z95

STAGE_LABELS = {"init": "init", "align": "align", "kl_distill": "KL", "sft": "SFT", "dpo": "DPO", "benchmark": "final"}
LOSS_UNITS = {
    "align": "relative MSE",
    "kl_distill": "KL, nats per token",
    "sft": "cross entropy, nats",
    "dpo": "DPO loss, nats",
    "draft": "KL to the student, nats per token",
}


def quality(twin: Mapping[str, Any]) -> list[Markup]:
    """Distance to the teacher after each stage, as KL and as agreement."""
    return [chart for field in ("kl", "top1") if (chart := _quality(twin["variants"], field))]


def _quality(variants: Sequence[Mapping[str, Any]], field: str) -> Markup | None:
    stages = list(STAGE_LABELS)
    series = []
    for i, v in enumerate(variants):
        marks = []
        for q in v["quality"]:
            value = q[field]
            if value is None:
                continue
            low, high = whisker(value, q["kl_se"]) if field == "kl" else (None, None)
            shown = f"KL {number(value)} nats per token" if field == "kl" else f"top-1 agreement {percent(value)}"
            note = f"{v['name']} after {q['stage']}: {shown}"
            marks.append(Point(stages.index(q["stage"]), value, low, high, note))
        series.append(Series(v["name"], slot(i), marks))
    if not any(s.points for s in series):
        return None
    x = Axis("after stage", ticks=[(i, STAGE_LABELS[s]) for i, s in enumerate(stages)])
    if field == "kl":
        return line_chart("KL to the teacher after each stage", series, x, Axis("KL, nats per token", log=True))
    y = Axis("top-1 agreement", include=(0.0, 1.0), show=lambda share: f"{100 * share:.0f} %")
    return line_chart("Top-1 agreement with the teacher after each stage", series, x, y)


def layer_scores(twin: Mapping[str, Any]) -> Markup | None:
    """What each layer's attention is worth, where layers were chosen by it."""
    scores = twin["layer_scores"]
    if scores is None:
        return None
    marks = []
    for s in sorted(scores["layers"], key=lambda s: s["layer"]):
        score, spread = s["score"], None if s["se"] is None else Z95 * s["se"]
        note = f"layer {s['layer']}: {uncertain(score, spread)}"
        marks.append(Point(s["layer"], score, *whisker(score, s["se"]), note))
    title = "What the attention of each layer is worth, with 95 % intervals"
    series = [Series("", 0, marks, joined=False)]
    return line_chart(title, series, _layer_axis(series), Axis("score", include=(0.0,)))


def layer_errors(twin: Mapping[str, Any]) -> Markup | None:
    """Error of every new mixer right after initialisation."""
    series = [
        Series(
            v["name"],
            slot(i),
            [Point(e["layer"], e["relative_error"]) for e in v["layer_errors"] if _has(e)],
            joined=False,
        )
        for i, v in enumerate(twin["variants"])
    ]
    if not any(s.points for s in series):
        return None
    y = Axis("relative error", include=(0.0,))
    title = "Error of every new mixer right after initialisation"
    return line_chart(title, series, _layer_axis(series), y)


def _layer_axis(series: Sequence[Series]) -> Axis:
    last = int(max(p.x for s in series for p in s.points))
    return Axis("layer", ticks=[(layer, str(layer)) for layer in range(0, last + 1, 5)])


def _has(error: Mapping[str, Any]) -> bool:
    return error.get("layer") is not None and error.get("relative_error") is not None


def curves(twin: Mapping[str, Any]) -> list[Markup]:
    """Loss by step, one chart a stage, the draft's own included; the legend says what each curve cost."""
    return [chart for stage in LOSS_UNITS if (chart := _curves(twin["variants"], stage))]


def _curves(variants: Sequence[Mapping[str, Any]], stage: str) -> Markup | None:
    series = []
    for i, v in enumerate(variants):
        trained = next((t for t in [*v["training"], v["draft"]] if t["stage"] == stage and t["ran"]), None)
        if trained is None:
            continue
        marks = [
            Point(step, loss, note=f"{v['name']}, step {count(step)}: {number(loss)}")
            for step, loss in trained["curve"]
            if loss is not None
        ]
        spent = [f"{count(trained['tokens'])} tokens"] if trained["tokens"] is not None else []
        spent += [duration(trained["train_seconds"])] if trained["train_seconds"] is not None else []
        name = ", ".join([v["name"], *spent])
        series.append(Series(name, slot(i), marks))
    found = [p.y for s in series for p in s.points]
    if len(found) < 2:
        return None
    wide = min(found) > 0 and max(found) / min(found) > 8
    return line_chart(f"Training loss of {stage}", series, Axis("step"), Axis(LOSS_UNITS[stage], log=wide))
