"""Files of packages as rows of a data set: in the hub's own schema where lm-eval has a task for it, else as `Item`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from evals.head import EvaluationError

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `query` is the whole prompt, `choices[gold]` the right continuation."""

    id: str
    cluster: str
    query: str
    choices: tuple[str, ...]
    gold: int

    def row(self) -> Row:
        return {**asdict(self), "choices": list(self.choices)}


def drawn(total: int, count: int, task: str, seed: int) -> list[int]:
    """Numbers of `count` of `total` items, drawn by task and seed and in order; all of them for 0."""
    if not count or count >= total:
        return list(range(total))
    return sorted(Random(f"{task} {seed}").sample(range(total), count))


def _hellaswag(path: Path) -> list[Row]:
    """Prompts as lm-eval's `hellaswag` makes them."""
    return [
        Item(
            case["id"],
            case["id"],
            _plain(f"{case['activity_label']}: {_capitalised_ending(case['ctx'])}"),
            tuple(_plain(e) for e in case["endings"]),
            case["expected_index"],
        ).row()
        for case in _lines(path)
    ]


def _capitalised_ending(context: str) -> str:
    """The harness joins two fields and capitalises the second, the fragment after the last full stop."""
    return re.sub(r"(?<=[.!?] )[a-z](?=[^.!?]*$)", lambda m: m[0].upper(), context)


def _plain(text: str) -> str:
    """Without WikiHow's mark-up, as lm-eval's `hellaswag` does it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _truthfulqa(path: Path) -> list[Row]:
    """Question and answer alone, unlike lm-eval's own task, whose six worked questions before each cost four times the
    reading; so these scores are not to be compared with published ones."""
    return [
        Item(
            case["id"],
            case["id"],
            f"Q: {case['question']}\nA:",
            tuple(case["choices"]),
            case["expected_index"],
        ).row()
        for case in _lines(path)
    ]


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


_WORKED = re.compile(
    r"Q: (?P<question>.*?)\n\(A\) (?P<A>.*?)\s+\(B\) (?P<B>.*?)\s+\(C\) (?P<C>.*?)\s+\(D\) (?P<D>.*?)\nA: .*?"
    r"The answer is \((?P<gold>[ABCD])\)",
    re.DOTALL,
)


def _mmlu(path: Path) -> list[Row]:
    """The development items, zero-shot, with prompts as lm-eval's `mmlu` makes them. They lie there as worked examples;
    the working is dropped, for it gives the answer away."""
    rows = []
    for subject, text in json.loads(path.read_text(encoding="utf-8")).items():
        opening = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for number, block in enumerate(re.split(r"\n\n(?=Q: )", text)[1:]):
            match = _WORKED.match(block)
            if match is None:
                continue
            options = "".join(f"\n{letter}. {match[letter].strip()}" for letter in "ABCD")
            query = f"{opening}{match['question'].strip()}{options}\nAnswer:"
            item = Item(f"{subject}-{number}", subject, query, tuple("ABCD"), "ABCD".index(match["gold"]))
            rows.append(item.row())
    return rows


_LOGIQA = re.compile(
    r"\s*Passage: (?P<context>.*?)\s*Question: (?P<question>.*)\n"
    r"A\. (?P<A>.*)\nB\. (?P<B>.*)\nC\. (?P<C>.*)\nD\. (?P<D>.*)\nAnswer:\s*",
    re.DOTALL,
)


def _logiqa(path: Path) -> list[Row]:
    """Conversations to the schema of EleutherAI/logiqa. The file has each of its questions twice: one is kept."""
    rows: dict[str, Row] = {}
    for number, case in enumerate(_lines(path), 1):
        asked = case["input"][-1]["content"]
        match = _LOGIQA.fullmatch(asked)
        if match is None:
            raise EvaluationError(f"logiqa: {path}:{number}: no passage, question and four options: {asked[:80]!r}")
        rows[asked] = {
            "label": case["ideal"].lower(),
            "context": match["context"].strip(),
            "question": match["question"].strip(),
            "options": [re.sub(rf"^{letter}\.\s*", "", match[letter]).strip() for letter in "ABCD"],
        }
    return list(rows.values())


def _squad(path: Path) -> list[Row]:
    """SQuAD 2.0's JSON to the schema of rajpurkar/squad: the questions that have an answer, which are version 1.1's."""
    return [
        {
            "id": question["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": question["question"].strip(),
            "answers": {
                "text": [a["text"] for a in question["answers"]],
                "answer_start": [a["answer_start"] for a in question["answers"]],
            },
        }
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
        if not question["is_impossible"]
    ]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    "hellaswag_100": _hellaswag,
    "truthfulqa_mc1_100": _truthfulqa,
    "mmlu_dev": _mmlu,
    "logiqa": _logiqa,
    "squad": _squad,
    "ifeval": _lines,
}
"""How the file that a task's own `wheel:` source names becomes rows."""


def _race(row: Row) -> Row:
    """The file has its problems as JSON; lm-eval's task reads the Python literal that the hub's script made of them."""
    problems = row["problems"]
    return row if isinstance(problems, str) else {**row, "problems": repr(problems)}


RESHAPED: dict[str, Callable[[Row], Row]] = {"race": _race}
"""What a row of the hub must become for lm-eval's task to read it."""
