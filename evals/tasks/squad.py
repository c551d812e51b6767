"""SQuAD's exact match and F1 (1606.05250, section 6.1) of one answer against several right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(said: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it comes."""
    ours, theirs = words(said), words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The best over the right answers, by each metric. contains: one of them stands in the reply, as it does in whole
    sentences, which small models give (Arora et al., 2402.18668)."""
    said, answers = f" {' '.join(words(results[0]))} ", doc["answers"]["text"]
    return {
        "f1": max(f1(results[0], a) for a in answers),
        "exact": float(any(words(results[0]) == words(a) for a in answers)),
        "contains": float(any(f" {' '.join(words(a))} " in said for a in answers)),
    }
