"""What the figures say, in sentences, and what a sceptical reader should hold against them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports.text import benchmark_name, count, number, percent, points, ratio, signed

# Limits behind the flags. They judge nothing; they say when a figure needs the reader's attention.
FEW_ITEMS = 200
FEW_DOCUMENTS = 30
FEW_CLUSTERS = 20
FAR_KL = 1.0
"""nats per token: the teacher's tokens are e times less likely under the student, in the geometric mean."""
LOW_AGREEMENT = 0.5
KL_RISE = 1.05
"""A stage that leaves the held-out KL this many times higher than it found it."""
Z95 = 1.96

SHARES = ("acc", "exact_match", "mc", "top1", "em")

UNITS = {"nll": "nats per token"}

Flag = dict[str, str]


def is_share(metric: str) -> bool:
    """Whether the metric is a share of items, shown in percent and percentage points."""
    return metric.startswith(SHARES)


def difference(comparison: Mapping[str, Any]) -> str:
    """The paired difference with its unit."""
    if is_share(comparison["metric"]):
        return f"{points(comparison['difference'])} points"
    return f"{signed(comparison['difference'])} {UNITS.get(comparison['metric'], comparison['metric'])}"


def spans_zero(comparison: Mapping[str, Any]) -> bool:
    low, high = comparison.get("ci_low"), comparison.get("ci_high")
    return low is None or high is None or low <= 0 <= high


def reading(comparison: Mapping[str, Any]) -> str:
    """What one comparison allows to be said; no winner where the interval contains 0."""
    if spans_zero(comparison):
        mde = comparison.get("mde")
        smallest = points(mde).lstrip("+") + " points" if is_share(comparison["metric"]) else number(mde)
        return f"not distinguishable (n={count(comparison['n'])}, MDE={smallest})"
    better = (comparison["difference"] > 0) == comparison.get("higher_is_better", True)
    return "student better" if better else "teacher better"


