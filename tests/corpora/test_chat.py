from __future__ import annotations

import numpy as np
import pytest

from corpora import chat
from tests.corpora import tiny

LLAMA3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def replies(tokenizer, tokenized):
    """Text of each run of reply tokens."""
    mask = np.concatenate([[False], tokenized.assistant, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(mask))
    return [tokenizer.decode(tokenized.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_opening_and_turn_end_come_from_the_template(tokenizer):
    assert chat.opening(tokenizer) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert chat.turn_end(tokenizer) == "<|im_end|>"
    assert chat.turn_end_ids(tokenizer) == (2,)
    assert chat.turn_end_ids(tiny.tokenizer(PLAIN)) == ()


def test_tokens_are_the_templates_and_the_mask_is_the_replies(tokenizer):
    record = tiny.conversation(7, turns=2)
    (tokenized,) = chat.tokenize(tokenizer, [record])
    assert tokenized.tokens.tolist() == tokenizer.apply_chat_template(record["messages"], return_dict=False)
    assert replies(tokenizer, tokenized) == [m["content"] + "<|im_end|>" for m in record["messages"][1::2]]


@pytest.mark.parametrize("content", ["", "x", "\n\nfirst and last\n ", "日本語 🙂", "   "])
def test_mask_holds_for_any_reply(tokenizer, content):
    record = {"id": "a", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": content}]}
    (tokenized,) = chat.tokenize(tokenizer, [record])
    (reply,) = replies(tokenizer, tokenized)
    assert reply.endswith(content + "<|im_end|>")
    assert len(reply) <= len(content) + len("\n<|im_end|>")  # a token may join the header's line break and the reply's


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_incomplete_last_message_has_no_end(tokenizer, role):
    record = tiny.conversation(1, turns=2, complete=False)
    record["messages"] = record["messages"][: 4 if role == "assistant" else 3]
    (tokenized,) = chat.tokenize(tokenizer, [record])
    assert tokenizer.decode(tokenized.tokens).endswith(record["messages"][-1]["content"])
    assert bool(tokenized.assistant[-1]) is (role == "assistant")


def test_template_that_trims_and_begins_with_its_own_token():
    tokenizer = tiny.tokenizer(LLAMA3)
    (tokenized,) = chat.tokenize(tokenizer, [tiny.conversation(3)])
    assert tokenized.tokens[0] == 0 and tokenized.tokens[1] == 1
    assert replies(tokenizer, tokenized) == ["the answer is 3 — I think 🙂<|im_end|>"]


def test_template_without_special_tokens_ends_replies_by_its_text():
    (tokenized,) = chat.tokenize(tiny.tokenizer(PLAIN), [tiny.conversation(3)])
    assert replies(tiny.tokenizer(PLAIN), tokenized)[0].endswith("🙂\n\n")


def test_empty_offsets_of_trimmed_white_space_count_by_their_end():
    offsets = np.array([[0, 4], [5, 5], [5, 8], [9, 9]])  # "user", "\n", "abc", "\n" with white space trimmed off
    assert chat._in_spans(offsets, [(5, 9)]).tolist() == [False, False, True, True]


def test_template_that_rewrites_earlier_messages_is_refused():
    counting = "{{ messages | length }}" + tiny.CHATML
    with pytest.raises(chat.ChatTemplateError, match=r"c5.*only appends"):
        list(chat.tokenize(tiny.tokenizer(counting), [tiny.conversation(5)]))


def test_template_that_refuses_a_conversation_is_named():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML
    record = {"id": "s1", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    with pytest.raises(chat.ChatTemplateError, match="s1.*no system"):
        list(chat.tokenize(tiny.tokenizer(strict), [record]))


def test_tokenizer_without_template_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(chat.ChatTemplateError, match="no chat template"):
        chat.opening(tokenizer)
