"""Stage: speculative decoding of the student, K from 0 (plain) upwards: what is accepted, what it costs, what it gains.

Speed and speed-up are measured against the same engine at K = 0, and stand beside what the acceptance and the times of
a round's parts predict (Leviathan et al., 2211.17192, §3.3). Greedy output is compared with plain greedy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import preferences
from corpora.shards import Shard
from evals.stats import bootstrap_means
from hybrid import HybridConfig, HybridForCausalLM, load_pretrained, ties
from hybrid.bench import break_even, predicted_speedup, round_parts
from hybrid.drafts import ModelDraft, NGramDraft, load_draft
from hybrid.engine import DecodeEngine, Sampling, SpeculationStats
from kernels_ext import bench, dispatch
from steps.config import SpeculativeStageConfig
from steps.stage import Progress, StageContext
from steps.students import compute_type

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 256
REPEATS = {"cuda": 20, "cpu": 3}
"""Rounds over which a phase's median is taken, where the replies are long enough."""
TURNS = 4
"""Prompts per slot of a batch: a slot takes the next one when its reply ends, and only the last end one by one."""
SSM_OPERATORS = ("ssd_update", "ssd_verify", "selective_update", "selective_verify")

Draft = ModelDraft | NGramDraft
Timer = Callable[[Sequence[Callable[[], Any]]], float]
"""Calls → microseconds per call."""


class ProfileError(RuntimeError):
    """Nothing to measure; the message says why."""


@dataclass(frozen=True)
class _Decoded:
    """What one engine gave. prompts: of each reply, its number. seconds: decoding without prefill, all replies."""

    prompts: Sequence[int]
    replies: Sequence[Sequence[int]]
    stats: Sequence[SpeculationStats]
    seconds: float
    phases: Mapping[str, float]
    cache: Mapping[str, int]
    ssm_bytes: float
    ssm_us: float | None
    peak_bytes: int | None

    def first(self) -> dict[int, int]:
        """Prompt → place of its first reply: a prompt that was repeated to fill a batch says nothing new."""
        places: dict[int, int] = {}
        for place, prompt in enumerate(self.prompts):
            places.setdefault(prompt, place)
        return places


