"""Speculative decoding gives what greedy decoding gives, whatever is proposed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hybrid import HybridForCausalLM
from hybrid.generate import generate
from hybrid.speculative import NGramDraft, generate_speculative
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import VOCAB, prompts

PROMPTS = prompts(9, 1, 22)
COUNT = 14


class Scripted:
    """Knows the whole text, and proposes it with `mistake` added to each token: 0 is always right."""

    def __init__(self, text: Sequence[int], mistake: int) -> None:
        self.text, self.mistake, self.length = text, mistake, 0

    def extend(self, tokens: Sequence[int]) -> None:
        assert list(self.text[self.length : self.length + len(tokens)]) == list(tokens), "the draft is told the text"
        self.length += len(tokens)

    def propose(self, k: int) -> list[int]:
        return [(token + self.mistake) % VOCAB for token in self.text[self.length : self.length + k]]


class Guessing:
    """Proposes a random number of tokens, each right with probability one half."""

    def __init__(self, text: Sequence[int], seed: int) -> None:
        self.text, self.length, self.random = text, 0, torch.Generator().manual_seed(seed)

    def extend(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)

    def propose(self, k: int) -> list[int]:
        count = int(torch.randint(k + 1, (), generator=self.random))
        wrong = torch.randint(2, (count,), generator=self.random).tolist()
        return [(t + w) % VOCAB for t, w in zip(self.text[self.length :], wrong, strict=False)]


DRAFTS = {
    "always right": lambda row, text: Scripted(text, 0),
    "always wrong": lambda row, text: Scripted(text, 1),
    "random": lambda row, text: Guessing(text, row),
    "n-gram": lambda row, text: NGramDraft(2),
}


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return tiny_hybrid.model()


@pytest.fixture(scope="module")
def plain(model) -> list[list[int]]:
    """Greedy replies, longer than any that is asked for below."""
    return generate(model, PROMPTS, COUNT + 8, eos_token_ids=())


def speculate(model, rows: Sequence[int], plain, draft: str, k: int, count: int = COUNT, stop: Sequence[int] = ()):
    texts = [PROMPTS[row] + plain[row] for row in rows]
    drafts = [DRAFTS[draft](row, text) for row, text in zip(rows, texts, strict=True)]
    return generate_speculative(model, [PROMPTS[row] for row in rows], count, drafts, k, stop)


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)], ids=["one", "three"])
@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("draft", DRAFTS)
def test_is_greedy(model, plain, draft, k, rows):
    replies, stats = speculate(model, rows, plain, draft, k)
    assert replies == [plain[row][:COUNT] for row in rows]
    for reply, row in zip(replies, stats, strict=True):
        assert sum(row.emitted) == len(reply) - 1, "the first token is the prefill's"
        assert all(1 <= n <= k + 1 for n in row.emitted)
        assert len(row.proposed) == len(row.accepted) == k
        assert all(a <= p <= len(row.emitted) for a, p in zip(row.accepted, row.proposed, strict=True))
        assert sum(row.accepted) == sum(row.emitted) - len(row.emitted)
        if draft == "always right":
            assert row.accepted == row.proposed
            assert set(row.emitted[:-1]) <= {k + 1}
        if draft == "always wrong" or k == 0:
            assert sum(row.accepted) == 0
            assert row.emitted == [1] * (COUNT - 1)


@pytest.mark.parametrize("attention", [(), (0, 1, 2, 3)], ids=["mamba", "attention"])
def test_is_greedy_without_one_kind_of_layer(attention):
    model = tiny_hybrid.model(attention_layers=attention)
    plain = generate(model, PROMPTS, COUNT, eos_token_ids=())
    for draft in DRAFTS:
        replies, _ = speculate(model, (0, 1, 2), plain, draft, 3)
        assert replies == plain


@pytest.mark.parametrize("draft", ["always right", "random"])
@pytest.mark.parametrize("at", range(7))
def test_end_of_turn_inside_the_window(model, plain, draft, at):
    """Each row has its own place to stop, before, in and after the first windows of six."""
    stop = [plain[0][at], plain[2][at // 2]]
    wanted = generate(model, PROMPTS, COUNT, eos_token_ids=stop)
    assert len(wanted[0]) <= at + 1
    assert speculate(model, (0, 1, 2), plain, draft, 5, stop=stop)[0] == wanted


def test_the_models_own_end_of_turn_is_the_default(model, plain):
    own = tiny_hybrid.model(eos_token_ids=(plain[0][4],))
    replies, _ = generate_speculative(own, PROMPTS[:1], COUNT, [Scripted(PROMPTS[0] + plain[0], 0)], 5)
    assert replies == generate(own, PROMPTS[:1], COUNT)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("draft", ["always right", "always wrong"])
def test_not_one_token_too_many(model, plain, draft, count):
    replies, stats = speculate(model, (0, 1, 2), plain, draft, 5, count)
    assert replies == [reply[:count] for reply in plain]
    if count == 1:
        assert [row.emitted for row in stats] == [[], [], []]


def test_impossible_requests_are_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate_speculative(model, [[]], 4, [NGramDraft()], 2)
    with pytest.raises(ValueError, match="max_new_tokens.*got 0"):
        generate_speculative(model, [[1]], 0, [NGramDraft()], 2)


def test_ngram_by_hand():
    draft = NGramDraft(3)
    assert draft.propose(4) == []
    draft.extend([1, 2, 3, 9, 2, 3, 8, 1, 2])
    assert draft.propose(3) == [3, 9, 2], "the longest known suffix is (1, 2), seen once"
    draft.extend([3])
    assert draft.propose(2) == [9, 2], "(1, 2, 3) goes before the later (2, 3)"
    draft.extend([8])
    assert draft.propose(5) == [1, 2, 3, 8], "(2, 3, 8), to the end of the text"
    draft.extend([77])
    assert draft.propose(5) == [], "never seen"


def test_ngram_takes_the_latest_occurrence():
    draft = NGramDraft(1)
    draft.extend([5, 1, 5, 2, 5])
    assert draft.propose(2) == [2, 5]


def test_ngram_told_in_pieces_is_told_at_once():
    text = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    whole, pieces = NGramDraft(3), NGramDraft(3)
    whole.extend(text)
    for token in text:
        pieces.extend([token])
    assert pieces.propose(6) == whole.propose(6) != []


def test_ngram_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        NGramDraft(0)
