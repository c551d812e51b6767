"""The comparison table: one column a model, the teacher first, one row a measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports.text import MISSING, TEXTS, count, interval, number, percent, ratio, size
from reports.verdict import Z95, is_share

NOT_RUN = "not run"

Cell = dict[str, str]
Row = dict[str, Any]


def comparison(twin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of rows: {"title", "rows": [{"label", "unit", "cells": [{"text", "note"}]}]}, a cell for every model."""
    itself: dict[str, Any] = {"decode": [], "state_bytes": []}
    pairs = [
        (twin["teacher"]["benchmark"], itself),
        *((v["benchmark"], v["against_teacher"]) for v in twin["variants"]),
    ]
    models = [None if benchmark is None else benchmark | {"against": against} for benchmark, against in pairs]
    groups = [
        *({"title": f"Fidelity on {name}", "rows": _fidelity(models, text)} for text, name in TEXTS.items()),
        {"title": "Tasks", "rows": _tasks(models)},
        {"title": "Decode speed", "rows": _decode(models)},
        {"title": "State of one sequence", "rows": _state(models)},
    ]
    return [g for g in groups if g["rows"]]


def tiles(variant: Mapping[str, Any]) -> list[dict[str, str]]:
    """The five figures at the top of a variant: {"label", "text", "note"}, each with its n or its baseline."""
    benchmark = variant["benchmark"]
    if benchmark is None:
        return []
    f = benchmark["fidelity"].get("held_out") or {}
    error, documents, tokens = f.get("kl_se"), f.get("documents"), f.get("tokens")
    spread = f"± {number(Z95 * error, 2)} " if error else ""
    decode = max(variant["against_teacher"]["decode"], key=lambda d: d["batch"], default=None)
    state = max(variant["against_teacher"]["state_bytes"], key=lambda b: b["context"], default=None)
    found = [
        ("KL to teacher", number(f.get("kl_mean")), f"{spread}nats/token, n={count(documents)} conv."),
        ("Same top token", percent(f.get("top1")), f"n={count(tokens)} tokens"),
        ("Perplexity", ratio(f.get("ppl_ratio")), "teacher = 1×"),
        ("Decode speed", ratio(decode and decode["ratio"]), f"teacher = 1×, batch {decode['batch']}" if decode else ""),
        (
            "State bytes",
            percent(state and state["ratio"]),
            f"of teacher, {count(state['context'])} tokens" if state else "",
        ),
    ]
    return [{"label": label, "text": text, "note": note} for label, text, note in found]


def _cell(text: str, note: str = "") -> Cell:
    return {"text": text, "note": note}


def _row(label: str, unit: str, models: Sequence[Mapping[str, Any] | None], cell: Callable[[Any], Cell]) -> Row:
    return {"label": label, "unit": unit, "cells": [_cell(NOT_RUN) if m is None else cell(m) for m in models]}


def _fidelity(models: Sequence[Mapping[str, Any] | None], text: str) -> list[Row]:
    found = [None if m is None else m["fidelity"].get(text) or {} for m in models]
    if not any(found):
        return []
    size_note = next(
        (f"n = {count(f.get('tokens'))} tokens, {count(f.get('documents'))} documents" for f in found[::-1] if f), ""
    )

    def kl(f: Mapping[str, Any]) -> Cell:
        if f.get("kl_mean") is None:
            return _cell("0", "by definition") if f is found[0] else _cell(MISSING)
        error = f.get("kl_se")
        return _cell(number(f["kl_mean"]), f"± {number(Z95 * error, 2)}" if error else "no interval")

    def tail(f: Mapping[str, Any]) -> Cell:
        quantiles = [f.get(f"kl_p{q}") for q in (50, 90, 99)]
        if all(q is None for q in quantiles):
            return _cell("0", "by definition") if f is found[0] else _cell(MISSING)
        return _cell(" / ".join(number(q) for q in quantiles))

    def top1(f: Mapping[str, Any]) -> Cell:
        if f.get("top1") is None:
            return _cell(percent(1.0), "by definition") if f is found[0] else _cell(MISSING)
        return _cell(percent(f["top1"]))

    def perplexity(f: Mapping[str, Any]) -> Cell:
        against = f.get("ppl_ratio")
        return _cell(number(f.get("ppl")), "" if against is None else f"{ratio(against)} teacher")

    return [
        _row("KL to the teacher", f"nats per token, mean ± 1.96 SE by document; {size_note}", found, kl),
        _row("KL, median / 90 % / 99 %", "nats, quantiles over tokens", found, tail),
        _row("Top-1 agreement", "share of tokens", found, top1),
        _row("Perplexity", "exp of mean nats per token", found, perplexity),
    ]


def _tasks(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    names = dict.fromkeys((t["task"], t["metric"]) for m in models if m for t in m["tasks"])

    def cell(task: str, metric: str) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            t = next((t for t in m["tasks"] if (t["task"], t["metric"]) == (task, metric)), None)
            if t is None:
                return _cell(NOT_RUN)
            if not is_share(metric):
                return _cell(number(t["score"]), f"n={count(t['n'])}")
            spread = f"{interval(t['ci_low'], t['ci_high'], percent)} " if t["ci_low"] is not None else ""
            return _cell(percent(t["score"]), f"{spread}n={count(t['n'])}")

        return show

    chances = {t["task"]: t["chance"] for m in models if m for t in m["tasks"] if t["chance"] is not None}

    def unit(task: str, metric: str) -> str:
        guessed = f"; chance {percent(chances[task])}" if task in chances else ""
        return f"{metric}, Wilson 95 % interval{guessed}"

    return [_row(task, unit(task, metric), models, cell(task, metric)) for task, metric in names]


def _decode(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    def cell(batch: int) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            d = _at(m["decode"], "batch", batch)
            if d is None:
                return _cell(MISSING)
            against = _at(m["against"]["decode"], "batch", batch)
            baseline = f"{ratio(against['ratio'])} teacher, " if against else ""
            return _cell(number(d["tokens_per_second"]), f"{baseline}{count(d['repeats'])} repeats")

        return show

    batches = sorted({d["batch"] for m in models if m for d in m["decode"]})
    devices = dict.fromkeys(str(m["device"]) for m in models if m and m["device"])
    unit = f"tokens per second on {', '.join(devices)}" if devices else "tokens per second"
    return [_row(f"Batch {b}", unit, models, cell(b)) for b in batches]


def _state(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    def cell(context: int) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            b = _at(m["state_bytes"], "context", context)
            if b is None:
                return _cell(MISSING)
            against = _at(m["against"]["state_bytes"], "context", context)
            return _cell(size(b["total"]), f"{percent(against['ratio'])} of teacher" if against else "")

        return show

    contexts = sorted({b["context"] for m in models if m for b in m["state_bytes"]})
    return [
        _row(f"{count(c)} tokens", "KV cache + SSM + convolution state, computed", models, cell(c)) for c in contexts
    ]


def _at(entries: Sequence[Mapping[str, Any]], field: str, value: int) -> Mapping[str, Any] | None:
    return next((e for e in entries if e[field] == value), None)
