"""Decoding for any batch of unequal prompts: prefill once, then rounds of fixed shape that no host waits for.

A round proposes up to K tokens per row with the draft, reads them and the last known token with the model, keeps the
longest prefix that the model agrees with plus one token of the model's own (Leviathan et al., 2211.17192, Algorithm 1),
and advances the rows' cursors. Without a draft K is 0 and a round is one step of plain decoding: the same code, the
same kernels, so that a speed-up compares like with like. On CUDA a round is one graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.cache import HybridCache
from hybrid.drafts import Draft
from hybrid.model import HybridForCausalLM
from kernels_ext import dispatch

PREFILL_TOKENS = 65536
"""Prompts are read in pieces of about so many tokens, padding included."""
POLL_ROUNDS = {"cuda": 16}
"""Rounds between looks at whether all rows have ended, by device type: each look waits for the device. Elsewhere 1."""

Callback = Callable[[Tensor], Collection[int] | None]
"""Takes what a round added, (B, K + 1) int32 padded with −1; gives rows that are to end here, if any."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary.

    The distribution is that of the top_k tokens, then of the smallest set of mass ≥ top_p, both after the temperature.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class SpeculationStats:
    """Counts of one prompt's decoding.

    proposed, accepted: by draft position; a position is accepted only if those before it are. rounds: calls of the
    model after the prompt was read. tokens: that came out of them.
    """

    proposed: list[int]
    accepted: list[int]
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Generated:
    """replies: without prompts, with the end-of-turn token where one came. Seconds end when the device is done."""

    replies: list[list[int]]
    stats: list[SpeculationStats]
    prefill_seconds: float
    decode_seconds: float


