"""Decoding for any batch of unequal prompts: each is read once, then rounds of fixed shape that no host waits for.

A round proposes up to K tokens per row with the draft, reads them and the last known token with the model, keeps the
longest prefix that the model agrees with plus one token of the model's own (Leviathan et al., 2211.17192, Algorithm 1),
and advances the rows' cursors. Without a draft K is 0 and a round is one step of plain decoding: the same code, the
same kernels, so that a speed-up compares like with like. On CUDA a round is one graph. Rows end when they do: a slot
whose row has ended can take the next prompt while the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid import prefill
from hybrid.cache import HybridCache
from hybrid.drafts import Draft
from hybrid.model import HybridForCausalLM
from hybrid.prefill import PromptReader, Prompts, captured
from kernels_ext import dispatch

LOOK_BACK = 2
"""Rounds after which the host learns on CUDA that a row has ended, so that neither it nor the device waits."""
REFILLED = 8
"""New prompts are read when this part of the slots is free: meanwhile the other rows wait."""

Callback = Callable[[Tensor], Collection[int] | None]
"""Takes what a round added, (B, K + 1) int32 on the host padded with −1; gives rows that are to end here, if any."""


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

    `generate` and `generate_all` decode prompts that are known; who gets them one after another calls `begin`, and then
    `admit`, `round`, `look` and `end` as they come and go.

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
        self._outcome = self._integers(batch * (1 + window))
        self.slots, self.emitted = self._outcome[:batch].fill_(-1), self._outcome[batch:].view(batch, window)
        """Side by side, so that one copy tells the host what a round did."""
        self.ends, self.counts = self._integers(batch), self._integers(batch)
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
        weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
        shape = (batch, max_length)
        self._reader = PromptReader(self._read, self.device, 2.0 * weights, shape, self.graphs)
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
        if len(prompts) > self.batch:
            raise ValueError(
                f"{len(prompts)} prompts, but the engine has {self.batch} slots: raise `batch`, or `generate_all` "
                "in turns"
            )
        return self._generate(prompts, max_new_tokens, seed, sampling, callback)

    def generate_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Generated:
        """As `generate`, for any number of prompts: in the order given, each takes the slot of one that has ended.

        What is sampled depends on the seed, the prompts and `batch`, not on how fast anything runs. progress is told
        the share of prompts that are done.
        """
        return self._generate(prompts, max_new_tokens, seed, sampling, None, progress)

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        seed: int,
        sampling: Sampling | None,
        callback: Callback | None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Generated:
        limits = self.check(prompts, max_new_tokens)
        self._prepare(sampling, seed)
        began, reading = self._now(), 0.0
        behind = LOOK_BACK if callback is None and self.device.type == "cuda" else 0
        looks: deque[Look] = deque()
        """Of the last rounds: always of so many, so that nothing depends on how fast the device is."""
        waiting = deque(range(len(prompts)))
        held: dict[int, int] = {}
        """Slot → the prompt whose reply is in it."""
        running: dict[int, int] = {}
        """Slot → the round with which its row has ended at the latest."""
        replies: dict[int, tuple[list[int], SpeculationStats]] = {}
        done = 0
        while waiting or running:
            free = [slot for slot in range(self.batch) if slot not in running] if waiting else []
            if waiting and (not running or len(free) * REFILLED >= self.batch):
                started = self._now()
                taken = {slot: waiting.popleft() for slot in free[: len(waiting)]}
                replies |= self._replies({slot: held[slot] for slot in taken if slot in held}, prompts)
                asked, room = [prompts[i] for i in taken.values()], [limits[i] for i in taken.values()]
                if held:
                    self._admit(list(taken), asked, room)
                else:
                    self._start(asked, room)
                held |= taken
                running |= {slot: done + limits[i] for slot, i in taken.items()}
                looks.clear()  # they say nothing of the rows that begin
                progress(len(replies) / len(prompts))
                reading += self._now() - started
            self.round()
            done += 1
            looks.append(self.look())
            gone: set[int] = set()
            if len(looks) > behind:
                added, gone = looks.popleft().wait()
                if callback is not None and (ended := callback(added[: len(prompts)])):
                    self.end(ended)
                    gone |= set(ended)
            running = {slot: last for slot, last in running.items() if last > done and slot not in gone}
        replies |= self._replies(held, prompts)
        progress(1.0)
        made = [replies[i] for i in range(len(prompts))]
        return Generated([r for r, _ in made], [s for _, s in made], reading, self._now() - began - reading)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> list[int]:
        """max_new_tokens of each prompt; ValueError if these prompts cannot be decoded with this engine."""
        if not prompts or any(not len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token")
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(limits) != len(prompts) or min(limits) < 1:
            raise ValueError(
                f"max_new_tokens must be at least 1, one number or one for each prompt, got {max_new_tokens}"
            )
        needed, asked, length = max((len(p) + n, n, len(p)) for p, n in zip(prompts, limits, strict=True))
        if needed > self.max_length:
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens {asked} need a cache of "
                f"{needed} tokens, but the engine has {self.max_length}: raise `max_length`"
            )
        return limits

    @torch.no_grad()
    def begin(self, sampling: Sampling | None = None, seed: int = 0) -> None:
        """Forget every row. sampling and seed are as in `generate`, for all rows that are admitted from here on."""
        self._prepare(sampling, seed)
        self._forget()

    @torch.no_grad()
    def admit(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]
    ) -> None:
        """Let rows begin in these slots between two rounds; the others go on as they would have.

        Raises ValueError for prompts that do not fit, and for slots that do not exist or whose rows have not ended.
        """
        limits = self.check(prompts, max_new_tokens)
        if len(slots) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many slots, got {list(slots)}")
        self._require_free(slots)
        self._admit(slots, prompts, limits)

    def end(self, slots: Collection[int]) -> None:
        """Let the rows in these slots end with what they have."""
        self.slots[list(slots)] = -1

    @torch.no_grad()
    def adopt(self, other: DecodeEngine, theirs: int, slot: int) -> None:
        """Go on in `slot` with the row of another engine, between rounds of both; there, in slot `theirs`, it ends.

        Raises ValueError unless the slot is free and both decode the same models, alike but for how many rows.
        """
        ours, others = self._manner(), other._manner()
        if differing := [name for name in ours if ours[name] != others[name]]:
            raise ValueError(f"a row cannot move between engines that differ in {', '.join(differing)}")
        if not 0 <= theirs < other.batch:
            raise ValueError(f"the other engine has slots 0 to {other.batch - 1}, got {theirs}")
        self._require_free([slot])
        for mine, given in zip(self._by_slot(), other._by_slot(), strict=True):
            mine[slot] = given[theirs]
        for cache, _ in self._readers():
            cache.fresh = False
        self.slots[slot] = torch.where(other.slots[theirs] < 0, -1, slot)
        other.end([theirs])

    def _manner(self) -> dict[str, object]:
        """What engines that a row moves between have in common."""
        return {
            "model": self.model,
            "draft": (type(self.draft), [model for _, model in self._readers()]),
            "k": self.k,
            "max_length": self.max_length,
            "ring": self.cache.ring,
            "state_dtype": [t.dtype for t in self._by_slot()],
            "sampling": self.sampling,
            "eos_token_ids": self.stop.tolist(),
        }

    def _by_slot(self) -> list[Tensor]:
        """All that a row is, but for whether it runs: tensors whose first dimension is the slot."""
        own = [self.text, self.tokens, self.features, self.ends, self.counts, self.n_draft]
        own += [self.rounds, self.proposed, self.accepted]
        for cache, _ in self._readers():
            own += [cache.cursors.lengths, cache.cursors.folded]
            for layer in cache.layers:
                own += [t for name, t in vars(layer).items() if isinstance(t, Tensor) and name not in ("A", "slots")]
        return own

    def _require_free(self, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or not all(0 <= slot < self.batch for slot in slots):
            raise ValueError(f"slots must be different ones of 0 to {self.batch - 1}, got {list(slots)}")
        held = self.slots.tolist()
        if running := [slot for slot in slots if held[slot] >= 0]:
            raise ValueError(f"the rows in slots {running} have not ended")

    @torch.no_grad()
    def round(self) -> None:
        """One round for all rows that have not ended. Does not wait for the device."""
        if not self.sampling.greedy or self.injected is not None:
            self.uniforms.uniform_(generator=self.random)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._round()

    def look(self) -> Look:
        """What the last round added and who has ended, copied behind it while later rounds may run."""
        return Look(self._outcome, self.batch)

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

    def _prepare(self, sampling: Sampling | None, seed: int) -> None:
        if sampling is not None and sampling != self.sampling:
            self._choose(sampling)
        self._warm_up()
        self.random.manual_seed(seed)

    def _warm_up(self) -> None:
        """Compile and capture the round, once for as long as the weights lie where they do: a graph reads addresses.
        With all rows inert a round changes nothing."""
        if not self.graphs:
            return
        models = [model for _, model in self._readers()]
        addresses = [p.data_ptr() for model in models for p in model.parameters()]
        if addresses != self._addresses:
            self._reader.forget()
        if self._graph is None or addresses != self._addresses:
            self.slots.fill_(-1)
            self._graph = captured(self._round)
            self._addresses = [p.data_ptr() for model in models for p in model.parameters()]

    def _start(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
        """Forget everything, and be ready for the first round after these prompts, which take the first slots."""
        self._forget()
        self._admit(range(len(prompts)), prompts, max_new_tokens)

    def _forget(self) -> None:
        self.slots.fill_(-1)
        for cache, model in self._readers():
            cache.reset(model)

    def _admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
        """Let rows begin in these slots, whatever was in them, and leave the others as they are."""
        for piece in prefill.pieces([len(p) for p in prompts]):
            self._reader(Prompts.of(prompts[piece], max_new_tokens[piece], slots[piece]))

    def _read(self, prompts: Prompts) -> None:
        """Read all of these but their last tokens, which the next round reads."""
        tokens, counts, slots = prompts.tokens, prompts.counts, prompts.slots
        self.text[slots, : tokens.shape[1]] = tokens.int()
        self.tokens[slots, 0] = tokens.gather(1, counts[:, None] - 1)[:, 0].int()
        self.ends[slots] = prompts.ends.int()
        for tally in (self.rounds, self.proposed, self.accepted):
            tally.index_fill_(0, slots, 0)  # a graph takes no number from the host
        features: Tensor | None = None
        for cache, model in self._readers():
            opened, own = cache.opened(slots), model is self.model
            given = prefill.read(
                model, opened, tokens[:, :-1], counts - 1, None if own else features, own and self._wants_features
            )
            cache.keep(opened, slots)
            if given is not None:
                # One place later: what a token is read with is of the token before it, and zero at the start.
                given = torch.nn.functional.pad(given, (0, 0, 1, 0))
                last = (counts - 1)[:, None, None].expand(-1, 1, given.shape[2])
                self.features[slots] = given.gather(1, last)[:, 0]
                features = given[:, :-1]
        self.slots[slots] = slots.int()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _replies(
        self, held: Mapping[int, int], prompts: Sequence[Sequence[int]]
    ) -> dict[int, tuple[list[int], SpeculationStats]]:
        """Prompt → its reply and counts, of the prompts whose slots these are."""
        if not held:
            return {}
        slots = torch.tensor(list(held), device=self.device)
        kept = (self.text, self.cache.cursors.lengths, self.proposed, self.accepted, self.rounds)
        found: dict[int, tuple[list[int], SpeculationStats]] = {}
        for i, text, length, proposed, accepted, rounds in zip(
            held.values(), *(t[slots].tolist() for t in kept), strict=True
        ):
            reply = text[len(prompts[i]) : length + 1]
            found[i] = reply, SpeculationStats(proposed, accepted, rounds, len(reply))
        return found

    @torch.no_grad()
    def phase_milliseconds(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int = 20
    ) -> dict[str, float]:
        """Milliseconds of one round and of its parts, medians, each timed by itself: draft, verify, accept, round.

        The text that `generate` left is overwritten. Parts run without advancing a cursor except `round`, which
        therefore decodes up to `repeats` · (K + 1) tokens of max_new_tokens.
        """
        limits = self.check(prompts, max_new_tokens)
        self._warm_up()
        self._start(prompts, limits)
        live = self.slots.clone()
        parts: dict[str, Callable[[], None]] = {"draft": self._propose, "verify": self._verify, "accept": self._accept}
        if self.draft is None:
            del parts["draft"]
        if self.graphs:
            self.slots.fill_(-1)
            graphs = {name: captured(part) for name, part in parts.items()}
            self.slots.copy_(live)
            parts = {name: graph.replay for name, graph in graphs.items()}
        timed = {"draft": 0.0}
        for name, part in parts.items():
            if name == "accept":  # an inert row costs a verdict as much as a live one, and nothing is spent
                self.slots.fill_(-1)
            timed[name] = self._milliseconds(part, repeats)
        self._start(prompts, limits)
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


class Look:
    """What a round added and whose rows had ended after it, on its way to the host.

    outcome (B·(K + 2),) int32: the B rows' slots, −1 where they are inert, then what was added to each.
    """

    def __init__(self, outcome: Tensor, batch: int) -> None:
        self.batch = batch
        self._event: torch.cuda.Event | None = None
        self._copy = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=outcome.is_cuda)
        self._copy.copy_(outcome, non_blocking=True)
        if outcome.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, set[int]]:
        """What was added, (B, K + 1) int32 on the host padded with −1, and the rows that were inert afterwards."""
        if self._event is not None:
            self._event.synchronize()
        slots, added = self._copy[: self.batch], self._copy[self.batch :].view(self.batch, -1)
        return added, set((slots < 0).nonzero().flatten().tolist())
