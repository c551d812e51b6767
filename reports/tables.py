"""The comparison table: one column a model, the teacher first, one row a measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports.paper import beside
from reports.text import MISSING, TEXTS, benchmark_name, count, interval, number, percent, points, ratio, signed, size
from reports.verdict import UNITS, Z95, best_row, is_share

NOT_RUN = "not run"
NOT_COMPARABLE = "not comparable"

Cell = dict[str, str]
Row = dict[str, Any]


def comparison(twin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of rows: {"title", "rows": [{"label", "unit", "cells": [{"text", "note"}], "benchmark", "paper": a cell
    or None}]}, a cell for every model."""
    itself: dict[str, Any] = {"decode": [], "prefill": [], "state": []}
    pairs = [
        (twin["teacher"]["benchmark"], itself, None),
        *((v["benchmark"], v["against_teacher"], v["speculation"]) for v in twin["variants"]),
    ]
    models = [None if m is None else m | {"against": against, "speculation": s} for m, against, s in pairs]
    groups = [
        *({"title": f"Fidelity on {name}", "rows": _fidelity(models, text)} for text, name in TEXTS.items()),
        {"title": "Tasks", "rows": _tasks(models)},
        {"title": "Long context", "rows": _long_context(models)},
        {"title": "Judged answers", "rows": _judge(models)},
        {"title": "Speed of reading", "rows": _speed(models, "prefill")},
        {"title": "Speed of writing", "rows": _speed(models, "decode")},
        {"title": "State of one sequence", "rows": _state(models)},
        {"title": "Speculative decoding", "rows": _speculation(models)},
    ]
    return [g for g in groups if g["rows"]]


def matrix(twin: Mapping[str, Any]) -> list[Row]:
    """Differences from the baseline, one row a benchmark, one cell a student: {"text", "note", "verdict"}."""
    lines = {v["name"]: {(c["benchmark"], c["metric"]): c for c in v["comparisons"]} for v in twin["variants"]}
    refused = {(r["model"], r["benchmark"]) for r in twin["not_comparable"]}
    rows = []
    for benchmark, metric in dict.fromkeys(key for found in lines.values() for key in found):
        cells = []
        for name, found in lines.items():
            c = found.get((benchmark, metric))
            if c is None:
                why = NOT_COMPARABLE if (name, benchmark) in refused else MISSING
                cells.append(_cell("baseline" if name == twin["baseline"]["name"] else why) | {"verdict": ""})
                continue
            show = points if is_share(metric) else signed
            shown = f"{interval(c['ci_low'], c['ci_high'], show)} n={count(c['n'])}"
            cells.append(_cell(show(c["difference"]), shown) | {"verdict": c["verdict"].split(" within")[0]})
        unit = "percentage points" if is_share(metric) else UNITS.get(metric, metric)
        rows.append({"label": benchmark_name(benchmark), "unit": f"{metric}, {unit}", "cells": cells})
    return rows


def tiles(variant: Mapping[str, Any]) -> list[dict[str, str]]:
    """The five figures at the top of a variant: {"label", "text", "note"}, each with its n or its baseline."""
    benchmark = variant["benchmark"]
    if benchmark is None:
        return []
    f = benchmark["fidelity"].get("held_out") or {}
    error, documents, tokens = f.get("kl_se"), f.get("documents"), f.get("tokens")
    spread = f"± {number(Z95 * error, 2)} " if error else ""
    decode = max(variant["against_teacher"]["decode"], key=lambda d: (d["batch"], d["context"] or 0), default=None)
    state = max(variant["against_teacher"]["state"], key=lambda b: b["context"], default=None)
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


def _score(metric: str, value: float) -> str:
    return percent(value) if is_share(metric) else number(value)


def _cell(text: str, note: str = "") -> Cell:
    return {"text": text, "note": note}


def _row(
    label: str,
    unit: str,
    models: Sequence[Mapping[str, Any] | None],
    cell: Callable[[Any], Cell],
    benchmark: str = "",
    metric: str = "",
) -> Row:
    """benchmark, metric: what the row tells of, where another run or the paper may have it too."""

    def shown(m: Mapping[str, Any] | None) -> Cell:
        if m is None:
            return _cell(NOT_RUN)
        return _cell(NOT_COMPARABLE) if benchmark in m.get("refused", ()) else cell(m)

    cells = [shown(m) for m in models]
    return {"label": label, "unit": unit, "cells": cells, "benchmark": benchmark, "paper": beside(benchmark, metric)}