class DecodeEngine:
    """Fixed buffers and, on CUDA, a captured graph for decoding up to `batch` prompts at once with one model.

    max_length: tokens of the longest prompt and its reply together.
    draft, k: who proposes and how many tokens a round. graphs: None captures on CUDA. ring: slots of the SSM ring, None
    picks. state_dtype: of the SSM states. injected: accept proposals with this probability whatever the model says, to
    time shapes without trained weights; what comes out is not the model's text.

    Raises ValueError for a draft of another vocabulary, or a ring shorter than two windows.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        batch: int,
        max_length: int,
        draft: Draft | None = None,
        k: int = 0,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        graphs: bool | None = None,
        ring: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        injected: float | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch and max_length must be at least 1, got {batch} and {max_length}")
        if (k > 0) != (draft is not None):
            raise ValueError(f"k is {k} and draft is {draft}: a draft needs k ≥ 1, plain decoding has neither")
        if injected is not None and not 0.0 <= injected <= 1.0:
            raise ValueError(f"injected acceptance must be between 0 and 1, got {injected}")
        self.model, self.draft, self.k = model, draft, k
        self.batch, self.max_length = batch, max_length
        self.device = model.device
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        window = k + 1
        # The last window of a row may reach past the row's end; what it reads there is never kept.
        self.cache = model.new_cache(batch, max_length + window, window=window, ring=ring, state_dtype=state_dtype)
        stop = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
        self.stop = self._integers(len(stop)).copy_(torch.tensor(list(stop), dtype=torch.int32))
        self.text = self._integers(batch, max_length + window)
        self.tokens = self._integers(batch, window)
        """The round's window: the last known token, then the proposals."""
        self.features = torch.zeros(batch, model.config.d_model, dtype=model.dtype, device=self.device)
        """The model's residual stream after its last block, at the token before the last known one."""
        self.slots = self._integers(batch).fill_(-1)
        self.ends, self.counts = self._integers(batch), self._integers(batch)
        self.emitted = self._integers(batch, window)
        self.n_draft, self.rounds = self._integers(batch), self._integers(batch)
        self.proposed, self.accepted = self._integers(batch, k), self._integers(batch, k)
        self.uniforms = torch.zeros(batch, 2 * k + 1, device=self.device)
        """K to sample proposals with, K to accept them with, one for the model's own token."""
        self.injected = None if injected is None else torch.full((k,), injected, device=self.device)
        self.random = torch.Generator(device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: list[int] = []
        self._q: Tensor | None = None
        self._residual = self._logits = torch.empty(0)
        self._wants_features = False
        self._choose(sampling or Sampling())
        if draft is not None:
            draft.allocate(self)
            self._wants_features = any(m.config.reads_features for _, m in draft.readers())

    def _choose(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # Sampling searches the vocabulary several times, and what rounding does to a draw is nothing to a distribution.
        self.logits_dtype = torch.float32 if sampling.greedy else self.model.dtype
        self._graph = None  # its temperature is a constant

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        callback: Callback | None = None,
    ) -> Generated:
        """Replies of at most max_new_tokens tokens, one number or one for each, to at most `batch` prompts.

        Greedy replies do not depend on the rest of the batch nor, up to rounding, on the draft. sampling: from this
        call on, None as before; another one is captured anew on CUDA. callback gets what each round added, (B, K + 1)
        int32 padded with −1, gives rows that are to end with what they have, and makes every round wait for the device.
        Raises ValueError for prompts that do not fit, and for empty ones.
        """
        limits = self.check(prompts, max_new_tokens)
        if sampling is not None and sampling != self.sampling:
            self._choose(sampling)
        self._warm_up()
        started = self._now()
        self._start(prompts, max_new_tokens)
        self.random.manual_seed(seed)
        prefilled = self._now()
        every = 1 if callback is not None else POLL_ROUNDS.get(self.device.type, 1)
        for done in range(1, max(limits) + 1):
            self.round()
            if callback is not None and (ended := callback(self.emitted[: len(prompts)].clone())):
                self.slots[list(ended)] = -1
            if done % every == 0 and bool((self.slots < 0).all()):
                break
        finished = self._now()
        lengths = self.cache.cursors.lengths.tolist()
        text = self.text[: len(prompts)].tolist()
        replies = [text[row][len(p) : lengths[row] + 1] for row, p in enumerate(prompts)]
        return Generated(replies, self._stats(replies), prefilled - started, finished - prefilled)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> list[int]:
        """max_new_tokens of each prompt; ValueError if these prompts cannot be decoded with this engine."""
        if not prompts or any(not len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token")
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(limits) != len(prompts) or min(limits) < 1:
            raise ValueError(
                f"max_new_tokens must be at least 1, one number or one for each prompt, got {max_new_tokens}"
            )
        if len(prompts) > self.batch:
            raise ValueError(f"{len(prompts)} prompts, but the engine has {self.batch} slots: raise `batch`")
        needed, asked, length = max((len(p) + n, n, len(p)) for p, n in zip(prompts, limits, strict=True))
        if needed > self.max_length:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens {asked} need a cache of "
                f"{needed} tokens, but the engine has {self.max_length}: raise `max_length`"
            )
        return limits

    def round(self) -> None:
        """One round for all rows that have not ended. Does not wait for the device."""
        if not self.sampling.greedy or self.injected is not None:
            self.uniforms.uniform_(generator=self.random)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._round()

    def _round(self) -> None:
        self._propose()
        self._verify()
        self._accept()

    def _propose(self) -> None:
        if self.draft is not None:
            self._q = self.draft.propose(self)

    def _verify(self) -> None:
        self._residual = self.model.read(self.tokens, self.cache, self.slots)
        self._logits = self.model.logits(self._residual, self.logits_dtype)

    def _accept(self) -> None:
        draft, logits, sampling = self.tokens[:, 1:], self._logits, self.sampling
        shape = (self.batch, self.k + 1)
        if self.injected is not None:
            chosen = dispatch.greedy(logits).view(shape)
            accepted, following = dispatch.accept_injected(
                chosen, draft, self.n_draft, self.uniforms[:, self.k :], self.injected
            )
        elif sampling.greedy:
            accepted, following = dispatch.accept_greedy(dispatch.greedy(logits).view(shape), draft, self.n_draft)
        elif self.k == 0:
            following = dispatch.sample(
                logits, self.uniforms[:, 0], sampling.temperature, sampling.top_k, sampling.top_p
            )
            accepted = torch.zeros_like(following)
        else:
            p = dispatch.filtered_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            accepted, following = dispatch.accept_sampled(
                p.view(*shape, -1), self._q, draft, self.n_draft, self.uniforms[:, self.k :]
            )
        dispatch.advance(
            accepted,
            following,
            draft,
            self.text,
            self.cache.cursors.lengths,
            self.cache.cursors.folded,
            self.slots,
            self.ends,
            self.stop,
            self.cache.window,
            self.cache.ring,
            self.emitted,
            self.counts,
            self.n_draft,
            self.proposed,
            self.accepted,
            self.rounds,
        )
        self.tokens[:, 0].copy_(following)
        if self._wants_features:
            kept = accepted.clamp(0, self.k).long()[:, None, None].expand(-1, 1, self.features.shape[1])
            self.features.copy_(self._residual.view(*shape, -1).gather(1, kept)[:, 0])

    def _warm_up(self) -> None:
        """Compile and capture the round, once for as long as the weights lie where they do: a graph reads addresses.
        With all rows inert a round changes nothing."""
        if not self.graphs:
            return
        models = [model for _, model in self._readers()]
        addresses = [p.data_ptr() for model in models for p in model.parameters()]
        if self._graph is None or addresses != self._addresses:
            self.slots.fill_(-1)
            self._graph = _captured(self._round)
            self._addresses = [p.data_ptr() for model in models for p in model.parameters()]

    def _start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> None:
        """Read all prompts but their last tokens, which the first round reads."""
        tokens, counts = right_pad(prompts, self.device)
        rows = len(prompts)
        self.text[:rows, : tokens.shape[1]] = tokens
        self.tokens[:rows, 0] = tokens.gather(1, counts[:, None] - 1)[:, 0]
        self.ends[:rows] = counts + torch.tensor(max_new_tokens, device=self.device)
        for tally in (self.rounds, self.proposed, self.accepted):
            tally.zero_()
        features: Tensor | None = None
        for cache, model in self._readers():
            cache.reset(model)
            own = model is self.model
            given = _prefill(
                model, cache, tokens[:, :-1], counts - 1, None if own else features, own and self._wants_features
            )
            if given is not None:
                # One place later: what a token is read with is of the token before it, and zero at the start.
                given = torch.nn.functional.pad(given, (0, 0, 1, 0))
                last = (counts - 1)[:, None, None].expand(-1, 1, given.shape[2])
                self.features[:rows] = given.gather(1, last)[:, 0]
                features = given[:, :-1]
        self.slots.fill_(-1)
        self.slots[:rows] = torch.arange(rows, dtype=torch.int32, device=self.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _stats(self, replies: Sequence[Sequence[int]]) -> list[SpeculationStats]:
        proposed, accepted, rounds = (t.tolist() for t in (self.proposed, self.accepted, self.rounds))
        return [
            SpeculationStats(proposed[row], accepted[row], rounds[row], len(reply)) for row, reply in enumerate(replies)
        ]

    @torch.no_grad()
    def phase_milliseconds(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int = 20
    ) -> dict[str, float]:
        """Milliseconds of one round and of its parts, medians, each timed by itself: draft, verify, accept, round.

        The text that `generate` left is overwritten. Parts run without advancing a cursor except `round`, which
        therefore decodes up to `repeats` · (K + 1) tokens of max_new_tokens.
        """
        self.check(prompts, max_new_tokens)
        self._warm_up()
        self._start(prompts, max_new_tokens)
        live = self.slots.clone()
        parts: dict[str, Callable[[], None]] = {"draft": self._propose, "verify": self._verify, "accept": self._accept}
        if self.draft is None:
            del parts["draft"]
        if self.graphs:
            self.slots.fill_(-1)
            graphs = {name: _captured(part) for name, part in parts.items()}
            self.slots.copy_(live)
            parts = {name: graph.replay for name, graph in graphs.items()}
        timed = {"draft": 0.0}
        for name, part in parts.items():
            if name == "accept":  # an inert row costs a verdict as much as a live one, and nothing is spent
                self.slots.fill_(-1)
            timed[name] = self._milliseconds(part, repeats)
        self._start(prompts, max_new_tokens)
        timed["round"] = self._milliseconds(self.round, repeats)
        return timed

    def _milliseconds(self, call: Callable[[], None], repeats: int) -> float:
        call()
        spans = []
        for _ in range(repeats):
            began = self._now()
            call()
            spans.append((self._now() - began) * 1e3)
        return statistics.median(spans)

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of state held, by kind, the draft's included."""
        held = [cache.bytes() for cache, _ in self._readers()]
        return {kind: sum(sizes[kind] for sizes in held) for kind in held[0]}

    def _readers(self) -> list[tuple[HybridCache, HybridForCausalLM]]:
        """Caches and the models that fill them: the engine's own first, then the draft's."""
        return [(self.cache, self.model), *([] if self.draft is None else self.draft.readers())]


def _captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `call`, which is run twice before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _prefill(
    model: HybridForCausalLM,
    cache: HybridCache,
    tokens: Tensor,
    counts: Tensor,
    features: Tensor | None = None,
    keep: bool = False,
) -> Tensor | None:
    """Append counts (B,) tokens of each row of tokens (B, L) to the cache's first rows, piece by piece.

    features (B, L, d_model): of a draft that reads them. keep: give the residual stream after the last block,
    (B, L, d_model).
    """
    kept = tokens.new_zeros(*tokens.shape, model.config.d_model, dtype=model.dtype) if keep else None
    length = int(counts.max())
    if length == 0:
        return kept
    if not model.config.reads_features:
        features = None
    rows = max(1, PREFILL_TOKENS // length)
    for start in range(0, tokens.shape[0], rows):
        stop = min(start + rows, tokens.shape[0])
        view = cache.rows(start, stop)
        for column in range(0, length, PREFILL_TOKENS):
            part = tokens[start:stop, column : column + PREFILL_TOKENS]
            given = None if features is None else features[start:stop, column : column + PREFILL_TOKENS]
            part_counts = (counts[start:stop] - column).clamp(0, part.shape[1])
            x = model.residual(part, cache=view, counts=part_counts, features=given)
            if kept is not None:
                kept[start:stop, column : column + PREFILL_TOKENS] = x
    cache.fresh = False
    return kept


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(B, L) tokens, padded on the right with 0, and their counts (B,)."""
    counts = torch.tensor([len(r) for r in rows], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return padded.to(device), counts
