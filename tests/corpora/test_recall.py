import numpy as np
import pytest

from corpora.recall import RecallError, recall_texts
from tests.corpora import tiny

PAIRS = 9


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def halves(tokenizer, text):
    """(key, value) as each half shows them, in its order."""
    colon, line_end = (tokenizer.encode(mark)[0] for mark in (":", "\n"))
    lines = text.tokens[1:].reshape(2, PAIRS, 4)
    assert (lines[..., 1] == colon).all() and (lines[..., 3] == line_end).all()
    return [[(int(k), int(v)) for k, _, v, _ in half] for half in lines]


def test_every_value_asked_for_was_shown_beside_its_key(tokenizer):
    for text in recall_texts(tokenizer, 5, PAIRS, seed=1):
        shown, asked = halves(tokenizer, text)
        assert sorted(shown) == sorted(asked) and shown != asked
        assert len({token for pair in shown for token in pair}) == 2 * PAIRS
        (positions,) = np.nonzero(text.asked)
        assert text.tokens[positions].tolist() == [value for _, value in asked]
        assert text.tokens[text.first] == asked[0][0]
        assert text.tokens[0] == tokenizer.bos_token_id


def test_the_seed_says_everything_and_more_texts_change_none(tokenizer):
    first, longer, other = (recall_texts(tokenizer, n, PAIRS, seed) for n, seed in ((3, 1), (4, 1), (3, 2)))
    for a, b, c in zip(first, longer, other, strict=False):
        assert a.tokens.tolist() == b.tokens.tolist() != c.tokens.tolist()
    assert len({tuple(text.tokens) for text in longer}) == 4


def test_keys_and_values_are_no_control_tokens(tokenizer):
    texts = recall_texts(tokenizer, 40, PAIRS, 0)
    used = {token for text in texts for pair in halves(tokenizer, text)[0] for token in pair}
    assert not used & {*tokenizer.all_special_ids, *tokenizer.encode(":\n")}


def test_more_pairs_than_the_vocabulary_has_are_refused(tokenizer):
    with pytest.raises(RecallError, match=r"200 pairs need 400 different tokens.* has 2\d\d .*layer_scores.pairs"):
        recall_texts(tokenizer, 1, 200, 0)
