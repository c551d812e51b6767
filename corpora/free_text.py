"""Text of the teacher's own that is no conversation: what it says after the token that begins a document.

A chat model was trained on more than chat, and what a student loses there shows in no conversation. Rows are sampled
without a stop and taken apart where a document ends, so that no row waits for another; what is kept are the tokens as
they were drawn, since other tokens of the same text are not what the teacher said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from corpora import chat
from corpora.self_chat import BARREN_BATCHES, Generate, Sampler

_TURNS = ("user", "assistant", "user")


class FreeTextError(ValueError):
    """Documents that cannot be sampled; the message says which setting to change."""


@dataclass
class Tally:
    """What sampling has given so far. dropped: documents without text; duplicates: that had been drawn before."""

    kept: int = 0
    dropped: int = 0
    duplicates: int = 0
    tokens: int = 0


def start_token(tokenizer: Any, name: str = "") -> int:
    """The id of the token that documents begin with: `name`, else what the tokenizer shows.

    That is the special token which the tokenizer puts before plain text (Llama, Mistral), else the first of its bos,
    eos, unk and pad tokens that the chat template does not write: `<|endoftext|>` of SmolLM2 and Qwen, whose bos and
    eos tokens open and close turns. Raises FreeTextError if the vocabulary lacks `name`, or there is no such token.
    """
    if name:
        if name not in tokenizer.get_vocab():
            raise FreeTextError(f"corpus.free_text.start_token is {name!r}, which is no token of the teacher's")
        return int(tokenizer.get_vocab()[name])
    before = tokenizer("a")["input_ids"][0]
    if before in chat.special_ids(tokenizer):
        return int(before)
    turns = _turn_tokens(tokenizer)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id):
        if token is not None and token not in turns:
            return int(token)
    raise FreeTextError(
        "the teacher's tokenizer puts no token before plain text, and its bos, eos, unk and pad tokens all belong to "
        "the chat template: name the token that documents begin with in corpus.free_text.start_token"
    )


def stop_tokens(tokenizer: Any, start: int, eos_token_ids: Iterable[int] = ()) -> frozenset[int]:
    """What ends a document: the token that begins the next one, the model's own ends, and all markup of turns."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset({start, *own, *eos_token_ids} | _turn_tokens(tokenizer))


def _turn_tokens(tokenizer: Any) -> set[int]:
    """Special tokens that the chat template writes."""
    text = chat.render(tokenizer, [{"role": role, "content": "a"} for role in _TURNS], generation_prompt=True)
    return set(tokenizer(text, add_special_tokens=False)["input_ids"]) & chat.special_ids(tokenizer)


def split(row: np.ndarray, start: int, stop: Iterable[int]) -> list[np.ndarray]:
    """The documents of a sampled row (L,): from each `start` up to and with the next token of `stop`, or the row's end.

    What follows a stop up to the next start belongs to no document.
    """
    ends = np.flatnonzero(np.isin(row, list(stop)))
    documents = []
    for begin in np.flatnonzero(row == start):
        later = ends[np.searchsorted(ends, begin, side="right") :]
        documents.append(row[begin : later[0] + 1 if len(later) else len(row)])
    return documents


def sample(
    generate: Generate,
    model: Any,
    start: int,
    stop: frozenset[int],
    documents: int,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    tally: Tally | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """(id, tokens) of `documents` different documents, uint32 (L,) with L ≤ sampler.max_tokens, `start` included.

    start, stop: of `start_token` and `stop_tokens`; stop must hold start. Documents with no token between the two are
    dropped, such as came before are counted as duplicates. Each batch has a seed of its own from (seed, number of the
    batch), so the result depends on the batch size too. Raises FreeTextError after BARREN_BATCHES batches in a row that
    added nothing.
    """
    tally = tally or Tally()
    seen: set[bytes] = set()
    batch, barren = 0, 0
    while tally.kept < documents:
        # The last number keeps these draws apart from those of self-chat under the same seed.
        batch_seed = int(np.random.SeedSequence([seed, batch, 1]).generate_state(1)[0])
        rows = generate(
            model,
            [[start]] * batch_size,
            sampler.max_tokens - 1,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            seed=batch_seed,
            eos_token_ids=(),
        )
        found: list[tuple[str, np.ndarray]] = []
        for number, row in enumerate(rows, batch * batch_size):
            for part, tokens in enumerate(split(np.array([start, *row], np.uint32), start, stop)):
                if tally.kept == documents:
                    break
                key = hashlib.sha256(tokens.tobytes()).digest()
                if np.isin(tokens, list(stop)).all():
                    tally.dropped += 1
                elif key in seen:
                    tally.duplicates += 1
                else:
                    seen.add(key)
                    tally.kept += 1
                    tally.tokens += len(tokens)
                    found.append((f"freetext-{seed}-{number:06d}.{part}", tokens))
        yield from found  # after the whole batch, so that the tally is right for whoever shows progress
        batch += 1
        barren = 0 if found else barren + 1
        if barren == BARREN_BATCHES:
            raise FreeTextError(
                f"{BARREN_BATCHES} batches of {batch_size} rows added no document to the {tally.kept} of {documents} "
                f"({tally.dropped} without text, {tally.duplicates} duplicates): raise corpus.free_text.temperature or "
                "top_p, or name another corpus.free_text.start_token"
            )
