"""What the figures say, in sentences, and what a sceptical reader should hold against them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports.text import benchmark_name, count, interval, number, percent, points, ratio, signed

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

SMALL_MODEL = 1_000_000_000
"""Parameters of a teacher; findings on smaller ones need not hold for those that are distilled in earnest."""
SILENT = 0.05
"""Share of items without an answer in the form asked for."""
CONSISTENT = 0.65
"""Share of pairwise judgments that survive a swap of the answers; GPT-4's is about that (2306.05685, table 2)."""
DRIFT = 1.0
"""Points by which a judge may leave its own earlier judgment of an anchor."""
ORDERED = 0.8
"""Share of the anchors' pairs of a good and a bad answer that a judge must put in the right order."""

SHARES = (
    *("acc", "exact", "mc", "top1", "em", "f1", "prompt_level", "inst_level", "found", "win", "preference"),
    "no_answer",
)

FAMILIES = {"offline": "offline tasks", "paper": "of the paper's tasks", "leaderboard": "leaderboard tasks"}
"""What the means over tasks are over, by `evals.comparison.FAMILIES`."""
UNITS = {"nll": "nats per token", "score": "judge points"}

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


def reading(comparison: Mapping[str, Any], baseline: str = "teacher") -> str:
    """What one comparison allows to be said; no winner where the interval contains 0."""
    if spans_zero(comparison):
        mde = comparison.get("mde")
        smallest = points(mde).lstrip("+") + " points" if is_share(comparison["metric"]) else number(mde)
        return f"not distinguishable (n={count(comparison['n'])}, MDE={smallest})"
    better = (comparison["difference"] > 0) == comparison.get("higher_is_better", True)
    return "student better" if better else f"{baseline} better"


