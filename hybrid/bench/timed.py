"""An engine whose rounds are timed, and what must be true of it before they are."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.cache import KVCache
from hybrid.drafts import Draft
from hybrid.engine import DecodeEngine
from hybrid.model import HybridForCausalLM
from hybrid.ties import Agreement, compare, last_logits

log = logging.getLogger(__name__)

GATE_PROMPT = 24
GATE_TOKENS = 16
"""What `require` decodes: replies to short prompts."""
LOGITS_TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
"""Largest relative Frobenius error of decode's logits against the full forward's. Rounding the residual stream to
bfloat16 after each of 64 additions alone makes 1.2e-2 to 2e-2 between two right ways to compute them."""


class RefusedError(RuntimeError):
    """Something that must not be timed; the message says why."""


def attempt(measure: Callable[[], None], name: str) -> str:
    """Run `measure`; why nothing came of it, or nothing. What cannot be measured takes nothing else with it."""
    try:
        measure()
    except RefusedError as error:
        return str(error)
    except Exception as error:
        log.warning("%s", name, exc_info=True)
        lines = str(error).strip().splitlines()
        return f"failed: {type(error).__name__}: {lines[-1] if lines else ''}"[:200]
    return ""


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], 0.0, len(values))
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, upper - lower, len(values))


class TimedEngine(DecodeEngine):
    """A `DecodeEngine` that never stops at a token by default, can be made again, and can skip reading its prompts.

    make_draft: gives a new draft, as one belongs to one engine; None decodes plainly. While `unread` is true prompts
    count as read: the cursors say so, and the caches hold random finite numbers. What is decoded then means nothing,
    its time is that of a prompt that was read.
    """

    def __init__(
        self, model: HybridForCausalLM, *, make_draft: Callable[[], Draft] | None = None, **options: Any
    ) -> None:
        self.unread = False
        options = {"eos_token_ids": (), **options}
        self._again: Callable[..., TimedEngine] = lambda **changes: TimedEngine(
            model, **{"make_draft": make_draft, **options, **changes}
        )
        super().__init__(model, draft=None if make_draft is None else make_draft(), **options)

    def twin(self, **changes: Any) -> TimedEngine:
        """Another engine with the same options but for `changes`."""
        return self._again(**changes)

    def _start(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
        if not self.unread:
            super()._start(prompts, max_new_tokens)
            return
        super()._start([prompt[-1:] for prompt in prompts], max_new_tokens)
        rows = len(prompts)
        counts = self._integers(rows).copy_(torch.tensor([len(prompt) for prompt in prompts]))
        self.ends[:rows] = counts + torch.tensor(max_new_tokens, device=self.device)
        random = torch.Generator(device=self.device).manual_seed(0)
        for cache, _ in self._readers():
            cache.cursors.lengths[:rows] = counts - 1
            cache.cursors.folded[:rows] = counts - 1
            for layer in cache.layers:
                for name, tensor in vars(layer).items():
                    if isinstance(tensor, Tensor) and name not in ("A", "slots"):
                        tensor.normal_(std=1.0 if isinstance(layer, KVCache) else 0.1, generator=random)
                        if name == "ring_dt":
                            tensor.abs_()

    @torch.no_grad()
    def restart(self, prompts: Sequence[Sequence[int]], rounds: int, seed: int = 0) -> None:
        """Be where `generate` is after these prompts; no row ends within so many rounds.

        Raises ValueError unless max_length holds the longest prompt and (rounds + 1)·(K + 1) tokens.
        """
        room = (rounds + 1) * (self.k + 1)
        limits = self.check(prompts, room)
        self._warm_up()
        self._start(prompts, limits)
        self.random.manual_seed(seed)

    @torch.no_grad()
    def time_rounds(self, prompts: Sequence[Sequence[int]], rounds: int, repeats: int) -> tuple[Spread, float]:
        """Milliseconds per round, back to back as `generate` runs them, and tokens that a row got per round.

        Every repeat starts anew after the prompts (see `restart`); one more before them warms up.
        """
        spans, tokens = [], 0
        lengths = self.cache.cursors.lengths
        for repeat in range(repeats + 1):
            self.restart(prompts, rounds, seed=repeat)
            before = int(lengths.sum())
            began = self._now()
            for _ in range(rounds):
                self.round()
            spans.append((self._now() - began) / rounds * 1e3)
            tokens += int(lengths.sum()) - before if repeat else 0
        return Spread.of(spans[1:]), tokens / (repeats * rounds * len(prompts))


def require(engine: TimedEngine, prompts: Sequence[Sequence[int]]) -> None:
    """Raise RefusedError unless the engine may be timed.

    Decode's logits must be those of the full forward; replies under a graph must be those without one, token for token;
    and what speculation says greedily must be what plain decoding says, up to near-ties (`hybrid.ties`).
    """
    error, tolerance = logits_error(engine.model, prompts[0]), LOGITS_TOLERANCE[engine.model.dtype]
    if not error <= tolerance:  # so that NaN is refused
        raise RefusedError(f"wrong: decode's logits differ from forward's by {error:.1e} > {tolerance:.0e}")
    if engine.graphs:
        eager = engine.twin(graphs=False).generate(prompts, GATE_TOKENS).replies
        different = sum(a != b for a, b in zip(engine.generate(prompts, GATE_TOKENS).replies, eager, strict=True))
        if different:
            raise RefusedError(f"wrong: graph and eager differ in {different} of {len(prompts)} replies")
    if engine.k and engine.sampling.greedy:
        plain = engine.twin(graphs=False, make_draft=None, k=0, injected=None).generate(prompts, GATE_TOKENS).replies
        found = engine.twin(graphs=False, injected=None).generate(prompts, GATE_TOKENS).replies
        require_identity(agreements(engine.model, prompts, plain, found))


def require_identity(counts: dict[Agreement, int]) -> None:
    """Raise RefusedError if a reply is wrong."""
    if counts["wrong"]:
        raise RefusedError(
            f"wrong: {counts['wrong']} of {sum(counts.values())} replies are not those of plain greedy decoding"
        )


@torch.no_grad()
def logits_error(model: HybridForCausalLM, prompt: Sequence[int]) -> float:
    """Relative Frobenius error of decode's logits after a prompt against those of the full forward."""
    tokens = torch.tensor([list(prompt)], device=model.device)
    cache = model.new_cache(1, len(prompt))
    if len(prompt) > 1:
        model.hidden(tokens[:, :-1], cache=cache)
    found = model.decode(tokens[:, -1:], cache, torch.zeros(1, dtype=torch.int32, device=model.device))
    expected = last_logits(model, tokens).double()
    return float((found[0].double() - expected).norm() / expected.norm())


def agreements(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> dict[Agreement, int]:
    """How many replies are exact, differ first at a near-tie, and are wrong; see `hybrid.ties`."""
    verdicts = [compare(model, *row)[0] for row in zip(prompts, expected, found, strict=True)]
    return {verdict: verdicts.count(verdict) for verdict in ("exact", "near_tie", "wrong")}


def free() -> None:
    """Give the last row's buffers and graphs back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
