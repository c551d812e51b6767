from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybrid.serve.text import ReplyText
from tests.corpora import tiny


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def read(text: ReplyText, tokens: list[int]) -> list[str]:
    return [text.add(token) for token in tokens] + [text.end()]


@pytest.mark.parametrize("said", ["hello there", "naïve 🙂👩‍👩‍👧 — ok", "  two spaces\n\n", ""])
def test_pieces_are_the_text(tokenizer, said):
    tokens = tokenizer(said)["input_ids"]
    pieces = read(ReplyText(tokenizer), tokens)
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces), "no character is shown in halves"
    assert len([piece for piece in pieces if piece]) > 1 or not said


def test_any_tokens_give_what_decoding_them_gives(tokenizer):
    """Random tokens are mostly no text: bytes of nothing, special tokens in between."""
    chosen = random.Random(0)
    for _ in range(50):
        tokens = [chosen.randrange(len(tokenizer)) for _ in range(12)]
        assert "".join(read(ReplyText(tokenizer), tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_cut_character_is_shown_at_the_end(tokenizer):
    tokens = tokenizer("ok 🙂")["input_ids"][:-1]
    assert "".join(read(ReplyText(tokenizer), tokens)) == tokenizer.decode(tokens) != "ok "


def test_a_continued_text_keeps_its_space():
    """Tokenizers of Llama 2's kind drop the space before the first token that they decode."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "▁sat": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(read(ReplyText(tokenizer), [2, 3])) == "cat sat"
    assert "".join(read(ReplyText(tokenizer, before=[1]), [2, 3])) == " cat sat"


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["you"], "hello there, how are "),
        (["nothing", "re, h"], "hello the"),
        (["there", "hello"], ""),
        (["today?!"], "hello there, how are you today?"),
        (["there, who", "e you t"], "hello there, how ar"),
        (["\n", "?"], "hello there, how are you today"),
    ],
)
def test_stop_strings_end_the_text_wherever_tokens_lie(tokenizer, stop, wanted):
    text = "hello there, how are you today?"
    for tokens in (tokenizer(text)["input_ids"], [t for c in text for t in tokenizer(c)["input_ids"]]):
        reply = ReplyText(tokenizer, stop=stop)
        assert "".join(read(reply, tokens)) == wanted
        assert reply.stopped == (wanted != text)


def test_what_may_begin_a_stop_string_is_held_back(tokenizer):
    reply = ReplyText(tokenizer, stop=["aab"])
    pieces = [reply.add(tokenizer(letter)["input_ids"][0]) for letter in "xaaac"]
    assert pieces == ["x", "", "", "a", "aac"]
    assert reply.end() == "" and not reply.stopped
