"""Needle in a haystack: one fact somewhere in a long text, and a question for it at the end.

Kamradt's test (2023) as a grid of length and depth with many facts a cell. A fact is a random number, so nothing but
reading gives the answer, and an answer is right or wrong; overlap of words, as the released code of 2408.15237 scores
it, has a floor far above 0 and a ceiling below 1. Every model is asked by its own chat template.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any, Literal, Protocol

import numpy as np

from corpora import chat
from corpora.shards import Shard
from evals.benchmark import Found, Subject
from evals.generation import replies
from evals.head import EvaluationError
from evals.rows import excerpt

NEEDLE = "The magic number of {city} is {number}."
TASK = (
    "A magic number is hidden in the text below. Remember it: you will be asked for it.\n\n{text}\n\n"
    "What is the magic number of {city}? Answer with the number only."
)
DIGITS = 7
_CITIES, _WHICH, _THINGS, _VERBS = (
    words.split()
    for words in (
        "Accra Almaty Antwerp Asmara Bergen Bilbao Bogota Brno Cairo Cardiff Cork Cusco Dakar Darwin Dhaka Dublin Fez "
        "Gdansk Genoa Ghent Graz Hanoi Harare Havana Hobart Izmir Jaipur Kigali Krakow Kyoto Lagos Leipzig Lima Lisbon "
        "Lusaka Lyon Malaga Manila Maputo Medellin Minsk Mombasa Montevideo Nagoya Nairobi Nantes Oslo Osaka Perth "
        "Porto Quito Riga Rosario Sapporo Seville Sofia Tallinn Tampere Tbilisi Tirana Toledo Tromso Turin Utrecht",
        "amber broken clever distant empty faded gentle hollow narrow patient quiet rusty silver tiny woollen",
        "bridge candle carpet garden harbour kettle ladder lantern market mirror orchard pillow river saddle tunnel",
        "admires borrows carries follows forgets guards hides ignores misses paints repairs shadows visits watches",
    )
)
LONGEST_SENTENCE = 64
"""Tokens of a sentence that a haystack may have; prompts come so near to the length that is asked for."""


class Settings(Protocol):
    """See `NeedleConfig` in steps/config.py."""

    lengths: list[int]
    depths: list[float]
    seeds: int
    haystack: Literal["natural", "words"]
    answer_tokens: int
    threshold: float


@dataclass(frozen=True)
class Question:
    """text: what the user says, haystack and all. prompt: that in the model's template. number: the answer."""

    length: int
    depth: float
    seed: int
    number: str
    text: str
    prompt: list[int]

    @property
    def cell(self) -> str:
        return f"{self.length}/{self.depth:g}"


def measure(subject: Subject, config: Settings) -> Found:
    """config.seeds questions for every length and depth, answered greedily: is the number in the answer?

    A length is the most tokens that prompt and answer may have together, template included. effective_length is the
    longest length at which the share found over all depths is at least config.threshold, as at all shorter ones; None
    if there is none. Lengths beyond the model's max_position_embeddings are measured like all others.

    Records: benchmark "needle", metric "found" (0 or 1), one a question; the cell is the cluster. Raises
    EvaluationError for a length without room for the question and where there is too little text, ShardError where
    natural.npz is wanted and missing.
    """
    asked = questions(subject, config)
    records: list[dict[str, Any]] = []
    phrase = "needles"
    for done, length in enumerate(config.lengths):
        batch = [question for question in asked if question.length == length]
        tell = partial(_tell, subject, config.lengths, done, phrase)
        answers = replies(
            subject.model, [q.prompt for q in batch], config.answer_tokens, subject.batch_size, length, tell
        )
        found = [_record(subject, question, reply) for question, reply in zip(batch, answers, strict=True)]
        records += found
        phrase = f"{sum(r['score'] for r in found):.0f}/{len(found)} needles in {length} tokens"
    subject.progress(1.0, phrase)
    cells = [
        {"length": length, "depth": depth, "k": int(sum(scores)), "n": len(scores)}
        for length in config.lengths
        for depth in config.depths
        if (scores := [r["score"] for r in records if r["cluster"] == f"{length}/{depth:g}"])
    ]
    return Found(
        records,
        {
            "train_length": subject.train_length,
            "max_position_embeddings": subject.model.config.max_position_embeddings,
            "haystack": config.haystack,
            "seeds": config.seeds,
            "lengths": config.lengths,
            "depths": config.depths,
            "threshold": config.threshold,
            "cells": cells,
            "effective_length": effective_length(cells, config.threshold),
        },
    )


def effective_length(cells: Sequence[Mapping[str, Any]], threshold: float) -> int | None:
    """Longest length at which, as at all shorter ones, Σk / Σn over the depths is at least `threshold`."""
    longest = None
    for length in sorted({cell["length"] for cell in cells}):
        row = [cell for cell in cells if cell["length"] == length]
        if sum(cell["k"] for cell in row) < threshold * sum(cell["n"] for cell in row):
            break
        longest = length
    return longest


def is_found(number: str, answer: str) -> bool:
    """Whether the answer has exactly this number in it; commas between its thousands are allowed."""
    return number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer))


