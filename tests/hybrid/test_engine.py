"""Speculation gives what plain decoding gives, whatever is proposed; requests that cannot be served are refused.

Where there is a GPU all this runs there, with the kernels and in graphs.
"""

from __future__ import annotations

import functools

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.drafts import ModelDraft, NGramDraft
from hybrid.engine import DecodeEngine, Sampling
from hybrid.generate import generate
from kernels_ext import dispatch
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import VOCAB, prompts
from tests.kernels_ext.interpreted import interpreted

PROMPTS = prompts(9, 1, 22)
COUNT = 14
LENGTH = 64
GREEDY = Sampling()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(seed: int = 0, **changes) -> HybridForCausalLM:
    return tiny_hybrid.model(seed, **changes).to(DEVICE)


class Scripted:
    """Knows the rows' whole texts and proposes them, each token with probability `mistakes` another one."""

    def __init__(self, texts: list[list[int]], mistakes: float, seed: int = 0) -> None:
        longest = max(len(t) for t in texts) + 16
        self.texts = torch.tensor([t + [0] * (longest - len(t)) for t in texts], device=DEVICE)
        self.known = torch.tensor([len(t) for t in texts], device=DEVICE)
        self.mistakes = mistakes
        self.draws = torch.rand(997, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def allocate(self, engine: DecodeEngine) -> None: ...

    def readers(self) -> list:
        return []

    def draw(self, key: Tensor) -> Tensor:
        """A number in [0, 1) that depends on the key alone: a graph replays no generator on the host."""
        return self.draws[key % len(self.draws)]

    def propose(self, engine: DecodeEngine) -> None:
        rows, lengths = len(self.texts), engine.cache.cursors.lengths[: len(self.texts)].long()
        places = lengths[:, None] + 1 + torch.arange(engine.k, device=DEVICE)
        index = places.clamp(max=self.texts.shape[1] - 1)
        wrong = self.draw(31 * places + 7 * lengths[:, None]) < self.mistakes
        engine.tokens[:rows, 1:] = (self.texts.gather(1, index) + wrong) % VOCAB
        engine.n_draft[:rows] = (self.known - lengths - 1).clamp(0, engine.k)


class Wavering(Scripted):
    """Proposes a random number of tokens as well."""

    def propose(self, engine: DecodeEngine) -> None:
        super().propose(engine)
        engine.n_draft.copy_((self.draw(13 * engine.cache.cursors.lengths) * (engine.n_draft + 1)).int())


MODELS = {
    "hybrid": {},
    "mamba-2": {"attention_layers": ()},
    "rotary mamba-2": {"attention_layers": (1,), "mixer_rope": True},
    "mamba-2 with windows": {"attention_layers": (1,), "mixer_rope": True, "mixer_window": 4},
    "mamba-2 without shared x and B": {"attention_layers": (1,), "ngroups": 6},
    "attention": {"attention_layers": (0, 1, 2, 3)},
    "mamba-1": {"attention_layers": (), "mixer": "mamba1", "d_state": 4},
    "hybrid of mamba-1": {"mixer": "mamba1", "d_state": 4},
}
DRAFTS = {
    "always right": lambda model, texts: Scripted(texts, 0.0),
    "always wrong": lambda model, texts: Scripted(texts, 1.0),
    "half right": lambda model, texts: Wavering(texts, 0.5),
    "n-gram": lambda model, texts: NGramDraft(2),
    "the model itself": lambda model, texts: ModelDraft(model),
    "another model": lambda model, texts: ModelDraft(build(5)),
    "a reader of features": lambda model, texts: ModelDraft(build(5, reads_features=True)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> HybridForCausalLM:
    return build(**MODELS[request.param])


@pytest.fixture(scope="module")
def hybrid() -> HybridForCausalLM:
    return build()


def plain(model: HybridForCausalLM, count: int = COUNT) -> list[list[int]]:
    return generate(model, PROMPTS, count, eos_token_ids=())


def test_plain_decoding_is_the_definition(model):
    assert plain(model) == [tiny_hybrid.greedy(model, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)], ids=["one", "three"])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_speculation_is_greedy(model, draft, k, rows):
    wanted = [plain(model, COUNT + 12)[row] for row in rows]
    chosen = [PROMPTS[row] for row in rows]
    texts = [prompt + reply for prompt, reply in zip(chosen, wanted, strict=True)]
    engine = DecodeEngine(
        model, batch=len(rows), max_length=LENGTH, draft=DRAFTS[draft](model, texts), k=k, eos_token_ids=()
    )
    result = engine.generate(chosen, COUNT)
    assert result.replies == [reply[:COUNT] for reply in wanted]
    for row in result.stats:
        assert row.tokens == COUNT and len(row.proposed) == len(row.accepted) == k
        assert row.rounds >= -(-COUNT // (k + 1)), "a round gives at most K + 1 tokens"
        assert row.proposed[0] <= row.rounds
        assert all(a <= p for a, p in zip(row.accepted, row.proposed, strict=True))
        assert row.accepted == sorted(row.accepted, reverse=True)
        if draft in ("always right", "the model itself"):
            assert row.rounds == -(-COUNT // (k + 1))
        if draft == "always wrong":
            assert row.rounds == COUNT and sum(row.accepted) == 0


class Noting(ModelDraft):
    """Keeps where each round began and what was proposed first."""

    def propose(self, engine: DecodeEngine) -> Tensor | None:
        drawn = super().propose(engine)
        self.seen.append((engine.cache.cursors.lengths.tolist(), engine.tokens[:, 1].tolist()))
        return drawn


@pytest.mark.parametrize("k", [1, 3])
def test_a_draft_reads_the_models_features(model, k):
    """While nothing is accepted, the first proposal of a round is what the draft says after the whole text, read with
    the model's residual stream one token earlier. A prompt of one token has none before it."""
    draft = Noting(build(5, reads_features=True))
    draft.seen = []
    prompts = [*PROMPTS, [3]]
    engine = DecodeEngine(model, batch=4, max_length=LENGTH, draft=draft, k=k, eos_token_ids=(), graphs=False)
    texts = [p + r for p, r in zip(prompts, engine.generate(prompts, COUNT).replies, strict=True)]
    checked, untouched = 0, set(range(4))
    for begin, proposals in draft.seen:
        for row in list(untouched):
            text, count = texts[row], begin[row] + 1
            if count >= len(text):
                untouched.discard(row)
                continue
            tokens = torch.tensor([text[:count]], device=model.device)
            features = torch.nn.functional.pad(model.residual(tokens), (0, 0, 1, 0))[:, :-1]
            said = draft.model.logits(draft.model.residual(tokens, features=features)[0, -1:])
            assert int(said.argmax()) == proposals[row]
            checked += 1
            if text[count] == proposals[row]:
                untouched.discard(row)
    assert checked >= 2 * COUNT


def test_long_texts_go_round_the_ring(hybrid):
    """Over sixty rounds, each row accepting its own number of tokens, on slots that were used before."""
    wanted = generate(hybrid, PROMPTS, 150, eos_token_ids=())
    texts = [prompt + reply for prompt, reply in zip(PROMPTS, wanted, strict=True)]
    engine = DecodeEngine(hybrid, batch=4, max_length=180, draft=Wavering(texts, 0.4), k=3, ring=8, eos_token_ids=())
    for _ in range(2):
        result = engine.generate(PROMPTS, 150)
        assert result.replies == wanted
        assert min(row.rounds for row in result.stats) > 64
        assert len({tuple(row.accepted) for row in result.stats}) > 1


@pytest.mark.parametrize("draft", ["always right", "half right", "the model itself"])
@pytest.mark.parametrize("at", range(7))
def test_end_of_turn_inside_the_window(hybrid, draft, at):
    """Each row has its own place to stop, before, in and after the first windows of six."""
    whole = plain(hybrid, COUNT + 8)
    stop = [whole[0][at], whole[2][at // 2]]
    wanted = generate(hybrid, PROMPTS, COUNT, eos_token_ids=stop)
    texts = [prompt + reply for prompt, reply in zip(PROMPTS, whole, strict=True)]
    engine = DecodeEngine(
        hybrid, batch=3, max_length=LENGTH, draft=DRAFTS[draft](hybrid, texts), k=5, eos_token_ids=stop
    )
    assert len(wanted[0]) <= at + 1
    assert engine.generate(PROMPTS, COUNT).replies == wanted


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("draft", ["always right", "always wrong"])
def test_not_one_token_too_many(hybrid, draft, count):
    whole = plain(hybrid, COUNT + 8)
    texts = [prompt + reply for prompt, reply in zip(PROMPTS, whole, strict=True)]
    engine = DecodeEngine(
        hybrid, batch=3, max_length=22 + count, draft=DRAFTS[draft](hybrid, texts), k=5, eos_token_ids=()
    )
    assert engine.generate(PROMPTS, count).replies == [reply[:count] for reply in whole]


def test_what_a_round_gives_is_streamed(hybrid):
    rounds: list[Tensor] = []
    engine = DecodeEngine(hybrid, batch=4, max_length=LENGTH, draft=ModelDraft(hybrid), k=3, eos_token_ids=())
    result = engine.generate(PROMPTS, 10, callback=rounds.append)
    assert [t.shape for t in rounds] == [(3, 4)] * 3
    streamed = [[t for step in rounds for t in step[row].tolist() if t >= 0] for row in range(3)]
    assert streamed == result.replies == plain(hybrid, 10)


@pytest.mark.parametrize("k", [0, 3])
def test_a_callback_ends_rows_and_no_other(hybrid, k):
    """Row 1 ends after five tokens or the round that brings them; when all have ended, nothing more is decoded."""
    wanted, counts = plain(hybrid), [0, 0, 0]
    engine = DecodeEngine(
        hybrid, batch=4, max_length=LENGTH, draft=ModelDraft(hybrid) if k else None, k=k, eos_token_ids=()
    )

    def look(tokens: Tensor) -> list[int]:
        for row, new in enumerate((tokens >= 0).sum(dim=1).tolist()):
            counts[row] += new
        return [1] if counts[1] >= 5 else []

    replies = engine.generate(PROMPTS, COUNT, callback=look).replies
    assert replies == [wanted[0], wanted[1][: 8 if k else 5], wanted[2]]
    assert engine.generate(PROMPTS, COUNT).replies == wanted, "and leaves no trace"
    assert len(engine.generate(PROMPTS, COUNT, callback=lambda tokens: [0, 1, 2]).replies[0]) == k + 1


@pytest.mark.parametrize("k", [0, 5])
def test_each_row_has_its_own_limit(hybrid, k):
    limits = [3, 14, 1]
    engine = DecodeEngine(
        hybrid, batch=3, max_length=23, draft=ModelDraft(hybrid) if k else None, k=k, eos_token_ids=()
    )
    assert engine.generate(PROMPTS, limits).replies == [r[:n] for r, n in zip(plain(hybrid), limits, strict=True)]


def test_sampling_may_change_between_calls(hybrid):
    """On a GPU that is another graph."""
    hot, seen = Sampling(1.5, 0, 0.95), []
    engine = DecodeEngine(hybrid, batch=3, max_length=LENGTH, draft=NGramDraft(), k=2, eos_token_ids=())
    other = DecodeEngine(hybrid, batch=3, max_length=LENGTH, draft=NGramDraft(), k=2, sampling=hot, eos_token_ids=())
    for sampling in (None, hot, None, Sampling()):
        seen.append(engine.generate(PROMPTS, COUNT, seed=3, sampling=sampling).replies)
    assert seen[0] == seen[3] == plain(hybrid)
    assert seen[1] == seen[2] == other.generate(PROMPTS, COUNT, seed=3).replies != seen[0]


@pytest.mark.parametrize("reads_features", [False, True])
def test_sampled_speculation_follows_the_models_distribution(reads_features):
    """The first two tokens of 3000 replies, against the distribution itself; draft and model differ."""
    changes = {"vocab_size": 5, "n_layers": 2, "attention_layers": (1,)}
    model, other = build(0, **changes), build(1, **changes, reads_features=reads_features)
    sampling, rows, prompt = Sampling(temperature=1.5, top_k=4), 500, [3, 1, 4]
    engine = DecodeEngine(
        model, batch=rows, max_length=8, draft=ModelDraft(other), k=2, sampling=sampling, eos_token_ids=()
    )
    pairs = torch.zeros(5, 5)
    for seed in range(6):
        for reply in engine.generate([prompt] * rows, 3, seed=seed).replies:
            pairs[reply[0], reply[1]] += 1

    def distribution(text: list[int]) -> Tensor:
        logits = model(torch.tensor([text], device=DEVICE))[0, -1].cpu() / sampling.temperature
        return logits.masked_fill(logits < logits.topk(4).values[-1], float("-inf")).softmax(0)

    first = distribution(prompt)
    expected = torch.stack([first[a] * distribution([*prompt, a]) for a in range(5)]) * pairs.sum()
    possible = expected > 0
    assert pairs[~possible].sum() == 0
    assert chisquare(pairs[possible].numpy(), expected[possible].double().numpy() * 1.0, sum_check=False).pvalue > 1e-3
    assert any(row.accepted[0] < row.proposed[0] for row in engine.generate([prompt] * rows, 3).stats)


def test_a_seed_decides_sampled_speculation(hybrid):
    engine = DecodeEngine(
        hybrid, batch=3, max_length=LENGTH, draft=NGramDraft(), k=3, sampling=Sampling(1.0, 0, 0.9), eos_token_ids=()
    )
    first = engine.generate(PROMPTS, 20, seed=1).replies
    assert engine.generate(PROMPTS, 20, seed=1).replies == first
    assert engine.generate(PROMPTS, 20, seed=2).replies != first


def test_injected_acceptance_is_what_was_asked_for(hybrid):
    engine = DecodeEngine(
        hybrid, batch=16, max_length=140, draft=ModelDraft(build(3)), k=4, injected=0.7, eos_token_ids=()
    )
    stats = engine.generate(prompts(*range(1, 17)), 120, seed=5).stats
    accepted, proposed = (sum(getattr(row, name)[0] for row in stats) for name in ("accepted", "proposed"))
    assert 0.6 < accepted / proposed < 0.8
    reached = sum(row.accepted[1] for row in stats) / accepted
    assert 0.6 < reached < 0.8, "each position by itself"


def test_fewer_prompts_than_slots(hybrid):
    engine = DecodeEngine(hybrid, batch=5, max_length=LENGTH, draft=NGramDraft(), k=2, eos_token_ids=())
    assert engine.generate(PROMPTS[:2], COUNT).replies == plain(hybrid)[:2]
    assert engine.generate(PROMPTS, COUNT).replies == plain(hybrid)


MANY = prompts(9, 1, 22, 4, 17, 3, 2, 12, 1, 30, 6)
LIMITS = [14, 3, 9, 1, 14, 6, 11, 2, 14, 5, 8]


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("reads_features", [False, True])
def test_slots_are_taken_again_when_their_rows_end(model, k, reads_features):
    """Eleven prompts through three slots: every reply is what it is alone, with counts of its own."""
    draft = ModelDraft(build(5, reads_features=reads_features)) if k else None
    engine = DecodeEngine(model, batch=3, max_length=LENGTH, draft=draft, k=k, eos_token_ids=(), ring=8 if k else None)
    alone = DecodeEngine(model, batch=1, max_length=LENGTH, eos_token_ids=())
    for _ in range(2):
        made = engine.generate_all(MANY, LIMITS)
        assert made.replies == [alone.generate([p], n).replies[0] for p, n in zip(MANY, LIMITS, strict=True)]
    for stats, limit in zip(made.stats, LIMITS, strict=True):
        assert stats.tokens == limit and -(-limit // (k + 1)) <= stats.rounds <= limit
        assert sum(stats.accepted) + stats.rounds >= limit
    assert engine.generate(PROMPTS, COUNT).replies == plain(model), "and leaves no trace"


@pytest.mark.parametrize("draft", ["always right", "half right", "the model itself"])
def test_rows_that_stop_early_make_room(hybrid, draft):
    """Half of the replies end by a token; a draft that knows texts by their slots is given every prompt once a slot."""
    whole = generate(hybrid, MANY, COUNT + 8, eos_token_ids=())
    stop = [whole[0][2], whole[4][0], whole[9][5]]
    wanted = generate(hybrid, MANY, COUNT, eos_token_ids=stop)
    assert len({len(reply) for reply in wanted}) > 2
    texts = [prompt + reply for prompt, reply in zip(MANY, whole, strict=True)]
    engine = DecodeEngine(
        hybrid, batch=4, max_length=LENGTH, draft=DRAFTS[draft](hybrid, texts[:4]), k=5, eos_token_ids=stop
    )
    assert engine.generate_all(MANY, COUNT).replies == wanted


def test_a_seed_decides_what_many_prompts_get(hybrid):
    engine = DecodeEngine(
        hybrid, batch=2, max_length=LENGTH, draft=NGramDraft(), k=2, sampling=Sampling(1.0), eos_token_ids=()
    )
    first = engine.generate_all(MANY, LIMITS, seed=1).replies
    assert engine.generate_all(MANY, LIMITS, seed=1).replies == first
    assert engine.generate_all(MANY, LIMITS, seed=2).replies != first
    assert [len(reply) for reply in first] == LIMITS


def test_new_prompts_wait_until_an_eighth_of_the_slots_is_free(monkeypatch, hybrid):
    engine = DecodeEngine(hybrid, batch=16, max_length=LENGTH, eos_token_ids=())
    taken: list[int] = []
    admit = engine._admit
    monkeypatch.setattr(engine, "_admit", lambda slots, *rest: (taken.append(len(slots)), admit(slots, *rest)))
    asked = prompts(*[3] * 20)
    limits = [1 + i % 5 + (i // 16) for i in range(20)]
    assert engine.generate_all(asked, limits).replies == [
        reply[:n] for reply, n in zip(generate(hybrid, asked, 6, eos_token_ids=()), limits, strict=True)
    ]
    assert taken[0] == 16 and sum(taken) == 20 and all(n >= 2 for n in taken)


@functools.cache
def proposer(reads_features: bool) -> HybridForCausalLM:
    return build(5, reads_features=reads_features)


def drafted(model: HybridForCausalLM, draft: str | None, batch: int, **options) -> DecodeEngine:
    """An engine whose SSM ring is short, so that it goes round."""
    options = {"max_length": LENGTH, "eos_token_ids": (), **options}
    if draft is None:
        return DecodeEngine(model, batch=batch, **options)
    made = NGramDraft() if draft == "n-gram" else ModelDraft(proposer(draft == "a reader of features"))
    return DecodeEngine(model, batch=batch, draft=made, k=3, ring=8, **options)


def run(engine: DecodeEngine, texts: dict[int, list[int]], rounds: int = 1000) -> None:
    """At most so many rounds, until all rows have ended; each slot's tokens are appended to its text."""
    for _ in range(rounds):
        engine.round()
        added, inert = engine.look().wait()
        for slot, row in enumerate(added.tolist()):
            texts.setdefault(slot, []).extend(token for token in row if token >= 0)
        if len(inert) == engine.batch:
            return


@pytest.mark.parametrize("draft", [None, "n-gram", "another model", "a reader of features"])
def test_a_row_goes_on_in_another_engine(model, draft):
    """From an engine of one row to one that decodes two others, and on to a third; rings have gone round before."""
    limits = [40, 30, 24]
    wanted = [generate(model, [p], n, eos_token_ids=())[0] for p, n in zip(PROMPTS, limits, strict=True)]
    alone = drafted(model, draft, 1).generate(PROMPTS[:1], 40)
    small, large, last = (drafted(model, draft, batch) for batch in (1, 3, 2))
    for engine in (small, large, last):
        assert engine.generate(PROMPTS[1:2], 12).replies == [wanted[1][:12]], "what was in the slots does not matter"
        engine.begin()
    moving: dict[int, list[int]] = {}
    small.admit([0], PROMPTS[:1], 40)
    run(small, moving, 9)
    others: dict[int, list[int]] = {}
    large.admit([2, 0], PROMPTS[1:], limits[1:])
    run(large, others, 2)
    large.adopt(small, 0, 1)
    assert small.slots.tolist() == [-1] and large.slots.tolist() == [0, 1, 2]
    others[1] = moving[0]
    run(large, others, 2)
    last.adopt(large, 1, 1)
    run(large, others)
    end = {1: others.pop(1)}
    run(last, end)
    assert [end[1], others[2], others[0]] == wanted
    assert last._replies({1: 0}, PROMPTS) == {0: (wanted[0], alone.stats[0])}


def test_a_row_that_has_ended_moves_as_one(hybrid):
    small, large = drafted(hybrid, None, 1), drafted(hybrid, None, 2)
    for engine in (small, large):
        engine.begin()
    small.admit([0], PROMPTS[:1], 1)
    small.round()
    large.adopt(small, 0, 1)
    assert large.slots.tolist() == [-1, -1]
    large.admit([1], PROMPTS[1:2], COUNT)
    texts: dict[int, list[int]] = {}
    run(large, texts)
    assert texts[1] == plain(hybrid)[1]


@pytest.mark.parametrize("k", [0, 3])
def test_rows_come_and_go_between_rounds(model, k):
    """A slot is ended and taken at once; what a round did is known after later ones ran."""
    engine = drafted(model, "another model" if k else None, 2)
    wanted = plain(model, 30)
    engine.begin()
    engine.admit([1], PROMPTS[:1], 30)
    first: dict[int, list[int]] = {}
    run(engine, first, 3)
    engine.admit([0], PROMPTS[1:2], 30)
    looks = []
    for _ in range(2):
        engine.round()
        looks.append(engine.look())
    for look in looks:
        added, inert = look.wait()
        assert not inert and added.shape == (2, k + 1)
        for slot, row in enumerate(added.tolist()):
            first.setdefault(slot, []).extend(token for token in row if token >= 0)
    engine.end([1])
    engine.admit([1], PROMPTS[2:], 5)
    assert first[1] == wanted[0][: len(first[1])] and len(first[1]) >= 5
    first[1] = []
    run(engine, first)
    assert first == {0: wanted[1], 1: wanted[2][:5]}


@pytest.mark.parametrize(
    ("slots", "asked", "count", "message"),
    [
        ([2], prompts(3), 4, "slots must be different ones of 0 to 1, got \\[2\\]"),
        ([-1], prompts(3), 4, "of 0 to 1, got \\[-1\\]"),
        ([0, 0], prompts(3, 3), 4, "different ones"),
        ([0, 1], prompts(3, 3), 4, "slots \\[1\\] have not ended"),
        ([0], prompts(3, 3), 4, "2 prompts need as many slots, got \\[0\\]"),
        ([0], prompts(30), 4, "`max_length`"),
        ([0], prompts(3), 0, "at least 1,.* got 0"),
    ],
)
def test_rows_that_cannot_begin_are_refused(hybrid, slots, asked, count, message):
    engine = DecodeEngine(hybrid, batch=2, max_length=32, eos_token_ids=())
    engine.begin()
    engine.admit([1], PROMPTS[:1], COUNT)
    with pytest.raises(ValueError, match=message):
        engine.admit(slots, asked, count)
    texts: dict[int, list[int]] = {}
    run(engine, texts)
    assert texts[1] == plain(hybrid)[0], "and the row that runs is not touched"


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        (None, {}, "differ in draft, k, ring"),
        ("n-gram", {}, "differ in draft"),
        ("a reader of features", {}, "differ in draft"),
        ("another model", {"max_length": LENGTH + 1}, "differ in max_length"),
        ("another model", {"sampling": Sampling(1.0)}, "differ in sampling"),
        ("another model", {"eos_token_ids": (3,)}, "differ in eos_token_ids"),
        ("another model", {"state_dtype": torch.bfloat16}, "differ in state_dtype"),
    ],
)
def test_rows_do_not_move_between_engines_that_differ(hybrid, draft, options, message):
    engine, other = drafted(hybrid, "another model", 2), drafted(hybrid, draft, 1, **options)
    with pytest.raises(ValueError, match=message):
        engine.adopt(other, 0, 0)


def test_rows_move_into_free_slots_of_the_same_model(hybrid):
    engine, other = drafted(hybrid, None, 2), drafted(hybrid, None, 1)
    with pytest.raises(ValueError, match="differ in model"):
        engine.adopt(drafted(build(3), None, 1), 0, 0)
    engine.admit([1], PROMPTS[:1], COUNT)
    with pytest.raises(ValueError, match="slots \\[1\\] have not ended"):
        engine.adopt(other, 0, 1)
    with pytest.raises(ValueError, match="of 0 to 1, got \\[2\\]"):
        engine.adopt(other, 0, 2)
    with pytest.raises(ValueError, match="slots 0 to 0, got 1"):
        engine.adopt(other, 1, 0)


def test_long_prompts_are_read_in_pieces(monkeypatch, hybrid):
    wanted = plain(hybrid)
    monkeypatch.setattr("hybrid.prefill.PREFILL_TOKENS", 8)
    assert plain(hybrid) == wanted


def test_phases_are_timed(hybrid):
    engine = DecodeEngine(hybrid, batch=2, max_length=LENGTH, draft=ModelDraft(hybrid), k=2, eos_token_ids=())
    spent = engine.phase_milliseconds(PROMPTS[:2], 20, repeats=3)
    assert set(spent) == {"draft", "verify", "accept", "round"} and all(t > 0 for t in spent.values())
    assert engine.generate(PROMPTS[:2], COUNT).replies == plain(hybrid)[:2], "and leave no trace"
    assert DecodeEngine(hybrid, batch=1, max_length=LENGTH).phase_milliseconds(PROMPTS[:1], 9, 3)["draft"] == 0.0


def test_bytes_include_the_drafts(hybrid):
    alone = DecodeEngine(hybrid, batch=2, max_length=LENGTH, draft=NGramDraft(), k=2).cache_bytes()
    both = DecodeEngine(hybrid, batch=2, max_length=LENGTH, draft=ModelDraft(hybrid), k=2).cache_bytes()
    assert both == {kind: 2 * size for kind, size in alone.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": ModelDraft(build(vocab_size=96)), "k": 2}, "96 tokens.*97"),
        ({"draft": ModelDraft(build(d_model=32, reads_features=True)), "k": 2}, "d_model 32 and the model has 48"),
        ({"draft": NGramDraft(), "k": 20, "ring": 32}, "ring of 32.*21 tokens.*at least 42"),
        ({"draft": NGramDraft(), "k": 0}, "k is 0"),
        ({"k": 3}, "draft is None"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"draft": NGramDraft(), "k": 1, "injected": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_impossible_engines_are_refused(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        DecodeEngine(hybrid, **{"batch": 2, "max_length": 32, **options})


@pytest.mark.parametrize(
    ("asked", "count", "message"),
    [
        (prompts(3, 3, 3), 4, "3 prompts.*2 slots.*`batch`"),
        (prompts(30), 4, "prompt of 30 tokens.*34 tokens.*has 32.*`max_length`"),
        ([[]], 4, "at least one token"),
        ([], 4, "at least one token"),
        (prompts(3), 0, "max_new_tokens.*got 0"),
        (prompts(3, 3), [4, 0], "max_new_tokens.*at least 1.*got \\[4, 0\\]"),
        (prompts(3, 3), [4], "one for each prompt, got \\[4\\]"),
        (prompts(20, 30), [12, 3], "prompt of 30 tokens and max_new_tokens 3.*33 tokens"),
    ],
)
def test_impossible_requests_are_refused(hybrid, asked, count, message):
    engine = DecodeEngine(hybrid, batch=2, max_length=32)
    with pytest.raises(ValueError, match=message):
        engine.generate(asked, count)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature.*-1.0"), ({"top_k": -1}, "top_k.*-1"), ({"top_p": 0.0}, "top_p.*0.0")],
)
def test_impossible_samplings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_an_empty_suffix_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        NGramDraft(0)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 20, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("k", [0, 3])
def test_a_graph_is_what_it_was_captured_from(model, sampling, k):
    made = []
    for graphs in (False, True):
        draft = ModelDraft(build(5, reads_features=True)) if k else None
        engine = DecodeEngine(
            model, batch=4, max_length=LENGTH, draft=draft, k=k, sampling=sampling, graphs=graphs, eos_token_ids=()
        )
        made.append([engine.generate(PROMPTS, COUNT, seed=seed).replies for seed in range(3)])
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.parametrize("k", [0, 3])
def test_prompts_are_read_by_graphs_as_without(model, k):
    """Shapes that come again, filled differently; 40 prompts, so that slots are taken again in graphs as well."""
    asked = prompts(*[1 + (7 * i) % 22 for i in range(40)])
    made = []
    for graphs in (False, True):
        draft = ModelDraft(build(5, reads_features=True)) if k else None
        engine = DecodeEngine(model, batch=4, max_length=LENGTH, draft=draft, k=k, graphs=graphs, eos_token_ids=())
        made.append([engine.generate_all(asked[start:], COUNT).replies for start in (0, 3, 17)])
    assert made[0] == made[1]
    assert any(graph is not None for graph in engine._reader._graphs.values())


@pytest.mark.gpu
@pytest.mark.parametrize("k", [0, 3])
def test_ends_are_noticed_rounds_late_and_nothing_else_changes(hybrid, k):
    whole = plain(hybrid, COUNT + 8)
    stop = [whole[0][2], whole[1][4], whole[2][6]]
    wanted = [generate(hybrid, [p], COUNT, eos_token_ids=stop)[0] for p in PROMPTS]
    draft = ModelDraft(hybrid) if k else None
    engine = DecodeEngine(hybrid, batch=3, max_length=LENGTH, draft=draft, k=k, eos_token_ids=stop)
    rounds: list[Tensor] = []
    assert engine.generate(PROMPTS, COUNT).replies == wanted
    assert engine.generate(PROMPTS, COUNT, callback=rounds.append).replies == wanted
    assert len(rounds) <= max(map(len, wanted))


@pytest.mark.gpu
def test_weights_that_move_are_captured_anew(hybrid):
    model = build(7)
    engine = DecodeEngine(model, batch=3, max_length=LENGTH, eos_token_ids=())
    assert engine.generate(PROMPTS, COUNT).replies != plain(hybrid)
    for ours, theirs in zip(model.parameters(), hybrid.parameters(), strict=True):
        ours.data = theirs.data.clone()
    assert engine.generate(PROMPTS, COUNT).replies == plain(hybrid)


@pytest.mark.skipif(DEVICE == "cuda", reason="everything here runs on the kernels already")
@pytest.mark.parametrize(
    ("kind", "sampling", "k"),
    [
        ({}, Sampling(), 2),
        ({}, Sampling(0.8, 12, 0.9), 1),
        ({"mixer": "mamba1", "d_state": 4}, Sampling(), 1),
        ({"mixer_rope": True}, Sampling(), 2),
        ({}, Sampling(), 0),
        ({"mixer_rope": True}, Sampling(), 0),
        ({"mixer_window": 3}, Sampling(), 2),
        ({"mixer_window": 3, "mixer_rope": True}, Sampling(), 0),
    ],
    ids=["greedy", "sampled", "mamba-1", "rotary", "plain", "plain rotary", "windows", "plain windows"],
)
def test_interpreted_kernels_decode_what_the_plain_code_decodes(monkeypatch, kind, sampling, k):
    """Every operator of a round, as one: two layers, two rows of which one is padding, a draft of another model."""
    changes = {"vocab_size": 24, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 16}
    changes |= {"n_layers": 2, "attention_layers": (1,), **kind}
    model, other = build(0, **changes), build(1, **changes, reads_features=bool(k % 2))
    for package in ("attention", "causal_conv", "gated_norm", "linear", "rms_norm", "sampling"):
        interpreted(f"kernels_ext.{package}.kernel")
    for package in ("selective_scan", "speculation", "ssd", "swiglu", "window"):
        interpreted(f"kernels_ext.{package}.kernel")
    assert "ssd_verify" in dispatch.triton_kernels()
    made = []
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        draft = ModelDraft(other) if k else None
        engine = DecodeEngine(
            model, batch=2, max_length=12, draft=draft, k=k, sampling=sampling, ring=6, eos_token_ids=()
        )
        made.append(engine.generate([[3, 1, 4, 1, 5]], 3, seed=3).replies)
    assert made[0] == made[1]
