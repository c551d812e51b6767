"""Unequal rows, roll-back and size of the decoding state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.cache import HybridCache, KVCache, SSMCache
from hybrid.generate import right_pad
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import prompts, tokens


@pytest.fixture(scope="module", params=[(1, 3), (), (0, 1, 2, 3)], ids=["hybrid", "mamba", "attention"])
def model(request) -> HybridForCausalLM:
    return tiny_hybrid.model(attention_layers=request.param)


def read(model: HybridForCausalLM, rows: list[list[int]], cache: HybridCache) -> list[Tensor]:
    """Append each row's tokens; the logits of each row's own tokens."""
    padded, counts = right_pad(rows, "cpu")
    logits = model(padded, cache=cache, counts=counts)
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


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
    assert cache.lengths.tolist() == [10, 31, 6, 20]


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
    for token in (3, 4, 5):  # only row 1 goes on, by single steps
        model(torch.tensor([[9], [token]]), cache=cache, counts=torch.tensor([0, 1]))
    model(torch.tensor([[9] * 4, [6, 7, 8, 1]]), cache=cache, counts=torch.tensor([0, 3]))
    assert cache.lengths.tolist() == [6, 12]
    one, other = read(model, [[11], [11]], cache)
    assert_close(one, model(torch.tensor([[*first, 11]]))[0, -1:])
    assert_close(other, model(torch.tensor([[*second, 3, 4, 5, 6, 7, 8, 11]]))[0, -1:])


@pytest.mark.parametrize("window", [5, 20], ids=["short", "longer than grouped attention"])
def test_rolled_back_is_never_seen(model, window):
    rows = prompts(7, 21, 2, 12)
    cache = model.new_cache(4, 90)
    read(model, rows, cache)
    counts = [window, window, 3, window]
    tried = prompts(*counts, seed=1)
    read(model, tried, cache)
    forget = [0, window, 1, window - 2]
    cache.rollback(model, torch.tensor(forget))
    kept = [row + new[: len(new) - gone] for row, new, gone in zip(rows, tried, forget, strict=True)]
    assert cache.lengths.tolist() == [len(row) for row in kept]
    fresh = model.new_cache(4, 90)
    read(model, kept, fresh)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        if isinstance(ours, SSMCache):
            assert_close(ours.state, theirs.state)
            assert_close(ours.conv, theirs.conv)
    for step in range(3):  # single steps, and then another roll-back
        token = tokens(4, 1, seed=10 + step)
        assert_close(model(token, cache=cache), model(token, cache=fresh))
    last = tokens(4, 4, seed=20)
    for c in (cache, fresh):
        model(last, cache=c)
        c.rollback(model, torch.tensor([4, 0, 1, 2]))
    assert_close(model(last, cache=cache), model(last, cache=fresh))


def test_rollback_in_two_goes_is_one(model):
    caches = [model.new_cache(2, 40) for _ in range(2)]
    for cache in caches:
        read(model, prompts(9, 4), cache)
        model(tokens(2, 6), cache=cache)
    caches[0].rollback(model, torch.tensor([1, 3]))
    caches[0].rollback(model, torch.tensor([4, 0]))
    caches[1].rollback(model, torch.tensor([5, 3]))
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [10, 7]
    step = tokens(2, 1, seed=5)
    assert_close(model(step, cache=caches[0]), model(step, cache=caches[1]))


def test_rolling_back_a_single_step(model):
    cache = model.new_cache(2, 20)
    rows = prompts(9, 4)
    read(model, rows, cache)
    model(tokens(2, 1), cache=cache)
    cache.rollback(model, torch.tensor([1, 0]))
    ours = model(torch.tensor([[8], [8]]), cache=cache)
    assert_close(ours[0], model(torch.tensor([[*rows[0], 8]]))[0, -1:])
    assert_close(ours[1], model(torch.tensor([[*rows[1], int(tokens(2, 1)[1]), 8]]))[0, -1:])


@pytest.mark.parametrize("forget", [[4, 0], [0, -1], [0, 3]])
def test_only_the_last_call_can_be_forgotten(model, forget):
    cache = model.new_cache(2, 20)
    read(model, prompts(9, 4), cache)
    read(model, prompts(3, 2), cache)
    with pytest.raises(ValueError, match=r"the last call appended \[3, 2\]"):
        cache.rollback(model, torch.tensor(forget))


def test_a_full_cache_says_so(model):
    cache = model.new_cache(1, 8)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match="cache of 8 tokens is full: 9 wanted"):
        model(tokens(1, 1), cache=cache)


def test_bytes_are_those_that_are_held(model):
    cache = model.new_cache(3, 50)
    held = {"kv": 0, "ssm": 0, "conv": 0}
    for state in cache.layers:
        if isinstance(state, KVCache):
            held["kv"] += state.k.nbytes + state.v.nbytes
        else:
            held["ssm"] += state.state.nbytes
            held["conv"] += state.conv.nbytes
    assert model.cache_bytes(3, 50) == held
