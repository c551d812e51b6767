"""Unequal rows, windows that are read without being kept, and size of the decoding state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.cache import HybridCache, KVCache, SSMCache, ring_slots
from hybrid.prefill import right_pad
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import VOCAB, prompts, tokens

MODELS = {
    "hybrid": {"attention_layers": (1, 3)},
    "mamba": {"attention_layers": ()},
    "attention": {"attention_layers": (0, 1, 2, 3)},
    "windows": {"attention_layers": (1,), "mixer_window": 5, "mixer_rope": True},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> HybridForCausalLM:
    return tiny_hybrid.model(**MODELS[request.param])


def read(model: HybridForCausalLM, rows: list[list[int]], cache: HybridCache) -> list[Tensor]:
    """Append each row's tokens; the logits of each row's own tokens."""
    padded, counts = right_pad(rows, "cpu")
    logits = model(padded, cache=cache, counts=counts)
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def keep(cache: HybridCache, counts: list[int]) -> None:
    """What the end of a round does to the cursors."""
    cursors = cache.cursors
    due = cursors.lengths - cursors.folded + 2 * cache.window > cache.ring
    cursors.folded.copy_(torch.where(due, cursors.lengths, cursors.folded))
    cursors.lengths += torch.tensor(counts, dtype=torch.int32)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ragged_rows_are_one_by_one(model):
    rows = prompts(7, 30, 1, 18)
    cache = model.new_cache(4, 60)
    for row, logits in zip(rows, read(model, rows, cache), strict=True):
        assert_close(logits, model(torch.tensor([row]))[0])
    more = prompts(3, 1, 5, 2, seed=1)
    for row, new, logits in zip(rows, more, read(model, more, cache), strict=True):
        assert_close(logits, model(torch.tensor([row + new]))[0, len(row) :])
    assert cache.cursors.lengths.tolist() == cache.cursors.folded.tolist() == [10, 31, 6, 20]


def test_what_the_padding_holds_does_not_matter(model):
    states = []
    for filler in (0, 55):
        padded, cache = torch.full((2, 9), filler), model.new_cache(2, 30)
        padded[0, :4], padded[1] = tokens(1, 4)[0], tokens(1, 9, seed=1)[0]
        model(padded, cache=cache, counts=torch.tensor([4, 9]))
        step = model(tokens(2, 1, seed=2), cache=cache)
        states.append([step, *(s.state for s in cache.layers if isinstance(s, SSMCache))])
    for a, b in zip(*states, strict=True):
        assert_close(a, b)


def test_a_row_may_stand_still(model):
    cache = model.new_cache(2, 30)
    first, second = prompts(6, 6)
    read(model, [first, second], cache)
    for token in (3, 4, 5):  # only row 1 goes on, by single tokens
        model(torch.tensor([[9], [token]]), cache=cache, counts=torch.tensor([0, 1]))
    model(torch.tensor([[9] * 4, [6, 7, 8, 1]]), cache=cache, counts=torch.tensor([0, 3]))
    assert cache.cursors.lengths.tolist() == [6, 12]
    one, other = read(model, [[11], [11]], cache)
    assert_close(one, model(torch.tensor([[*first, 11]]))[0, -1:])
    assert_close(other, model(torch.tensor([[*second, 3, 4, 5, 6, 7, 8, 11]]))[0, -1:])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_are_the_full_pass_whatever_is_kept(model, window):
    """Sixty-five rounds of random numbers of kept tokens, a row of them inert from the start."""
    random = torch.Generator().manual_seed(window)
    rows = [*prompts(2, 7, 1), [1]]
    cache = model.new_cache(4, 65 * window + 16, window=window)
    read(model, rows, cache)
    slots = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    inert = [t[3].clone() for layer in cache.layers for name, t in vars(layer).items() if t is not None and name != "A"]
    for step in range(65):
        tried = torch.randint(VOCAB, (4, window), generator=random)
        logits = model.decode(tried, cache, slots).view(4, window, -1)
        if step % 8 == 0:
            for row in range(3):
                text = rows[row] + tried[row].tolist()
                assert_close(logits[row], model(torch.tensor([text]))[0, -window:])
        kept = [window] * 3 if window == 1 else torch.randint(window + 1, (3,), generator=random).tolist()
        keep(cache, [*kept, 0])
        rows = [row + new[:n] for row, new, n in zip(rows, tried.tolist(), [*kept, 0], strict=True)]
    assert cache.cursors.lengths.tolist() == [len(row) for row in rows]
    assert min(len(row) for row in rows[:3]) > 1.5 * cache.ring, "the ring went round"
    held = [t[3] for layer in cache.layers for name, t in vars(layer).items() if t is not None and name != "A"]
    assert all(torch.equal(a, b) for a, b in zip(held, inert, strict=True))


def test_a_window_may_be_read_in_parts(model):
    whole, parts = (model.new_cache(2, 60, window=6) for _ in range(2))
    slots = torch.arange(2, dtype=torch.int32)
    for cache in (whole, parts):
        read(model, prompts(9, 4), cache)
    for step in range(9):  # far enough for a fold
        new = tokens(2, 6, seed=step)
        at_once = model.decode(new, whole, slots).view(2, 6, -1)
        one = model.decode(new[:, :1], parts, slots).view(2, 1, -1)
        two = model.decode(new[:, 1:4], parts, slots, offset=1).view(2, 3, -1)
        rest = model.decode(new[:, 4:], parts, slots, offset=4).view(2, 2, -1)
        assert_close(torch.cat([one, two, rest], dim=1), at_once)
        for cache in (whole, parts):
            keep(cache, [5, 2])


@pytest.mark.parametrize("mixer", [{}, {"mixer": "mamba1", "d_state": 4}], ids=["mamba-2", "mamba-1"])
def test_text_can_be_appended_after_windows(mixer):
    """What the ring holds is part of it: a next question follows a reply that was decoded by windows."""
    model = tiny_hybrid.model(**mixer)
    cache, rows = model.new_cache(2, 60, window=3), prompts(9, 4)
    read(model, rows, cache)
    cache.fresh = False
    for step in range(2):
        tried = tokens(2, 3, seed=step)
        model.decode(tried, cache, torch.arange(2, dtype=torch.int32))
        keep(cache, [3, 1])
        rows = [row + new[:n] for row, new, n in zip(rows, tried.tolist(), [3, 1], strict=True)]
    more = prompts(20, 7, seed=5)
    for row, new, logits in zip(rows, more, read(model, more, cache), strict=True):
        assert_close(logits, model(torch.tensor([row + new]))[0, len(row) :])
    assert cache.cursors.folded.tolist() == cache.cursors.lengths.tolist() == [35, 13]


def test_slots_used_before_are_as_good_as_new(model):
    cache = model.new_cache(2, 40, window=4)
    slots = torch.arange(2, dtype=torch.int32)
    read(model, prompts(20, 25, seed=7), cache)
    model.decode(tokens(2, 4), cache, slots)
    keep(cache, [4, 2])
    cache.reset(model)
    rows = prompts(3, 1)
    read(model, rows, cache)
    new = tokens(2, 4, seed=3)
    logits = model.decode(new, cache, slots).view(2, 4, -1)
    for row in range(2):
        assert_close(logits[row], model(torch.tensor([rows[row] + new[row].tolist()]))[0, -4:])


@pytest.mark.parametrize("mixer", [{}, {"mixer": "mamba1", "d_state": 4}], ids=["mamba-2", "mamba-1"])
def test_texts_are_read_into_slots_of_a_cache_in_use(mixer):
    """In any order, also one slot twice with the same text; the others keep theirs, windows that were read included."""
    model = tiny_hybrid.model(**mixer)
    cache, rows = model.new_cache(4, 40, window=3), prompts(7, 12, 5, 3)
    read(model, rows, cache)
    tried = tokens(4, 3)
    model.decode(tried, cache, torch.arange(4, dtype=torch.int32))
    keep(cache, [3, 1, 2, 2])
    rows = [row + new[:n] for row, new, n in zip(rows, tried.tolist(), [3, 1, 2, 2], strict=True)]
    slots, others = torch.tensor([3, 1, 1]), prompts(20, 2, seed=5)
    opened = cache.opened(slots)
    read(model, [others[0], others[1], others[1]], opened)
    cache.keep(opened, slots)
    rows[3], rows[1] = others
    assert cache.cursors.lengths.tolist() == [len(row) for row in rows] == [10, 2, 7, 20]
    new = tokens(4, 3, seed=9)
    logits = model.decode(new, cache, torch.arange(4, dtype=torch.int32)).view(4, 3, -1)
    for row in range(4):
        assert_close(logits[row], model(torch.tensor([rows[row] + new[row].tolist()]))[0, -3:])


def test_a_full_cache_says_so(model):
    cache = model.new_cache(1, 8)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match="cache of 8 tokens is full: 9 wanted"):
        model(tokens(1, 1), cache=cache)


def test_too_long_a_window_is_refused(model):
    cache = model.new_cache(1, 20, window=3)
    with pytest.raises(ValueError, match="4 tokens in one round.*window of 3"):
        model.decode(tokens(1, 4), cache, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="5 tokens in one round"):
        model.decode(tokens(1, 2), cache, torch.zeros(1, dtype=torch.int32), offset=3)


def test_too_short_a_ring_is_refused(model):
    with pytest.raises(ValueError, match="ring of 9 slots.*windows of 5 tokens.*at least 10"):
        model.new_cache(1, 20, window=5, ring=9)


def test_too_short_a_ring_for_the_mixers_windows_is_refused():
    model = tiny_hybrid.model(attention_layers=(), mixer_window=20)
    with pytest.raises(
        ValueError, match="ring of 24 slots.*windows of 5 tokens.*see 20 tokens: ring must be at least 25"
    ):
        model.new_cache(1, 50, window=5, ring=24)
    assert ring_slots(model.config, 13) == 64


def test_rings_hold_two_windows():
    config = tiny_hybrid.config()
    assert [ring_slots(config, window) for window in (2, 9, 16, 17)] == [32, 32, 32, 64]


def test_bytes_are_those_that_are_held(model):
    cache = model.new_cache(3, 50)
    held = {"kv": 0, "ssm": 0, "conv": 0, "ring": 0}
    for state in cache.layers:
        if isinstance(state, KVCache):
            held["kv"] += state.k.nbytes + state.v.nbytes
        else:
            held["ssm"] += state.state.nbytes
            held["conv"] += state.conv.nbytes
            held["ring"] += sum(t.nbytes for t in (state.ring_x, state.ring_B, state.ring_dt) if t is not None)
    assert cache.bytes() == held == model.cache_bytes(3, 50)
    assert (held["ring"] > 0) == bool(model.config.mixer_window)
    assert (model.new_cache(3, 50, window=4).bytes()["ring"] > 0) == bool(model.config.mamba_layers)