def questions(subject: Subject, config: Settings) -> list[Question]:
    """By length, then depth, then seed. What is drawn depends on these and on the subject's seed alone, so teacher and
    student are asked the same.

    A depth is the share of the haystack's tokens that precede the needle, as near as sentences allow.
    """
    sentences = _natural(subject) if config.haystack == "natural" else _words(subject.seed, max(config.lengths))
    haystack = _Haystack(subject.tokenizer, sentences)
    return [
        _question(subject, config, haystack, length, depth, seed)
        for length in config.lengths
        for depth in config.depths
        for seed in range(config.seeds)
    ]


def _question(
    subject: Subject, config: Settings, haystack: _Haystack, length: int, depth: float, seed: int
) -> Question:
    random = Random(f"needle {subject.seed} {length} {depth:g} {seed}")
    city = random.choice(_CITIES)
    number = str(random.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    needle = NEEDLE.format(city=city, number=number)
    room = length - config.answer_tokens - len(_prompt(subject.tokenizer, TASK.format(text=needle, city=city)))
    if room < 0:
        raise EvaluationError(
            f"the question alone and an answer of {config.answer_tokens} tokens need {length - room} tokens: drop "
            f"{length} from benchmark.needle.lengths"
        )
    sentences, sizes = haystack.draw(random, room, city)
    while True:
        ends = np.array([0, *accumulate(sizes)])
        place = int(np.abs(ends - depth * ends[-1]).argmin())
        text = TASK.format(text=" ".join([*sentences[:place], needle, *sentences[place:]]), city=city)
        prompt = _prompt(subject.tokenizer, text)
        if len(prompt) + config.answer_tokens <= length:
            return Question(length, depth, seed, number, text, prompt)
        sentences, sizes = sentences[:-1], sizes[:-1]  # joined, a few sentences have more tokens than each by itself


def _prompt(tokenizer: Any, text: str) -> list[int]:
    rendered = chat.render(tokenizer, [{"role": "user", "content": text}], generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


class _Haystack:
    """Sentences of at most LONGEST_SENTENCE tokens to draw stretches from."""

    def __init__(self, tokenizer: Any, sentences: Sequence[str]) -> None:
        encoded = tokenizer([f" {s}" for s in sentences], add_special_tokens=False)["input_ids"] if sentences else []
        pairs = [(s, len(ids)) for s, ids in zip(sentences, encoded, strict=True) if len(ids) <= LONGEST_SENTENCE]
        self.sentences, self.sizes = [s for s, _ in pairs], [size for _, size in pairs]

    def draw(self, random: Random, room: int, city: str) -> tuple[list[str], list[int]]:
        """Consecutive sentences of `room` tokens at most from a random one on, with the tokens of each; the first
        follows on the last. Those that name the city are left out."""
        if sum(self.sizes) < room:
            raise EvaluationError(
                f"the haystack has {sum(self.sizes)} tokens in sentences of up to {LONGEST_SENTENCE}, but {room} are "
                "needed: give corpus.natural_text more text, drop the longest of benchmark.needle.lengths, or set "
                'benchmark.needle.haystack to "words"'
            )
        first = random.randrange(len(self.sentences))
        sentences: list[str] = []
        sizes: list[int] = []
        for i in (*range(first, len(self.sentences)), *range(first)):
            if city in self.sentences[i]:
                continue
            room -= self.sizes[i]
            if room < 0:
                break
            sentences.append(self.sentences[i])
            sizes.append(self.sizes[i])
        return sentences, sizes


def _natural(subject: Subject) -> list[str]:
    """Sentences of all documents of natural.npz in order, cut at full stops, question and exclamation marks and lines'
    ends."""
    shard = Shard.load(subject.corpus / "natural.npz")
    texts = [str(subject.tokenizer.decode(shard.document(i).tolist())) for i in range(len(shard))]
    parts = re.split(r"(?<=[.?!])\s+|\n+", "\n".join(texts))
    return [" ".join(part.split()) for part in parts if part.strip()]


def _words(seed: int, count: int) -> list[str]:
    """`count` sentences such as "The silver kettle follows the quiet river.", each of which has seven words."""
    random = Random(f"haystack {seed}")

    def thing() -> str:
        return f"the {random.choice(_WHICH)} {random.choice(_THINGS)}"

    return [f"{thing()} {random.choice(_VERBS)} {thing()}.".capitalize() for _ in range(count)]


def _tell(subject: Subject, lengths: Sequence[int], done: int, phrase: str, share: float) -> None:
    """How far all lengths are, by tokens, when `done` of them are finished and `share` of the next."""
    subject.progress((sum(lengths[:done]) + share * lengths[done]) / sum(lengths), phrase)


def _record(subject: Subject, question: Question, reply: list[int] | None) -> dict[str, Any]:
    assert reply is not None, f"prompt of {len(question.prompt)} tokens does not fit into {question.length}"
    answer = str(subject.tokenizer.decode(reply, skip_special_tokens=True)).strip()
    return {
        "benchmark": "needle",
        "item": f"{question.cell}/{question.seed}",
        "item_hash": hashlib.sha256(question.text.encode()).hexdigest(),
        "prompt_hash": hashlib.sha256(np.array(question.prompt, "<u4").tobytes()).hexdigest(),
        "cluster": question.cell,
        "metric": "found",
        "score": float(is_found(question.number, answer)),
        "n": 1,
        "response": answer,
        "prompt": excerpt(question.text, end=True),
    }
