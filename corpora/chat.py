"""Conversations to tokens by the tokenizer's own chat template.

No template is known by name here. What a template does is found out by rendering: the text of a reply is what comes
between the render of the messages before it with a generation prompt, and the render with it; the text before the
user's first words is what precedes a sentinel. A template for which the shorter render is no prefix of the longer one
cannot be masked by position and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Message = Mapping[str, str]
Conversation = Mapping[str, Any]

# Plain letters: no template trims or escapes them, and no tokenizer has them as a token of its own.
_SENTINEL = "zqxjkvbp"


class ChatTemplateError(ValueError):
    """A tokenizer whose chat template cannot be used; the message says what it does and what is needed."""


@dataclass(frozen=True)
class TokenizedConversation:
    """tokens: uint32 (L,). assistant: bool (L,), True in a reply including its end-of-turn token."""

    tokens: np.ndarray
    assistant: np.ndarray


def render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """The text that the tokenizer's template makes of the messages."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template; put a chat_template.jinja into the teacher's folder, or name one by "
            "teacher.chat_template"
        )
    return tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation_prompt
    )


def opening(tokenizer: Any) -> str:
    """What the template puts before the user's first words, default system prompt included."""
    text = render(tokenizer, [{"role": "user", "content": _SENTINEL}])
    return text[: _position(text, _SENTINEL)]


def turn_end(tokenizer: Any) -> str:
    """What ends a reply: the text after it up to and with the first special token; without one, all that follows."""
    return Template(tokenizer).end


def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special token that ends a reply, as a tuple of one id; empty if the template ends replies by plain text."""
    ids = tokenizer(turn_end(tokenizer), add_special_tokens=False)["input_ids"]
    return tuple(ids[-1:]) if ids and ids[-1] in special_ids(tokenizer) else ()


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def conversation_text(tokenizer: Any, conversation: Conversation) -> str:
    """The whole conversation as text; an incomplete last message stays open (no end-of-turn token)."""
    return Template(tokenizer).rendered(conversation).text


def tokenize(
    tokenizer: Any, conversations: Sequence[Conversation], batch: int = 256
) -> Iterator[TokenizedConversation]:
    """Tokens and reply mask of each conversation ({"id", "messages", "complete"}), in order."""
    template = Template(tokenizer)
    for at in range(0, len(conversations), batch):
        yield from template.tokenized([template.rendered(c) for c in conversations[at : at + batch]])


class Rendered(NamedTuple):
    """A conversation as text, and the [start, end) characters of every reply, its end-of-turn token included."""

    text: str
    replies: list[tuple[int, int]]


class Template:
    """A tokenizer's template with what ends its replies, found once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        text = render(tokenizer, [{"role": "user", "content": "u"}, {"role": "assistant", "content": _SENTINEL}])
        self.after_reply = text[_position(text, _SENTINEL) + len(_SENTINEL) :]
        self.end = _up_to_special(tokenizer, self.after_reply)

    def tokenized(self, rendered: Sequence[Rendered]) -> list[TokenizedConversation]:
        """Tokens and reply mask of each, in one call of the tokenizer, which uses all cores."""
        encoded = self.tokenizer([r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True)
        return [
            TokenizedConversation(np.array(ids, np.uint32), _in_spans(np.array(offsets).reshape(-1, 2), r.replies))
            for ids, offsets, r in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        ]

    def rendered(self, conversation: Conversation) -> Rendered:
        """An incomplete last message stays open (no end-of-turn token)."""
        messages = conversation["messages"]
        is_open = not conversation.get("complete", True)
        name = conversation.get("id", "?")
        text = self._open(messages, name) if is_open else self._render(messages, False, name)
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = len(self._prefix(text, messages[:k], True, name))
            if is_open and k == len(messages) - 1:
                spans.append((start, len(text)))
                continue
            turn = self._prefix(text, messages[: k + 1], False, name)
            if not turn.endswith(self.after_reply) or len(turn) - len(self.after_reply) < start:
                raise ChatTemplateError(
                    f"conversation {name}: the chat template ends message {k + 1} by {turn[start:][-40:]!r}, "
                    f"not by {self.after_reply!r} as elsewhere; such a template cannot be masked"
                )
            spans.append((start, len(turn) - len(self.after_reply) + len(self.end)))
        return Rendered(text, spans)

    def _open(self, messages: Sequence[Message], name: str) -> str:
        last = messages[-1]
        text = self._render([*messages[:-1], {"role": last["role"], "content": _SENTINEL}], False, name)
        return text[: text.rindex(_SENTINEL)] + last["content"]

    def _prefix(self, text: str, messages: Sequence[Message], generation_prompt: bool, name: str) -> str:
        prefix = self._render(messages, generation_prompt, name)
        if not text.startswith(prefix):
            raise ChatTemplateError(
                f"conversation {name}: the chat template renders the first {len(messages)} messages otherwise when "
                "more follow; a template is needed that only appends: name one by teacher.chat_template"
            )
        return prefix

    def _render(self, messages: Sequence[Message], generation_prompt: bool, name: str) -> str:
        from jinja2 import TemplateError

        try:
            return render(self.tokenizer, messages, generation_prompt)
        except TemplateError as error:
            raise ChatTemplateError(f"conversation {name}: the chat template refuses it: {error}") from None


def _in_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, by their [start, end) characters (L, 2), touch one of the spans.

    Some tokenizers trim white space off offsets, and a token of white space alone is then empty at its end.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        touches = (end > first) & (start < last)
        inside |= np.where(start == end, (end > first) & (end <= last), touches)
    return inside


def _position(text: str, sentinel: str) -> int:
    if text.count(sentinel) != 1:
        raise ChatTemplateError(f"the chat template shows a message {text.count(sentinel)} times; it must show it once")
    return text.index(sentinel)


def _up_to_special(tokenizer: Any, text: str) -> str:
    ends = []
    for token in tokenizer.added_tokens_decoder.values():
        at = text.find(token.content)
        if token.special and at >= 0:
            ends.append((at, -len(token.content), at + len(token.content)))
    return text[: min(ends)[2]] if ends else text