def _fidelity(models: Sequence[Mapping[str, Any] | None], text: str) -> list[Row]:
    found = [None if m is None else (m["fidelity"].get(text) or {}) | {"refused": m["refused"]} for m in models]
    measured = [f for f in found if f and f.get("ppl") is not None]
    if not measured:
        return []
    size_note = f"n = {count(measured[-1].get('tokens'))} tokens, {count(measured[-1].get('documents'))} documents"

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
        _row("KL to the teacher", f"nats per token, mean ± 1.96 SE by document; {size_note}", found, kl, text),
        _row("KL, median / 90 % / 99 %", "nats, quantiles over tokens", found, tail, text),
        _row("Top-1 agreement", "share of tokens", found, top1, text),
        _row("Perplexity", "exp of mean nats per token", found, perplexity, text, "ppl_ratio"),
    ]


def _tasks(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    names = dict.fromkeys((t["task"], t["metric"]) for m in models if m for t in m["tasks"])

    def cell(task: str, metric: str) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            t = next((t for t in m["tasks"] if (t["task"], t["metric"]) == (task, metric)), None)
            if t is None:
                return _cell(NOT_RUN)
            spread = f"{interval(t['ci_low'], t['ci_high'], percent)} " if t["ci_low"] is not None else ""
            return _cell(_score(metric, t["score"]), f"{spread}n={count(t['n'])}")

        return show

    chances = {t["task"]: t["chance"] for m in models if m for t in m["tasks"] if t["chance"] is not None}

    def unit(task: str, metric: str) -> str:
        guessed = f"; chance {percent(chances[task])}" if task in chances else ""
        return f"{metric}, Wilson 95 % interval{guessed}"

    return [_row(task, unit(task, metric), models, cell(task, metric), task, metric) for task, metric in names]


def _long_context(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    def last(m: Mapping[str, Any]) -> Cell:
        entries = (m["length"] or {}).get("last") or []
        longest = max(entries, key=lambda e: e["context"], default=None)
        if longest is None or longest["nll"] is None:
            return _cell(MISSING)
        spread = f"± {number(Z95 * longest['se'], 2)}, " if longest["se"] else ""
        return _cell(number(longest["nll"]), f"{spread}{count(longest['context'])} tokens, n={count(longest['n'])}")

    def found(m: Mapping[str, Any]) -> Cell:
        cells = (m["needle"] or {}).get("cells") or []
        n = sum(c["n"] for c in cells)
        return _cell(percent(sum(c["k"] for c in cells) / n), f"n={count(n)}") if n else _cell(MISSING)

    def reach(m: Mapping[str, Any]) -> Cell:
        section = m["needle"]
        if not section:
            return _cell(MISSING)
        trained = f"trained on {count(section['train_length'])}" if section["train_length"] else ""
        length = section["effective_length"]
        return _cell(count(length) if length else "none", trained)

    rows = []
    if any(m and m["length"] for m in models):
        rows.append(
            _row("Loss after the longest context", "nats per token, ± 1.96 SE by document", models, last, "length")
        )
    if any(m and m["needle"] for m in models):
        rows.append(_row("Needles found", "all lengths and depths together", models, found, "needle"))
        rows.append(_row("Effective length", "tokens up to which needles are found", models, reach, "needle"))
    return rows


def _judge(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    measures = (
        ("mt_bench", "mean", "MT-Bench", "1 to 10, both turns", number, ("best", "worst")),
        ("mt_bench", "turn_1", "MT-Bench, turn 1", "1 to 10", number, ()),
        ("mt_bench", "turn_2", "MT-Bench, turn 2", "1 to 10", number, ()),
        (
            "pairwise",
            "win_rate",
            "Won against the teacher",
            "ties as half, both orders",
            percent,
            ("ci_high", "ci_low"),
        ),
        ("alpaca", "weighted_win", "AlpacaEval", "weighted win rate", percent, ()),
        ("alpaca", "lc_minimal_local", "AlpacaEval, length-controlled", "LC (minimal, local)", percent, ()),
    )

    def cell(
        benchmark: str, field: str, show: Callable[[float | None], str], bounds: Sequence[str]
    ) -> Callable[[Any], Cell]:
        def shown(m: Mapping[str, Any]) -> Cell:
            part = (m["judge"] or {}).get(benchmark) or {}
            if part.get(field) is None:
                return _cell(MISSING)
            high, low = (part.get(b) for b in bounds) if bounds else (None, None)
            unread = f", {count(part['failed'])} unread" if part.get("failed") else ""
            spread = f"{interval(low, high, show)} " if bounds and low != high else ""
            together = "both turns " if field.startswith("turn") else ""
            return _cell(show(part[field]), f"{spread}{together}n={count(part['n'])}{unread}")

        return shown

    return [
        _row(label, unit, models, cell(benchmark, field, show, bounds), benchmark, field)
        for benchmark, field, label, unit, show, bounds in measures
        if any(((m and m["judge"] or {}).get(benchmark) or {}).get(field) is not None for m in models)
    ]


def _speed(models: Sequence[Mapping[str, Any] | None], kind: str) -> list[Row]:
    """kind: "prefill" or "decode"."""

    def entries(m: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return (m["efficiency"] or {}).get(kind) or []

    def cell(where: tuple[int, int | None]) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            d = next((d for d in entries(m) if (d["batch"], d["context"]) == where), None)
            if d is None:
                return _cell(MISSING)
            if d["oom"]:
                return _cell("out of memory")
            against = next((a for a in m["against"][kind] if (a["batch"], a["context"]) == where), None)
            baseline = f"{ratio(against['ratio'])} teacher, " if against else ""
            return _cell(number(d["tokens_per_second"]), f"{baseline}n={count(d['repeats'])} repeats")

        return show

    places = {(d["batch"], d["context"]) for m in models if m for d in entries(m)}
    devices = dict.fromkeys(str(m["device"]) for m in models if m and m["device"])
    unit = f"tokens per second on {', '.join(devices)}, median" if devices else "tokens per second, median"
    word = "after" if kind == "decode" else "of"
    return [
        _row(f"Batch {b}" + (f", {word} {count(c)} tokens" if c else ""), unit, models, cell((b, c)))
        for b, c in sorted(places, key=lambda place: (place[0], place[1] or 0))
    ]


def _state(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    def entries(m: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return (m["efficiency"] or {}).get("state") or []

    def cell(context: int) -> Callable[[Any], Cell]:
        def show(m: Mapping[str, Any]) -> Cell:
            b = _at(entries(m), "context", context)
            if b is None:
                return _cell(MISSING)
            against = _at(m["against"]["state"], "context", context)
            return _cell(size(b["total"]), f"{percent(against['ratio'])} of teacher" if against else "")

        return show

    contexts = sorted({b["context"] for m in models if m for b in entries(m)})
    return [
        _row(f"{count(c)} tokens", "KV cache + SSM + convolution state, computed", models, cell(c)) for c in contexts
    ]


def _speculation(models: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    def cell(field: str, show: Callable[[float | None], str]) -> Callable[[Any], Cell]:
        def shown(m: Mapping[str, Any]) -> Cell:
            best = best_row(m["speculation"]) if m["speculation"] else None
            if best is None or best[field] is None:
                return _cell(MISSING)
            made_up = ", SYNTHETIC" if m["speculation"]["synthetic"] else ""
            at = m["speculation"]["best"]
            return _cell(show(best[field]), f"{at['draft']}, K={best['k']}, n={count(best['verifications'])}{made_up}")

        return shown

    if not any(m and m["speculation"] for m in models):
        return []
    unit = "at the fastest K of the first batch; n verifications"
    return [
        _row(
            "Tokens per verification",
            unit,
            models,
            cell("tokens_per_verification", number),
            "speculation",
            "tokens_per_verification",
        ),
        _row("Against plain decoding", unit, models, cell("speedup", ratio), "speculation", "speedup"),
    ]


def _at(entries: Sequence[Mapping[str, Any]], field: str, value: int) -> Mapping[str, Any] | None:
    return next((e for e in entries if e[field] == value), None)
