from __future__ import annotations

import itertools

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from corpora import free_text
from corpora.free_text import FreeTextError, Tally
from corpora.self_chat import Sampler
from tests.corpora import tiny

START, TURN, END = 0, 1, 2
STOP = frozenset({START, TURN, END})


def like_smollm2():
    tokenizer = tiny.tokenizer()
    tokenizer.unk_token = "<|endoftext|>"
    return tokenizer


def like_llama():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", START)]
    )
    return tokenizer


def like_qwen():
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token, tokenizer.pad_token = None, "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("tokenizer", [like_smollm2(), like_llama(), like_qwen()], ids=["smollm2", "llama", "qwen"])
def test_the_start_token_is_found(tokenizer):
    assert free_text.start_token(tokenizer) == START
    assert free_text.stop_tokens(tokenizer, START) == STOP
    assert free_text.stop_tokens(tokenizer, START, (7,)) == STOP | {7}


def test_the_start_token_can_be_named():
    tokenizer = tiny.tokenizer()
    assert free_text.start_token(tokenizer, "<|endoftext|>") == START
    with pytest.raises(FreeTextError, match=r"start_token is '<\|no such\|>', which is no token"):
        free_text.start_token(tokenizer, "<|no such|>")
    with pytest.raises(FreeTextError, match=r"all belong to the chat template.*corpus\.free_text\.start_token"):
        free_text.start_token(tokenizer)


@pytest.mark.parametrize(
    ("row", "documents"),
    [
        ([0, 5, 6], [[0, 5, 6]]),
        ([0, 5, 0, 6, 7], [[0, 5, 0], [0, 6, 7]]),
        ([0, 5, 2, 1, 8, 2, 0, 6], [[0, 5, 2], [0, 6]]),
        ([0, 5, 1, 8, 9], [[0, 5, 1]]),
        ([0, 0, 2, 0], [[0, 0], [0, 2], [0]]),
        ([5, 6], []),
    ],
)
def test_rows_are_split_where_documents_begin(row, documents):
    assert [d.tolist() for d in free_text.split(np.array(row), START, STOP)] == documents


def scripted(rows):
    """A stand-in for `hybrid.generate.generate` that says the rows in turn, again and again, and what it was asked."""
    asked, queue = [], itertools.cycle(rows)

    def generate(model, prompts, max_new_tokens, **options):
        asked.append({"prompts": prompts, "max_new_tokens": max_new_tokens, **options})
        return [next(queue) for _ in prompts]

    return generate, asked


def test_sample_keeps_the_tokens_as_drawn_and_counts_what_it_leaves_out():
    generate, asked = scripted([[5, 6], [2, 9, 9], [5, 6], [7, 0, 8], [9, 9]])
    tally, sampler = Tally(), Sampler(max_tokens=4, temperature=0.7, top_p=0.9, top_k=5)
    drawn = list(free_text.sample(generate, None, START, STOP, 4, sampler, seed=4, batch_size=2, tally=tally))
    assert [(name, tokens.tolist()) for name, tokens in drawn] == [
        ("freetext-4-000000.0", [0, 5, 6]),
        ("freetext-4-000003.0", [0, 7, 0]),
        ("freetext-4-000003.1", [0, 8]),
        ("freetext-4-000004.0", [0, 9, 9]),
    ]
    assert {tokens.dtype for _, tokens in drawn} == {np.dtype(np.uint32)}
    assert (tally.kept, tally.dropped, tally.duplicates, tally.tokens) == (4, 1, 1, 11)
    assert asked[0]["prompts"] == [[START]] * 2 and asked[0]["max_new_tokens"] == 3
    assert (asked[0]["temperature"], asked[0]["top_p"], asked[0]["top_k"]) == (0.7, 0.9, 5)
    assert asked[0]["eos_token_ids"] == ()
    assert len({a["seed"] for a in asked}) == len(asked) == 3


def test_a_teacher_that_always_says_the_same_stops_with_a_clear_error():
    generate, asked = scripted([[5, 6]])
    with pytest.raises(FreeTextError, match=r"added no document to the 1 of 3 \(0 without text, 21 duplicates\)"):
        list(free_text.sample(generate, None, START, STOP, 3, Sampler(), seed=0, batch_size=2))
    assert len(asked) == 1 + free_text.BARREN_BATCHES
