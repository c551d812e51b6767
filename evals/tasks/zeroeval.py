"""Scores of GSM8K and CRUX as ZeroEval gives them: the `answer` of a JSON object that the model was asked to write.

What a model writes is parsed, never run: ZeroEval's own scorer calls `eval` for fractions; here they are divided.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_DECODER = json.JSONDecoder(strict=False)  # line breaks inside strings are common and harmless
_KEYED = re.compile(r'"?answer"?\s*:\s*(?:"(?P<quoted>[^"]*)"|(?P<bare>[^",\s}]+))')
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)")


def answer(text: str) -> Any:
    """The value of `answer` in the first JSON object of a reply that has one, else what stands behind the word as a key
    in broken JSON; None if there is neither."""
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = _DECODER.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if "answer" in found:
            return found["answer"]
    keyed = _KEYED.search(text)
    return (keyed["quoted"] if keyed["bare"] is None else keyed["bare"]) if keyed else None


def number(value: Any) -> float | None:
    """The first number in an answer, currency signs and thousands separators aside; a/b is divided."""
    text = str(value).replace("$", "").replace(",", "").strip()
    if (fraction := _FRACTION.fullmatch(text)) and float(fraction[2]):
        return float(fraction[1]) / float(fraction[2])
    found = _NUMBER.search(text)
    return float(found[0]) if found else None


def gsm8k(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """acc: the answer's first number is that after the solution's `####`. no_answer: there is no answer to be found."""
    said = answer(results[0])
    return _scored(said, said is not None and number(said) == number(doc["answer"].split("####")[-1]))


def crux(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """acc: the answer is the value that the function returns. A string may stand there without its quotation marks, as
    JSON has its own."""
    said, expected = answer(results[0]), doc["output"]
    return _scored(said, said is not None and (str(said) == expected or _same(_value(said), _value(expected))))


def _scored(said: Any, right: bool) -> dict[str, float]:
    return {"acc": float(right), "no_answer": float(said is None)}


def _value(text: Any) -> Any:
    """The value of a Python literal; other texts stand for themselves. `literal_eval` knows no names and no calls."""
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _same(a: Any, b: Any) -> bool:
    """Equal and of one type: True is not 1."""
    return type(a) is type(b) and bool(a == b)
