"""The rows of the bench, in order, each with what fills it in."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.bench import arithmetic, peers, trace
from hybrid.bench.rows import Row
from hybrid.bench.timed import (
    GATE_PROMPT,
    GATE_TOKENS,
    Spread,
    TimedEngine,
    agreements,
    attempt,
    require,
    require_identity,
)
from hybrid.checkpoint import load_pretrained
from hybrid.drafts import Draft, ModelDraft, NGramDraft
from hybrid.engine import Generated, Sampling
from hybrid.model import HybridForCausalLM
from hybrid.shapes import draft_of, random_model, shape
from kernels_ext.bench import copy_bandwidth

NAMES = ("plain", "synthetic", "speculative", "selfchat", "transformers")
SEVERAL_PROMPTS = 8
"""A batch of one decodes so many prompts, one after another."""
LONGEST_PROMPT = 512
CHAT = Sampling(temperature=1.0, top_p=0.95)


@dataclass(frozen=True)
class Settings:
    """What is measured. Shapes are names of `hybrid.shapes`; model, draft and teacher are folders.

    ks: proposals per round at batch 1; few_ks: at larger batches of `synthetic`. rounds: of one repeat. contexts: where
    the rounds of self-chat are timed.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    shape: str = "8b"
    llama: str = "smollm2"
    context: int = 4096
    batches: tuple[int, ...] = (1, 8, 64)
    ks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    few_ks: tuple[int, ...] = (2, 4)
    acceptance: float = 0.8
    rounds: int = 16
    repeats: int = 5
    model: Path | None = None
    drafts: tuple[str, ...] = ("ngram",)
    prompts: Path | None = None
    new_tokens: int = 128
    teacher: Path | None = None
    chat_batch: int = 2048
    chat_prompt: int = 8
    chat_tokens: int = 512
    contexts: tuple[int, ...] = (64, 256, 512)
    peer_tokens: int = 64
    """New tokens of transformers' `generate` at self-chat's batch."""
    static_tokens: int = 128
    transformers: bool = True

    @classmethod
    def tiny(cls) -> Settings:
        """For a CPU: everything runs, nothing means anything."""
        return cls(
            device="cpu",
            dtype=torch.float32,
            shape="tiny",
            llama="tiny-llama",
            context=48,
            batches=(1, 2),
            ks=(1, 2),
            few_ks=(2,),
            rounds=2,
            new_tokens=8,
            chat_batch=4,
            chat_tokens=8,
            contexts=(8, 16),
            peer_tokens=4,
            static_tokens=8,
        )


@dataclass
class Job:
    """A row and what fills it in, or raises."""

    row: Row
    fill: Callable[[Row], None]

    def run(self) -> None:
        """Fill the row in, or say in its note why not."""
        self.row.note = attempt(lambda: self.fill(self.row), self.row.name) or self.row.note