def tally(comparisons: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Verdicts counted: "non-inferior", "worse", "inconclusive"."""
    counted = Counter("non-inferior" if c["verdict"].startswith("non-inferior") else c["verdict"] for c in comparisons)
    return {name: counted[name] for name in ("non-inferior", "worse", "inconclusive")}


def headline(variant: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> list[str]:
    """At most four factual sentences: distance to the teacher, tasks, cost, speculation."""
    benchmark = variant["benchmark"]
    if benchmark is None:
        return ["The benchmark was not run: nothing can be said about this variant."]
    parts = [_fidelity(benchmark["fidelity"].get("held_out")), _tasks(variant["comparisons"])]
    parts += [_cost(variant["against_teacher"], benchmark), _speculation(variant["speculation"])]
    return [p for p in parts if p]


def variant_flags(
    variant: Mapping[str, Any], teacher: Mapping[str, Any] | None, stages: Sequence[Mapping[str, Any]]
) -> list[Flag]:
    """Red flags of one variant, most serious first. stages: the stages that ran for it."""
    flags = [
        *_benchmark_flags(variant["benchmark"], teacher),
        *_comparison_flags(variant["comparisons"], variant["benchmark"]),
        *_training_flags(variant),
        *_speculation_flags(variant["speculation"]),
    ]
    off = [t["stage"] for t in variant["training"] if not t["ran"]]
    off += ["speculative_profile"] if variant["speculation"] is None else []
    if off:
        flags.append(_flag("note", f"Not run: {', '.join(off)}."))
    reused = [s["stage"] for s in stages if s["hit"]]
    if reused:
        flags.append(_flag("note", f"{len(reused)} of {len(stages)} stages come from the cache: {', '.join(reused)}."))
    rank = {"serious": 0, "caution": 1, "note": 2}
    return sorted(flags, key=lambda f: rank[f["level"]])


def run_flags(twin: Mapping[str, Any]) -> list[Flag]:
    """What concerns the whole run."""
    flags = []
    if twin["teacher"]["benchmark"] is None:
        flags.append(_flag("serious", "The teacher was not benchmarked: no figure here has its baseline."))
    else:
        compared = {(c["benchmark"], c["metric"]) for v in twin["variants"] for c in v["comparisons"]}
        known = {benchmark for benchmark, _ in compared}
        tasks = twin["teacher"]["benchmark"]["tasks"]
        flags += _chance_flags([t for t in tasks if t["task"] not in known or (t["task"], t["metric"]) in compared])
    if not twin["variants"]:
        flags.append(_flag("serious", "The run has no variant."))
    if not twin["run"]["git_commit"]:
        flags.append(_flag("caution", "No git commit was recorded: the code that made these figures is not named."))
    return flags


def _flag(level: str, text: str) -> Flag:
    return {"level": level, "text": text}


def _fidelity(held_out: Mapping[str, Any] | None) -> str:
    if not held_out or held_out.get("kl_mean") is None:
        return ""
    error = held_out.get("kl_se")
    spread = f" ± {number(Z95 * error, 2)}" if error else ""
    text = f"KL {number(held_out['kl_mean'])}{spread} nats per token from the teacher"
    if held_out.get("documents"):
        text += f" on {count(held_out['documents'])} held-out conversations ({count(held_out.get('tokens'))} tokens)"
    if held_out.get("top1") is not None:
        text += f"; the most probable token is the teacher's {percent(held_out['top1'])} of the time"
    if held_out.get("ppl_ratio") is not None:
        text += f"; perplexity {ratio(held_out['ppl_ratio'])} the teacher's"
    return text + "."


def _tasks(comparisons: Sequence[Mapping[str, Any]]) -> str:
    tasks = [c for c in comparisons if is_share(c["metric"])]
    if not tasks:
        return ""
    counts = tally(tasks)
    margin = " / ".join(sorted({points(c["delta"]).lstrip("+") for c in tasks}))
    items = sum({c["benchmark"]: c["n"] for c in tasks}.values())
    return (
        f"Against the teacher on {count(items)} paired items, {len(tasks)} comparisons: "
        f"{counts['non-inferior']} non-inferior within {margin} points, {counts['worse']} worse, "
        f"{counts['inconclusive']} inconclusive."
    )


def _cost(against: Mapping[str, Any], benchmark: Mapping[str, Any]) -> str:
    parts = []
    if against["decode"]:
        fastest = max(against["decode"], key=lambda d: d["batch"])
        where = f", {benchmark['device']}" if benchmark["device"] else ""
        parts.append(
            f"decodes at {ratio(fastest['ratio'])} the teacher's tokens per second (batch {fastest['batch']}{where})"
        )
    if against["state_bytes"]:
        longest = max(against["state_bytes"], key=lambda b: b["context"])
        parts.append(
            f"keeps {percent(longest['ratio'])} of the teacher's state bytes at {count(longest['context'])} tokens"
        )
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def _speculation(profile: Mapping[str, Any] | None) -> str:
    if profile is None:
        return ""
    best = best_row(profile)
    if best is None or not best["k"] or best["speedup"] is None:
        return ""
    at = profile["best"]
    speed = f"{ratio(best['speedup'])} plain greedy at K={best['k']}"
    if profile["synthetic"]:
        rate = percent(profile["injected_acceptance"])
        return f"SYNTHETIC speculation, {rate} of the proposals accepted unseen: {speed} (batch {at['batch']})."
    return f"Speculative decoding with {at['draft']} drafts: {speed}, {_sameness(best)} (batch {at['batch']})."


def best_row(profile: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest row at the first batch, greedy."""
    best = profile["best"]
    for group in profile["groups"]:
        if (group["draft"], group["batch"], group["temperature"]) == (best["draft"], best["batch"], 0.0):
            return next((row for row in group["rows"] if row["k"] == best["best_k"]), None)
    return None


def _sameness(row: Mapping[str, Any]) -> str:
    if row["identical_to_greedy"] is None:
        return "output not compared with plain greedy"
    if not row["identical_to_greedy"]:
        return "output NOT identical to plain greedy"
    ties = (row["identity"] or {}).get("near_tie")
    return "output identical to plain greedy" + (f" up to the first near-tie in {ties} replies" if ties else "")


def _benchmark_flags(benchmark: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None) -> list[Flag]:
    if benchmark is None:
        return [_flag("serious", "Benchmark not run.")]
    flags = []
    held_out = benchmark["fidelity"].get("held_out") or {}
    kl, top1, documents = held_out.get("kl_mean"), held_out.get("top1"), held_out.get("documents")
    if kl is not None and kl > FAR_KL:
        flags.append(_flag("serious", f"KL {number(kl)} is above {FAR_KL:g} nat per token."))
    if top1 is not None and top1 < LOW_AGREEMENT:
        flags.append(_flag("caution", f"The next token is the teacher's less than half the time ({percent(top1)})."))
    if documents is not None and documents < FEW_DOCUMENTS:
        flags.append(_flag("caution", f"Fidelity rests on few conversations (n={documents})."))
    if teacher and None not in (devices := (teacher["device"], benchmark["device"])) and devices[0] != devices[1]:
        flags.append(
            _flag(
                "serious",
                f"Teacher measured on {teacher['device']}, student on {benchmark['device']}: speeds do not compare.",
            )
        )
    return flags


def _chance_flags(tasks: Sequence[Mapping[str, Any]]) -> list[Flag]:
    """A teacher that guesses has nothing to lose, so keeping its score there is no achievement."""
    return [
        _flag(
            "caution",
            f"The teacher is not measurably above chance on {t['task']} ({t['metric']} {percent(t['score'])}, "
            f"n={count(t['n'])}, chance {percent(t['chance'])}): a student has nothing to lose there.",
        )
        for t in tasks
        if t["chance"] is not None and t["ci_low"] is not None and t["ci_low"] <= t["chance"]
    ]


def _comparison_flags(comparisons: Sequence[Mapping[str, Any]], benchmark: Mapping[str, Any] | None) -> list[Flag]:
    if benchmark is None:
        return []
    if not comparisons:
        return [_flag("caution", "No paired comparison with the teacher was made.")]
    flags = []
    tasks = [c for c in comparisons if is_share(c["metric"])]
    worse = [f"{benchmark_name(c['benchmark'])} ({difference(c)})" for c in comparisons if c["verdict"] == "worse"]
    if worse:
        flags.append(_flag("serious", f"Worse than the teacher: {', '.join(worse)}."))
    open_ = [c["benchmark"] for c in tasks if c["verdict"] == "inconclusive"]
    if open_:
        flags.append(_flag("caution", f"Inconclusive at this number of items: {', '.join(dict.fromkeys(open_))}."))
    small = [c for c in tasks if c["n"] < FEW_ITEMS]
    if small:
        smallest = ", ".join(f"{c['benchmark']} n={c['n']}, MDE {points(c['mde']).lstrip('+')}" for c in small)
        flags.append(_flag("caution", f"Few items, so only large differences could be seen (points): {smallest}."))
    narrow = [
        f"{benchmark_name(c['benchmark'])} ({c['clusters']})"
        for c in comparisons
        if c.get("clusters", FEW_CLUSTERS) < FEW_CLUSTERS
    ]
    if narrow:
        flags.append(_flag("caution", f"Intervals rest on few independent clusters: {', '.join(narrow)}."))
    return flags


def _training_flags(variant: Mapping[str, Any]) -> list[Flag]:
    flags = []
    for t in variant["training"]:
        first, last = t.get("loss_first"), t.get("loss_last")
        if t["ran"] and first is not None and last is not None and last >= first:
            flags.append(_flag("caution", f"The loss did not fall in {t['stage']} ({number(first)} → {number(last)})."))
        if t["ran"] and t.get("steps") and last is None:
            flags.append(_flag("serious", f"{t['stage']} ended without a finite loss."))
    measured = [q for q in variant["quality"] if q["ran"] and q["kl"] is not None and q["stage"] != "benchmark"]
    for before, after in zip(measured, measured[1:], strict=False):
        if after["kl"] > KL_RISE * before["kl"]:
            flags.append(
                _flag(
                    "caution", f"Held-out KL rose in {after['stage']}: {number(before['kl'])} → {number(after['kl'])}."
                )
            )
    return flags


def _speculation_flags(profile: Mapping[str, Any] | None) -> list[Flag]:
    if profile is None:
        return []
    flags = []
    if profile["synthetic"]:
        flags.append(_flag("caution", "Speculation is SYNTHETIC: acceptance was injected, not measured."))
    for group in profile["groups"]:
        unlike = [str(row["k"]) for row in group["rows"] if row["identical_to_greedy"] is False]
        if unlike:
            which = f"{group['draft']} draft, batch {group['batch']}"
            flags.append(
                _flag("serious", f"Speculative output ({which}) differs from plain greedy at K = {', '.join(unlike)}.")
            )
    rows = [row for group in profile["groups"] for row in group["rows"] if row["k"] and row["speedup"] is not None]
    if rows and max(row["speedup"] for row in rows) <= 1:
        best = ratio(max(row["speedup"] for row in rows))
        flags.append(_flag("note", f"Speculation is at no K faster than plain greedy (best {best})."))
    return flags