def run(config: SpeculativeStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Writes profile.json: one group of rows per draft, batch and temperature, one row per K.

    On CUDA weights are of context.compute, on a CPU of float32. Greedy output must be plain greedy's token for token
    but for what `hybrid.ties` grants to rounding. Prompts take the slots of a batch in turns, as in serving, and are
    repeated where there are too few; then they count once in acceptance and intervals. With injected acceptance all
    rows are synthetic: they time the shapes, their text is no text.
    """
    dtype = compute_type(context) if context.device == "cuda" else torch.float32
    student = load_pretrained(inputs["student"], context.device, dtype)
    drafts: dict[str, Draft] = {}
    if "draft" in inputs:
        drafts[config.draft] = load_draft(inputs["draft"], context.device, dtype)
    drafts["ngram"] = NGramDraft(config.ngram)
    asked = max(_asked(config, batch) for batch in config.batches)
    prompts = _prompts(inputs["corpus"], asked, context.seed)
    profiler = _Profiler(config, student, prompts, context)
    groups = [
        group
        for batch in config.batches
        for temperature in dict.fromkeys((0.0, config.sampling_temperature))
        for group in profiler.groups(batch, temperature, drafts)
    ]
    best = max((g for g in groups if g["batch"] == config.batches[0] and not g["temperature"]), key=_best_speedup)
    wrong = sum(row["identity"]["wrong"] for group in groups for row in group["rows"] if row["identity"])
    profile = {
        "synthetic": profiler.synthetic,
        "injected_acceptance": config.injected_acceptance or None,
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": config.new_tokens,
        "max_k": config.max_k,
        "ngram": config.ngram,
        "parameters": {"student": _size(student)}
        | {name: _size(draft.model) for name, draft in drafts.items() if isinstance(draft, ModelDraft)},
        "copy_bandwidth": profiler.copy_bandwidth,
        "identity_rule": ties.RULE,
        "best": {name: best[name] for name in ("draft", "batch", "best_k")} | {"speedup": _best_speedup(best)},
        "groups": groups,
    }
    (out / "profile.json").write_text(json.dumps(profile, indent=1, allow_nan=False) + "\n")
    return {
        "draft": best["draft"],
        "batch": best["batch"],
        "best_k": best["best_k"],
        "speedup": _best_speedup(best),
        "identical": None if profiler.synthetic else wrong == 0,
        "synthetic": profiler.synthetic,
    }


def _asked(config: SpeculativeStageConfig, batch: int) -> int:
    """Prompts that are decoded with a batch of so many slots, repeated where there are too few."""
    return max(config.prompts, TURNS * batch if batch > 1 else 1)


def _size(model: HybridForCausalLM) -> int:
    return sum(p.numel() for p in model.parameters())


def _prompts(corpus: Path, count: int, seed: int) -> list[list[int]]:
    """Openings of held-out conversations up to the first reply."""
    found = preferences.drawn_prompts(Shard.load(corpus / "held_out.npz"), MAX_PROMPT_TOKENS, count, seed)
    if not found:
        raise ProfileError(f"no held-out conversation has an opening of at most {MAX_PROMPT_TOKENS} tokens")
    return [list(tokens) for _, tokens in found]


class _Profiler:
    """One student, one set of prompts; engines come and go."""

    def __init__(
        self,
        config: SpeculativeStageConfig,
        student: HybridForCausalLM,
        prompts: Sequence[list[int]],
        context: StageContext,
    ) -> None:
        self.config, self.student, self.prompts, self.context = config, student, prompts, context
        self.synthetic = config.injected_acceptance > 0
        self.on_cuda = context.device == "cuda"
        self.copy_bandwidth = bench.copy_bandwidth() if self.on_cuda else None
        self.done = 0

    def groups(self, batch: int, temperature: float, drafts: Mapping[str, Draft]) -> Iterator[dict[str, Any]]:
        """One per draft; all share the row of K = 0."""
        total = len(self.config.batches) * (1 + (self.config.sampling_temperature > 0))
        total *= 1 + len(drafts) * self.config.max_k
        plain = self._decode(batch, temperature, None, 0, None, total)
        if all(s.tokens < 2 for s in plain.stats):
            raise ProfileError(
                f"no reply to {len(self.prompts)} prompts has a second token "
                f"(speculative_profile.new_tokens is {self.config.new_tokens}), "
                "so nothing is decoded speculatively; switch the stage off or train the student longer"
            )
        checked = not self.synthetic and temperature == 0.0
        for name, draft in drafts.items():
            rows = [self._row(0, plain, plain, checked)]
            for k in range(1, self.config.max_k + 1):
                decoded = self._decode(batch, temperature, draft, k, plain, total)
                rows.append(self._row(k, decoded, plain, checked))
                self._say(name, batch, rows[-1])
            best = max(rows, key=lambda row: 0.0 if row["identical_to_greedy"] is False else row["tokens_per_second"])
            yield {
                "draft": name,
                "batch": batch,
                "temperature": temperature,
                "prompts": len(plain.first()),
                "best_k": best["k"],
                "rows": rows,
            }

    def _decode(
        self, batch: int, temperature: float, draft: Draft | None, k: int, plain: _Decoded | None, total: int
    ) -> _Decoded:
        """All prompts through one new engine, and then the times of its phases."""
        config, context = self.config, self.context
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        asked = _asked(config, batch)
        order = [i % min(len(self.prompts), asked) for i in range(asked)]
        engine = DecodeEngine(
            self.student,
            batch=batch,
            max_length=max(map(len, self.prompts)) + config.new_tokens,
            draft=draft,
            k=k,
            sampling=Sampling(temperature=temperature),
            eos_token_ids=() if self.synthetic else None,
            injected=config.injected_acceptance if self.synthetic and k else None,
        )
        engine.generate([self.prompts[i] for i in order[:batch]], min(2, config.new_tokens))  # compiles and captures
        made = engine.generate_all([self.prompts[i] for i in order], config.new_tokens, seed=context.seed)
        replies, stats, seconds = made.replies, made.stats, made.decode_seconds
        peak = torch.cuda.max_memory_allocated() if self.on_cuda else None
        phases = self._phases(engine, order, plain.replies if plain else replies)
        tokens, rounds = sum(s.tokens for s in stats), sum(s.rounds for s in stats)
        moved, moved_us = self._ssm(engine, tokens / max(rounds, 1))
        self.done += 1
        shown = {"K": float(k), "tokens/s": tokens / seconds}
        context.progress(Progress(self.done, total, "engines", 1 / max(seconds, 1e-9), shown))
        return _Decoded(order, replies, stats, seconds, phases, engine.cache_bytes(), moved, moved_us, peak)

    def _phases(self, engine: DecodeEngine, order: Sequence[int], plain: Sequence[Sequence[int]]) -> dict[str, float]:
        """Milliseconds of a round and its parts, on the batch with the most to say: rows that ended cost nothing."""
        batch = engine.batch
        start = max(range(0, len(order), batch), key=lambda s: sum(len(r) for r in plain[s : s + batch]))
        longest = max(len(r) for r in plain[start : start + batch])
        repeats = max(1, min(REPEATS[self.context.device], longest // (engine.k + 1) - 2))
        asked = [self.prompts[i] for i in order[start : start + batch]]
        timed = engine.phase_milliseconds(asked, self.config.new_tokens, repeats=repeats)
        return {**timed, "other": max(0.0, timed["round"] - timed["draft"] - timed["verify"] - timed["accept"])}

    def _ssm(self, engine: DecodeEngine, committed: float) -> tuple[float, float | None]:
        """Bytes that a round's SSM operators must move in all layers of the student, and microseconds that they take;
        both are means over rounds with and without a fold, as often as these come when a round keeps `committed`
        tokens. Microseconds are None without CUDA."""
        places = ssm_places(engine.k + 1, engine.cache.ring, committed)
        moved = sum(weight * ssm_bytes(engine, history, due) for history, due, weight in places)
        if not self.on_cuda or not engine.model.config.mamba_layers:
            return moved, None
        return moved, sum(weight * ssm_microseconds(engine, history, _graphed) for history, _, weight in places)

    def _row(self, k: int, decoded: _Decoded, plain: _Decoded, checked: bool) -> dict[str, Any]:
        row = figures(k, [decoded.stats[place] for place in decoded.first().values()])
        speed, base = (sum(s.tokens for s in d.stats) / d.seconds for d in (decoded, plain))
        identity = self._identity(decoded, plain) if checked else None
        share = None
        if decoded.ssm_us and self.copy_bandwidth:
            share = decoded.ssm_bytes / (decoded.ssm_us * 1e-6) / self.copy_bandwidth
        return {
            **row,
            "tokens_per_second": speed,
            "speedup": speed / base,
            "steady_speedup": row["tokens_per_verification"] * plain.phases["round"] / decoded.phases["round"],
            **prediction(row["effective_acceptance"], k, decoded.phases, plain.phases),
            "milliseconds": dict(decoded.phases),
            "cache_bytes": dict(decoded.cache),
            "peak_memory_bytes": decoded.peak_bytes,
            "ssm_bytes_per_round": decoded.ssm_bytes,
            "ssm_microseconds": decoded.ssm_us,
            "copy_bandwidth_share": share,
            "identity": identity,
            "identical_to_greedy": None if identity is None else identity["wrong"] == 0,
        }

    def _identity(self, decoded: _Decoded, plain: _Decoded) -> dict[str, Any]:
        counts = {"exact": 0, "near_tie": 0, "wrong": 0}
        largest = 0.0
        for prompt, place in decoded.first().items():
            expected, found = plain.replies[place], decoded.replies[place]
            kind, gap = ties.compare(self.student, self.prompts[prompt], expected, found)
            counts[kind] += 1
            largest = max(largest, gap)
        return {**counts, "largest_gap": largest}

    def _say(self, name: str, batch: int, row: Mapping[str, Any]) -> None:
        logger.info(
            "%s draft, batch %d, K=%d: %.2f tokens a verification, %.2f× plain (predicted %.2f×)",
            *(name, batch, row["k"], row["tokens_per_verification"], row["speedup"], row["predicted_speedup"]),
        )


def figures(k: int, stats: Sequence[SpeculationStats]) -> dict[str, Any]:
    """Acceptance and yield of one K over prompts.

    acceptance_by_position[i] is conditional: proposals at position i that were accepted, over those that were reached,
    that is, whose predecessors in the window had all been accepted: min(accepted[i−1], proposed[i]), which for a draft
    that always proposes K tokens is exact and else at most too many. acceptance: the same over all positions.
    effective_acceptance: what is not proposed counts as refused, so it is the rate α of the model of 2211.17192, in
    which every round proposes K tokens. tokens_per_verification: tokens of the replies over rounds, with a 95 %
    interval by bootstrap over prompts; it cannot exceed K + 1.
    """
    stats = [s for s in stats if s.rounds]
    proposed = np.array([s.proposed for s in stats], dtype=int).reshape(len(stats), k).sum(0)
    accepted = np.array([s.accepted for s in stats], dtype=int).reshape(len(stats), k).sum(0)
    reached = np.minimum(np.concatenate([proposed[:1], accepted[:-1]]), proposed)
    tokens = np.array([s.tokens for s in stats], dtype=float)
    rounds = np.array([s.rounds for s in stats], dtype=float)
    low, high = np.quantile(bootstrap_means(tokens, rounds), [0.025, 0.975])
    mean = float(tokens.sum() / rounds.sum())
    tried = rounds.sum() + accepted[:-1].sum()
    assert mean <= k + 1, f"{mean} tokens per verification with K = {k}"
    return {
        "k": k,
        "acceptance": float(accepted.sum() / reached.sum()) if reached.sum() else None,
        "effective_acceptance": float(accepted.sum() / tried) if k else None,
        "acceptance_by_position": [float(a / r) if r else None for a, r in zip(accepted, reached, strict=True)],
        "proposed": int(proposed.sum()),
        "accepted": int(accepted.sum()),
        "verifications": int(rounds.sum()),
        "tokens_per_verification": mean,
        "ci_low": float(low),
        "ci_high": float(high),
    }


def prediction(
    acceptance: float | None, k: int, phases: Mapping[str, float], plain: Mapping[str, float]
) -> dict[str, float | None]:
    """What the effective acceptance and the times of a round's parts promise, and the acceptance from which on
    speculation should pay: None if it cannot, and without proposals; see `hybrid.bench.arithmetic`."""
    if not k:
        return {"predicted_speedup": 1.0, "break_even_acceptance": None}
    assert acceptance is not None
    parts = round_parts(phases, k)
    return {
        "predicted_speedup": predicted_speedup(acceptance, k, plain["round"], **parts),
        "break_even_acceptance": break_even(k, plain["round"], **parts),
    }


def ssm_places(window: int, ring: int, committed: float) -> list[tuple[int, bool, float]]:
    """(history, whether the round folds, share of rounds): what a round finds in the ring when rounds keep `committed`
    tokens in the mean. Plain decoding (window 1) has no ring."""
    if window == 1:
        return [(0, False, 1.0)]
    kept = min(max(committed, 1.0), float(window))
    steps = [int((i + 1) * kept) - int(i * kept) for i in range(32)]
    found = bench.fold_schedule(window, ring, steps)
    places = [(round(found.history_due), True, found.due), (round(found.history), False, 1 - found.due)]
    return [place for place in places if place[2] > 0]


def ssm_bytes(engine: DecodeEngine, history: int, due: bool) -> float:
    """Bytes of one round's SSM operators in all layers; `kernels_ext.bench.traffic` says what is counted."""
    config = engine.model.config
    shape, batch, width = _mixer_shape(config), engine.batch, engine.model.dtype.itemsize
    if engine.k == 0:
        moved = bench.update_bytes(shape, batch, activation_bytes=width)
    else:
        moved = bench.verify_bytes(shape, batch, engine.k + 1, history, float(due), activation_bytes=width)
    return len(config.mamba_layers) * moved


def _mixer_shape(config: HybridConfig) -> bench.MixerShape:
    shape = bench.mamba1_shape if config.mixer == "mamba1" else bench.mamba2_shape
    return shape(config.n_heads, config.scan_groups, config.head_dim, config.state_size)


def ssm_microseconds(engine: DecodeEngine, history: int, timer: Timer) -> float:
    """Time of one round's SSM operators in all layers with this history in the ring. The engine's text is lost."""
    cursors = engine.cache.cursors
    engine.slots.copy_(torch.arange(engine.batch))
    cursors.lengths.fill_(min(2 * engine.cache.ring, engine.max_length))
    cursors.folded.copy_((cursors.lengths - history).clamp(min=0))
    with torch.no_grad(), _recorded() as calls:
        engine.model.decode(engine.tokens, engine.cache, engine.slots)
    with torch.no_grad():
        return timer(calls) * len(calls)


def _graphed(calls: Sequence[Callable[[], Any]]) -> float:
    return bench.time_graph(calls).median_us


@contextmanager
def _recorded() -> Iterator[list[Callable[[], Any]]]:
    """Inside the block, every call of an SSM operator is kept, to be made again on the same memory."""
    calls: list[Callable[[], Any]] = []
    real = {name: getattr(dispatch, name) for name in SSM_OPERATORS}

    def recorder(operator: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            calls.append(lambda: operator(*arguments, **options))
            return operator(*arguments, **options)

        return record

    for name, operator in real.items():
        setattr(dispatch, name, recorder(operator))
    try:
        yield calls
    finally:
        for name, operator in real.items():
            setattr(dispatch, name, operator)


def _best_speedup(group: Mapping[str, Any]) -> float:
    return next(row["speedup"] for row in group["rows"] if row["k"] == group["best_k"])
