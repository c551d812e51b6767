"""Tokens of a reply to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
"""What bytes that are no character decode to; at the end of a text, the rest may be in the next token."""


class ReplyText:
    """Text of a growing reply, given out as soon as no later token can change it.

    before: tokens that the reply continues, for tokenizers whose first token loses its space. stop: strings at the
    first of which the reply ends; neither they nor what follows is given out, and `stopped` becomes True.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(before)
        # Tokens from `_context` on are decoded together; those before `_read` are text already.
        self._context, self._read = 0, len(self._tokens)
        self._held = ""

    def add(self, token: int) -> str:
        """What this token makes certain, often nothing."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._released(new)

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._released(self._new()) + self._held  # nothing, if it was stopped
        self._read, self._held = len(self._tokens), ""
        return text

    def _new(self) -> str:
        known = self._decoded(self._tokens[self._context : self._read])
        return self._decoded(self._tokens[self._context :])[len(known) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _released(self, new: str) -> str:
        """All but what may be the beginning of a stop string."""
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        if found := [at for at in map(text.find, self._stop) if at >= 0]:
            self.stopped = True
            return text[: min(found)]
        begun = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]