@dataclass
class Decoded:
    """Plain or speculative decoding of the same prompts, several times: tokens per second and ms per round of each."""

    tokens_per_second: Spread
    ms: Spread
    replies: list[list[int]]
    details: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Models and plain times that several rows share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._models: dict[str, HybridForCausalLM] = {}
        self._plain: dict[int, Spread] = {}
        self._decoded: dict[int, Decoded] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of copying memory, read and written counted."""
        return copy_bandwidth() if self.settings.device == "cuda" else _cpu_copy_bandwidth()

    def jobs(self, names: Sequence[str]) -> Iterator[Job]:
        settings = self.settings
        for batch in settings.batches if "plain" in names else ():
            yield self._job(self.plain, "plain", settings.shape, batch, settings.context)
        if "synthetic" in names:
            for batch in settings.batches:
                for k in settings.ks if batch == 1 else settings.few_ks:
                    yield self._job(self.synthetic, "synthetic", settings.shape, batch, settings.context, "2 layers", k)
        if "speculative" in names:
            assert settings.model is not None
            for batch in settings.batches:
                for draft in settings.drafts:
                    for k in settings.ks:
                        label = draft if draft == "ngram" else Path(draft).name
                        fill = partial(self.speculative, draft=draft)
                        yield self._job(fill, "speculative", settings.model.name, batch, LONGEST_PROMPT, label, k)
        llama = settings.llama if settings.teacher is None else settings.teacher.name
        if "selfchat" in names:
            context = settings.chat_prompt + settings.chat_tokens
            yield self._job(self.selfchat, "selfchat", llama, settings.chat_batch, context)
        if "transformers" in names and settings.transformers:
            context = settings.chat_prompt + settings.static_tokens
            yield self._job(self.transformers, "transformers", llama, 1, context)

    def _job(
        self, fill: Callable[[Row], None], name: str, of: str, batch: int, context: int, draft: str = "", k: int = 0
    ) -> Job:
        dtype = str(self.settings.dtype).removeprefix("torch.")
        return Job(Row(name, of, batch, context, dtype, draft, k), fill)

    def plain(self, row: Row) -> None:
        """A step of plain decoding beside the time that its bytes take at the measured copy bandwidth."""
        settings = self.settings
        model = self._random(settings.shape)
        spread, phases = self._plain_round(model, row.batch)
        moved = arithmetic.floor_bytes(model.config, row.context, row.batch, settings.dtype.itemsize)
        floor_ms = sum(moved.values()) / self.bandwidth * 1e3
        row.time(spread, row.batch / spread.median * 1e3)
        row.compare(f"floor {floor_ms:.3f} ms", floor_ms / spread.median)
        row.details = {"floor_ms": floor_ms, "floor_bytes": moved, "phases_ms": phases}

    def synthetic(self, row: Row) -> None:
        """Speculation with random weights whose proposals are accepted at a given rate, whatever they are."""
        settings = self.settings
        model = self._random(settings.shape)
        if row.batch not in self._plain:
            self._plain_round(model, row.batch)
        plain = self._plain[row.batch]
        if "draft" not in self._models:
            self._models["draft"] = random_model(draft_of(model.config), settings.device, settings.dtype, seed=1)
        engine = TimedEngine(
            model,
            make_draft=lambda: ModelDraft(self._models["draft"]),
            k=row.k,
            batch=row.batch,
            max_length=self._room(row.context, row.k),
            injected=settings.acceptance,
        )
        require(engine, short_prompts(model, row.batch))
        engine.unread = True
        prompts = [[1] * row.context] * row.batch
        spread, tokens = engine.time_rounds(prompts, settings.rounds, settings.repeats)
        phases = self._phases(engine, prompts)
        parts = arithmetic.round_parts(phases, row.k)
        alpha = settings.acceptance
        row.note = f"SYNTHETIC: random weights, proposals accepted with probability {alpha:g}"
        row.time(spread, row.batch * tokens / spread.median * 1e3)
        row.compare(f"plain {plain.median:.3f} ms", tokens * plain.median / spread.median)
        row.details = {
            "tokens_per_round": tokens,
            "predicted": arithmetic.predicted_speedup(alpha, row.k, plain.median, **parts),
            "break_even": arithmetic.break_even(row.k, plain.median, **parts),
            "phases_ms": phases,
        }

    def speculative(self, row: Row, draft: str) -> None:
        """A real model and a real draft on real prompts, greedy, beside the same engine without a draft."""
        assert self.settings.model is not None
        model = self._loaded(self.settings.model)
        prompts, note = self._prompts(row.batch)
        make_draft = partial(NGramDraft) if draft == "ngram" else partial(ModelDraft, self._loaded(Path(draft)))
        if row.batch not in self._decoded:
            self._decoded[row.batch] = self._decode(model, prompts, row.batch)
        plain = self._decoded[row.batch]
        found = self._decode(model, prompts, row.batch, make_draft, row.k)
        identity = agreements(model, prompts, plain.replies, found.replies)
        require_identity(identity)
        row.note = note
        row.time(found.ms, found.tokens_per_second.median)
        row.compare(
            f"plain {plain.tokens_per_second.median:.0f} tokens/s",
            found.tokens_per_second.median / plain.tokens_per_second.median,
        )
        row.details = {**found.details, "identity": identity}

    def selfchat(self, row: Row) -> None:
        """Sampling many conversations at once, as the corpus stage does, prompts read included."""
        settings = self.settings
        model = self._llama()
        longest = max(settings.chat_prompt + GATE_TOKENS, row.context, self._room(max(settings.contexts), 0))
        engine = TimedEngine(model, batch=row.batch, max_length=longest, sampling=CHAT)
        prompts = short_prompts(model, row.batch, settings.chat_prompt)
        require(engine, prompts)
        runs = [engine.generate(prompts, settings.chat_tokens, seed=i) for i in range(settings.repeats + 1)][1:]
        made = row.batch * settings.chat_tokens
        whole = Spread.of([(r.prefill_seconds + r.decode_seconds) / settings.chat_tokens * 1e3 for r in runs])
        row.time(whole, row.batch / whole.median * 1e3)
        engine.unread = True
        rounds, phases = {}, {}
        for length in settings.contexts:
            read = [[1] * length] * row.batch
            rounds[length] = engine.time_rounds(read, settings.rounds, settings.repeats)[0].median
            phases[length] = self._phases(engine, read)
        row.details = {
            "steady_tokens_per_second": made / statistics.median(r.decode_seconds for r in runs),
            "prefill_ms": statistics.median(r.prefill_seconds for r in runs) * 1e3,
            "round_ms_at_length": rounds,
            "phases_ms_at_length": phases,
        }
        if settings.transformers:
            del engine  # its keys and values make room for theirs
            self._beside_generate(row, model, prompts)

    def _beside_generate(self, row: Row, model: HybridForCausalLM, prompts: Sequence[Sequence[int]]) -> None:
        new_tokens = self.settings.peer_tokens
        spread, _ = peers.generate_seconds(
            peers.transformers_twin(model),
            torch.tensor(prompts, device=model.device),
            new_tokens,
            repeats=2,
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
        )
        theirs = row.batch * new_tokens / spread.median
        assert row.tokens_per_second is not None
        row.compare(
            f"transformers generate (sdpa, dynamic cache, {new_tokens} tokens): {theirs:.0f} tokens/s",
            row.tokens_per_second / theirs,
        )

    def transformers(self, row: Row) -> None:
        """One greedy reply beside transformers with a static cache and torch.compile."""
        settings = self.settings
        model = self._llama()
        engine = TimedEngine(model, batch=1, max_length=max(row.context, settings.chat_prompt + GATE_TOKENS))
        prompts = short_prompts(model, 1, settings.chat_prompt)
        require(engine, prompts)
        runs = [engine.generate(prompts, settings.static_tokens) for _ in range(settings.repeats + 1)][1:]
        theirs, replies = peers.generate_seconds(
            peers.transformers_twin(model),
            torch.tensor(prompts, device=model.device),
            settings.static_tokens,
            repeats=3,
            do_sample=False,
            cache_implementation="static",
        )
        require_identity(agreements(model, prompts, replies, runs[0].replies))
        ours = Spread.of([(r.prefill_seconds + r.decode_seconds) / settings.static_tokens * 1e3 for r in runs])
        row.time(ours, 1e3 / ours.median)
        their_ms = theirs.median / settings.static_tokens * 1e3
        row.compare(f"transformers (static cache, compiled): {their_ms:.3f} ms per token", their_ms / ours.median)

    def traces(self, names: Sequence[str]) -> Iterator[tuple[str, list[trace.Kernel]]]:
        """Kernels of a plain round: of both shapes at batch 1, and of self-chat; those that belong to these rows."""
        settings = self.settings
        if {"plain", "synthetic"} & set(names):
            yield self._trace(self._random(settings.shape), settings.shape, 1, settings.context, Sampling())
        yield self._trace(self._llama(), settings.llama, 1, settings.contexts[-1], Sampling())
        if "selfchat" in names:
            middle = settings.contexts[len(settings.contexts) // 2]
            yield self._trace(self._llama(), settings.llama, settings.chat_batch, middle, CHAT)

    def _trace(
        self, model: HybridForCausalLM, name: str, batch: int, length: int, sampling: Sampling
    ) -> tuple[str, list[trace.Kernel]]:
        longest = length + trace.TRACED_ROUNDS + 1
        engine = TimedEngine(model, batch=batch, max_length=longest, sampling=sampling)
        engine.unread = True
        kernels = trace.kernels_in_a_round(engine, [[1] * length] * batch)
        return f"{name}, batch {batch}, length {length}", kernels

    def _plain_round(self, model: HybridForCausalLM, batch: int) -> tuple[Spread, dict[str, float]]:
        """ms per step of plain decoding at the context, and its phases; RefusedError if it is wrong."""
        settings = self.settings
        engine = TimedEngine(model, batch=batch, max_length=self._room(settings.context, 0))
        require(engine, short_prompts(model, batch))
        engine.unread = True
        prompts = [[1] * settings.context] * batch
        spread, _ = engine.time_rounds(prompts, settings.rounds, settings.repeats)
        self._plain[batch] = spread
        return spread, self._phases(engine, prompts)

    def _phases(self, engine: TimedEngine, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        rounds = self.settings.rounds
        return engine.phase_milliseconds(prompts, rounds * (engine.k + 1), repeats=rounds - 1)

    def _decode(
        self,
        model: HybridForCausalLM,
        prompts: Sequence[Sequence[int]],
        batch: int,
        make_draft: Callable[[], Draft] | None = None,
        k: int = 0,
    ) -> Decoded:
        settings = self.settings
        longest = max(len(p) for p in prompts) + max(settings.new_tokens, GATE_TOKENS)
        engine = TimedEngine(
            model, make_draft=make_draft, k=k, batch=batch, max_length=longest, eos_token_ids=model.config.eos_token_ids
        )
        groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        require(engine, groups[0])
        passes: list[list[Generated]] = []
        for _ in range(settings.repeats + 1):
            passes.append([engine.generate(group, settings.new_tokens) for group in groups])
        rates, spans = [], []
        for runs in passes[1:]:
            seconds = sum(run.decode_seconds for run in runs)
            rates.append(sum(s.tokens for run in runs for s in run.stats) / seconds)
            spans.append(seconds / sum(max(s.rounds for s in run.stats) for run in runs) * 1e3)
        replies = [reply for run in passes[1] for reply in run.replies]
        details = acceptance(passes[1], k) if k else {}
        return Decoded(Spread.of(rates), Spread.of(spans), replies, details)

    def _prompts(self, batch: int) -> tuple[list[list[int]], str]:
        """As many as the batch has rows, at least SEVERAL_PROMPTS; and a remark if there are not so many."""
        assert self.settings.prompts is not None
        found = read_prompts(self.settings.prompts)
        wanted = max(batch, SEVERAL_PROMPTS)
        remark = f"{len(found)} prompts, repeated to {wanted}" if len(found) < wanted else ""
        return (found * (wanted // len(found) + 1))[:wanted], remark

    def _room(self, context: int, k: int) -> int:
        """max_length for timing rounds at a context, and for the short prompts of the gate."""
        return max(context + (self.settings.rounds + 1) * (k + 1), GATE_PROMPT + GATE_TOKENS)

    def _random(self, name: str) -> HybridForCausalLM:
        if name not in self._models:
            self._models[name] = random_model(shape(name), self.settings.device, self.settings.dtype)
        return self._models[name]

    def _loaded(self, folder: Path) -> HybridForCausalLM:
        key = str(folder.resolve())
        if key not in self._models:
            self._models[key] = load_pretrained(folder, self.settings.device, self.settings.dtype)
        return self._models[key]

    def _llama(self) -> HybridForCausalLM:
        teacher = self.settings.teacher
        return self._random(self.settings.llama) if teacher is None else self._loaded(teacher)


def acceptance(runs: Sequence[Generated], k: int) -> dict[str, Any]:
    """Over all prompts: tokens per verification, and the share of proposals that was accepted of those whose
    forerunners were all accepted, in all and by position."""
    stats = [s for run in runs for s in run.stats]
    proposed = [sum(s.proposed[i] for s in stats) for i in range(k)]
    accepted = [sum(s.accepted[i] for s in stats) for i in range(k)]
    reached = [proposed[0], *(min(a, p) for a, p in zip(accepted, proposed[1:], strict=False))]
    return {
        "tokens_per_verification": sum(s.tokens for s in stats) / max(1, sum(s.rounds for s in stats)),
        "acceptance": sum(accepted) / sum(reached) if sum(reached) else None,
        "acceptance_by_position": [a / r if r else None for a, r in zip(accepted, reached, strict=True)],
    }


def short_prompts(model: HybridForCausalLM, count: int, length: int | None = None) -> list[list[int]]:
    """Random tokens; 5 to GATE_PROMPT of them unless `length` says how many."""
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    return [[draw.randrange(vocabulary) for _ in range(length or draw.randint(5, GATE_PROMPT))] for _ in range(count)]


def read_prompts(path: Path) -> list[list[int]]:
    """Token lists of at most LONGEST_PROMPT tokens: the lines of a .jsonl file, or the conversations of a corpus shard
    (.npz) up to their first replies. ValueError if there is none."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            tokens, starts, assistant = arrays["tokens"], arrays["starts"], arrays["assistant"]
        ends = [a + int(assistant[a:b].argmax()) if a < b else a for a, b in zip(starts, starts[1:], strict=False)]
        found = [tokens[a:end].tolist() for a, end in zip(starts, ends, strict=False)]
    else:
        found = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
    fitting = [prompt for prompt in found if 0 < len(prompt) <= LONGEST_PROMPT]
    if not fitting:
        raise ValueError(f"{path}: has no prompt of 1 to {LONGEST_PROMPT} tokens")
    return fitting


def _cpu_copy_bandwidth(size: int = 1 << 26) -> float:
    source, spans = torch.zeros(size, dtype=torch.uint8), []
    target = torch.empty_like(source)
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        spans.append(time.perf_counter() - began)
    return 2 * size / statistics.median(spans)