def tally(comparisons: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Verdicts counted: "non-inferior", "worse", "inconclusive"."""
    counted = Counter("non-inferior" if c["verdict"].startswith("non-inferior") else c["verdict"] for c in comparisons)
    return {name: counted[name] for name in ("non-inferior", "worse", "inconclusive")}


def headline(variant: Mapping[str, Any], baseline: str = "teacher") -> list[str]:
    """A few factual sentences: distance to the teacher, tasks and their means, cost, speculation."""
    benchmark = variant["benchmark"]
    if benchmark is None:
        return ["The benchmark was not run: nothing can be said about this variant."]
    parts = [_fidelity(benchmark["fidelity"].get("held_out")), _tasks(variant["comparisons"], baseline)]
    parts += [_mean(mean, baseline) for mean in variant["means"]]
    parts += [_cost(variant["against_teacher"], benchmark), _speculation(variant["speculation"])]
    return [p for p in parts if p]


def variant_flags(
    variant: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    stages: Sequence[Mapping[str, Any]],
    baseline: str = "teacher",
) -> list[Flag]:
    """Red flags of one variant: what failed, then most serious first. stages: those of its own, off ones among them."""
    benchmark = variant["benchmark"]
    flags = [
        *_failure_flags(benchmark),
        *_benchmark_flags(benchmark, teacher),
        *_comparison_flags(variant["comparisons"], benchmark, baseline),
        *_answer_flags(benchmark),
        *_judge_flags(benchmark),
        *_training_flags(variant),
        *_speculation_flags(variant["speculation"]),
    ]
    off = [t["stage"] for t in variant["training"] if not t["ran"]]
    off += ["speculative_profile"] if variant["speculation"] is None else []
    if off:
        flags.append(_flag("note", f"Not run: {', '.join(off)}."))
    ran = [s for s in stages if s["hit"] is not None]
    reused = [s["stage"] for s in ran if s["hit"]]
    if reused:
        flags.append(_flag("note", f"{len(reused)} of {len(ran)} stages come from the cache: {', '.join(reused)}."))
    return _ranked(flags)


def run_flags(twin: Mapping[str, Any]) -> list[Flag]:
    """What concerns all that is shown."""
    flags = []
    teacher = twin["teacher"]
    if teacher["benchmark"] is None:
        flags.append(_flag("serious", "The teacher was not benchmarked: no figure here has its baseline."))
    else:
        flags += _failure_flags(teacher["benchmark"], "On the teacher: ")
        compared = {(c["benchmark"], c["metric"]) for v in twin["variants"] for c in v["comparisons"]}
        known = {benchmark for benchmark, _ in compared}
        tasks = teacher["benchmark"]["tasks"]
        flags += _chance_flags([t for t in tasks if t["task"] not in known or (t["task"], t["metric"]) in compared])
    if not twin["variants"]:
        flags.append(_flag("serious", "The run has no variant."))
    for reason, models in _grouped(twin["not_comparable"]).items():
        flags.append(_flag("serious", f"Not comparable: {reason} ({', '.join(models)})."))
    flags += _run_difference_flags(twin["runs"])
    limit = twin["configuration"].get("benchmark.items_per_task")
    if limit:
        flags.append(_flag("caution", f"Limit used: a seeded sample of at most {count(limit)} items of each task."))
    if teacher["parameters"] and teacher["parameters"] < SMALL_MODEL:
        size = f"{teacher['parameters'] / 1e6:.0f} million parameters"
        flags.append(_flag("caution", f"Tiny model: the teacher has {size}; larger ones may lose more or less."))
    for run in twin["runs"]:
        if not run["git_commit"] or run["git_commit"].endswith("-dirty"):
            what = "differs from its commit" if run["git_commit"] else "is not named by a commit"
            named = f" of run {run['label']}" if run["label"] else ""
            flags.append(_flag("caution", f"The code{named} that made these figures {what}."))
    return _ranked(flags)


def _ranked(flags: Sequence[Flag]) -> list[Flag]:
    rank = {"serious": 0, "caution": 1, "note": 2}
    return sorted(flags, key=lambda f: rank[f["level"]])


def _grouped(refused: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Reason → the models that it concerns."""
    found: dict[str, list[str]] = {}
    for r in refused:
        found.setdefault(r["reason"], []).append(r["model"])
    return found


def _run_difference_flags(runs: Sequence[Mapping[str, Any]]) -> list[Flag]:
    """What several runs must share for their figures to stand side by side."""
    flags = []
    for field, level, text in (
        ("chat_template", "serious", "The runs' chat templates differ: conversations are worded differently"),
        ("teacher", "serious", "The runs have different teachers: KL and perplexity ratios are each to its own"),
        ("device", "caution", "The runs were measured on different devices: speeds do not compare"),
        ("git_commit", "note", "The runs are of different commits"),
    ):
        values = [run[field] for run in runs]
        if len({repr(value) for value in values}) > 1:
            names = dict.fromkeys(str(v)[:12] if field == "git_commit" else str(v) for v in values)
            shown = "" if field == "chat_template" else f" ({', '.join(names)})"
            flags.append(_flag(level, f"{text}{shown}."))
    return flags


def _failure_flags(benchmark: Mapping[str, Any] | None, where: str = "") -> list[Flag]:
    if benchmark is None:
        return []
    again = f" To compute it again: {benchmark['recompute']}" if benchmark["recompute"] else ""
    return [
        _flag("serious", f"{where}FAILED: {f['benchmark']} gave no figures: {f['error']}{again}")
        for f in benchmark["failed"]
    ]


def _answer_flags(benchmark: Mapping[str, Any] | None) -> list[Flag]:
    flags = []
    for task, t in {t["task"]: t for t in benchmark["tasks"]}.items() if benchmark else ():
        if (t["no_answer"] or 0) > SILENT:
            silent = f"{percent(t['no_answer'])} of {task} (n={count(t['n'])})"
            flags.append(_flag("caution", f"No answer could be read on {silent}."))
        if t["too_long"]:
            cut = f"{count(t['too_long'])} of {task} (n={count(t['n'])})"
            flags.append(_flag("caution", f"Longer than the context: {cut}; read without their beginning, or failed."))
    return flags


def _judge_flags(benchmark: Mapping[str, Any] | None) -> list[Flag]:
    section = benchmark["judge"] if benchmark else None
    if section is None:
        return []
    flags = []
    judge, pairwise, anchors = section["judge"] or {}, section["pairwise"] or {}, section["anchors"] or {}
    if judge.get("kind") == "fake":
        flags.append(_flag("serious", "The judge is a stand-in for tests: its judgments mean nothing."))
    elif judge:
        flags.append(
            _flag(
                "caution",
                f"Judged by {judge['model']} ({judge['kind']}), not by GPT-4: no published score compares.",
            )
        )
    for name in ("mt_bench", "pairwise", "alpaca"):
        part = section[name] or {}
        if part.get("failed"):
            flags.append(
                _flag(
                    "caution",
                    f"{name}: judgments that could not be read: {count(part['failed'])} (n={count(part['n'])}).",
                )
            )
    if pairwise.get("consistent") is not None and pairwise["consistent"] < CONSISTENT:
        share = percent(pairwise["consistent"])
        flags.append(
            _flag("caution", f"The judge keeps its pairwise verdict in only {share} when the answers swap places.")
        )
    if anchors.get("pairs") and anchors["ordered"] < ORDERED * anchors["pairs"]:
        right = f"{count(anchors['ordered'])} of {count(anchors['pairs'])}"
        flags.append(
            _flag("serious", f"The judge puts only {right} pairs of a good and a bad answer in the right order.")
        )
    if anchors.get("largest_change") is not None and anchors["largest_change"] >= DRIFT:
        drift = number(anchors["largest_change"])
        flags.append(
            _flag("caution", f"The judge drifted: by up to {drift} points on {count(anchors['n'])} stored answers.")
        )
    return flags


def _the(baseline: str) -> str:
    return "the teacher" if baseline == "teacher" else baseline


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


def _tasks(comparisons: Sequence[Mapping[str, Any]], baseline: str) -> str:
    tasks = [c for c in comparisons if is_share(c["metric"])]
    if not tasks:
        return ""
    counts = tally(tasks)
    margin = " / ".join(sorted({points(c["delta"]).lstrip("+") for c in tasks}))
    items = sum({c["benchmark"]: c["n"] for c in tasks}.values())
    return (
        f"Against {_the(baseline)} on {count(items)} paired items, {len(tasks)} comparisons: "
        f"{counts['non-inferior']} non-inferior within {margin} points, {counts['worse']} worse, "
        f"{counts['inconclusive']} inconclusive."
    )


def _mean(mean: Mapping[str, Any], baseline: str) -> str:
    kept = "" if mean["retention"] is None else f"; {percent(mean['retention'])} of {_the(baseline)}'s is kept"
    margin = f" within {points(mean['delta']).lstrip('+')} points" if mean["verdict"].startswith("non-inferior") else ""
    over = f"{len(mean['tasks'])} {FAMILIES.get(mean['family'], mean['family'])}"
    found = f"{points(mean['difference'])} points {interval(mean['ci_low'], mean['ci_high'], points)}"
    return f"Mean over {over}: {found}{kept}; {mean['verdict'].split(' within')[0]}{margin}."


def _cost(against: Mapping[str, Any], benchmark: Mapping[str, Any]) -> str:
    parts = []
    if against["decode"]:
        fastest = max(against["decode"], key=lambda d: (d["batch"], d["context"] or 0))
        where = f", {benchmark['device']}" if benchmark["device"] else ""
        at = f"batch {fastest['batch']}" + (f" after {count(fastest['context'])} tokens" if fastest["context"] else "")
        parts.append(f"decodes at {ratio(fastest['ratio'])} the teacher's tokens per second ({at}{where})")
    if against["state"]:
        longest = max(against["state"], key=lambda b: b["context"])
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


def _comparison_flags(
    comparisons: Sequence[Mapping[str, Any]], benchmark: Mapping[str, Any] | None, baseline: str
) -> list[Flag]:
    if benchmark is None:
        return []
    if not comparisons:
        return [_flag("caution", f"No paired comparison with {_the(baseline)} was made.")]
    flags = []
    tasks = [c for c in comparisons if is_share(c["metric"])]
    worse = [f"{benchmark_name(c['benchmark'])} ({difference(c)})" for c in comparisons if c["verdict"] == "worse"]
    if worse:
        flags.append(_flag("serious", f"Worse than {_the(baseline)}: {', '.join(worse)}."))
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
