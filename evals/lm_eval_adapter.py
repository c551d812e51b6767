"""The tasks of `evals.tasks` by lm-eval's own code on a model in memory, with items in memory and no network.

lm-eval's `use_cache` is never used: its key leaves out the model, so a student would be served its teacher's answers.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import lm_eval.tasks
import numpy as np
from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from corpora import chat
from evals import data
from evals.benchmark import Found, Subject
from evals.generation import replies
from evals.head import EvaluationError
from evals.items import drawn
from evals.loglikelihood import loglikelihoods, too_long
from evals.rows import excerpt
from evals.tasks import FOLDER, TASKS, Task, ifeval, squad, truthfulqa, zeroeval

logger = logging.getLogger(__name__)

HARNESS = Path(lm_eval.tasks.__file__).parent
SHOTS_SEED = 1234
"""lm-eval's own default for the choice of worked examples."""
SCORERS: dict[str, Callable[[Mapping[str, Any], Sequence[Any]], dict[str, Any]]] = {
    "truthfulqa_mc2": truthfulqa.mc2,
    "squad": squad.score,
    "ifeval": ifeval.score,
    "gsm8k": zeroeval.gsm8k,
    "crux": zeroeval.crux,
}
"""What scores an item in place of lm-eval: {metric: a number, or a list of them that weigh the same}."""


class Settings(Protocol):
    """What is read of the configuration's section `benchmark`."""

    @property
    def items_per_task(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def data(self) -> Mapping[Any, str]: ...


def measure_task(subject: Subject, task: str, config: Settings) -> Found:
    """Rows of a task, and its entry of summary.json.

    Records: the task's metrics by item, and for choices `confidence`, the probability of the chosen answer among those
    given (softmax of their log-probabilities, of which `acc` takes the largest). Response: the choice taken, or what
    the model wrote. Summary: {metric: mean, "n", "chance": of guessing or None, "harness"}, and "too_long" where there
    are any: items whose prompt lost its beginning (choices), or was not read and counts as without a reply (text).

    The items are the same for teacher and student, and so is the context: what the smaller of the two allows. A
    teacher that was measured by itself may have read more of a long prompt than its student can; such an item has
    another prompt_hash, and the two are then not compared. Raises EvaluationError where data, packages or the version
    of lm-eval's task are not as needed.
    """
    spec = TASKS[task]
    rows = data.load(spec, config.data.get(task, ""))
    chosen = drawn(len(rows[spec.split]), config.items_per_task, task, subject.seed)
    parts = _parts(spec, rows, chosen)
    asked = _Asked(subject, spec, config.max_new_tokens)
    with _quiet_and_offline():
        loaded = TaskManager(include_defaults=False).load(
            [_definition(spec, part, value, rows) for value, part in parts.items()]
        )
        for harness_task in loaded["tasks"].values():
            harness_task.set_fewshot_seed(SHOTS_SEED)
        found = evaluate(asked, loaded, bootstrap_iters=0, log_samples=True, apply_chat_template=spec.chat)["samples"]
    records, chances, hashes = [], [], []
    for value, part in parts.items():
        name = _part_name(spec, value)
        for sample in found[name]:
            number = part[sample["doc_id"]]
            choices = loaded["tasks"][name].doc_to_choice(sample["doc"]) if spec.kind == "choice" else []
            how = [str(asked.new_tokens)] if asked.new_tokens else []
            if (name, sample["doc_id"]) in asked.too_long:
                how.append(f"within {asked.context}")
            records += _records(spec, rows[spec.split][number], number, sample, choices, how)
            chances += [1 / len(choices)] if choices else []
            hashes.append(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
    summary: dict[str, Any] = {metric: _mean(records, metric) for metric in spec.metrics}
    summary["n"] = len(chosen)
    summary["chance"] = sum(chances) / len(chances) if spec.calibrated else None
    summary["harness"] = {
        "version": version("lm_eval"),
        "task_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "shots": spec.shots,
        "chat_template": spec.chat,
    } | ({"new_tokens": asked.new_tokens} if asked.new_tokens else {})
    if asked.too_long:
        summary["too_long"] = len(asked.too_long)
        logger.warning(
            "%s: %d of %d items have more tokens than the context of %d: %s",
            task, len(asked.too_long), len(chosen), asked.context,
            "their prompts lost the beginning" if spec.kind == "choice" else "they count as without a reply",
        )  # fmt: skip
    return Found(records, summary)


def _parts(spec: Task, rows: Mapping[str, Sequence[data.Row]], chosen: Sequence[int]) -> dict[str, list[int]]:
    """{value of the column that splits the task, or "": numbers of the chosen rows}."""
    if not spec.by:
        return {"": list(chosen)}
    parts: dict[str, list[int]] = {}
    for number in chosen:
        parts.setdefault(rows[spec.split][number][spec.by], []).append(number)
    return parts


def _part_name(spec: Task, value: str) -> str:
    return f"{spec.name}_{value}" if value else spec.name


def _definition(spec: Task, part: Sequence[int], value: str, rows: Mapping[str, Sequence[data.Row]]) -> dict[str, Any]:
    """A task as lm-eval's YAML files have it, with its items in place of a data set."""
    own = "/" not in spec.definition
    scorer = SCORERS.get(spec.name)
    made = load_yaml((FOLDER if own else HARNESS) / spec.definition, resolve_func=scorer is None)
    found = str((made.get("metadata") or {}).get("version", ""))
    if not own and found != spec.version:
        raise EvaluationError(
            f"{spec.name}: lm-eval {version('lm_eval')} has version {found} of this task, and scores here are those of "
            f"version {spec.version}: install lm-eval 0.4.13"
        )
    items = {"items": Dataset.from_list([rows[spec.split][number] for number in part])}
    if spec.shots:
        shots = [row for row in rows[spec.shots_split] if not value or row[spec.by] == value]
        items["shots"] = Dataset.from_list(shots)
    made |= {
        "task": _part_name(spec, value),
        "custom_dataset": lambda **_: items,
        "training_split": None,
        "validation_split": None,
        "test_split": "items",
        "fewshot_split": "shots" if spec.shots else None,
        "num_fewshot": spec.shots,
    }
    if spec.by:  # as each of lm-eval's files of MMLU's subjects has it
        subject = value.replace("_", " ")
        made["description"] = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    if scorer:
        made["process_results"] = scorer
        made["metric_list"] = [
            {"metric": m, "aggregation": _pooled, "higher_is_better": m != "no_answer"} for m in spec.metrics
        ]
    return made


def _pooled(values: Sequence[Any]) -> float:
    """Mean of all numbers, of lists of them too; what lm-eval makes of it is not used."""
    return float(np.mean(np.concatenate([np.atleast_1d(v) for v in values])))


def _mean(records: Sequence[Mapping[str, Any]], metric: str) -> float:
    scores, weights = zip(*((r["score"], r["n"]) for r in records if r["metric"] == metric), strict=True)
    return float(np.average(scores, weights=weights))


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """lm-eval's bars cannot be switched off. What libraries would fetch is refused, whatever the user has set."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Asked(TemplateLM):
    """lm-eval asks in texts; this answers with our own model's log-probabilities and greedy replies.

    context: tokens of prompt and answer together. too_long: (task, number of the item) where they are more.
    new_tokens: that a reply may have; 0 where none is written.
    """

    def __init__(self, subject: Subject, spec: Task, max_new_tokens: int) -> None:
        super().__init__()
        self.subject, self.spec, self.max_new_tokens, self.new_tokens = subject, spec, max_new_tokens, 0
        self.context = subject.context
        self.items: list[tuple[str, int]] = []
        self.too_long: set[tuple[str, int]] = set()

    @property
    def eot_token_id(self) -> int:
        return self.subject.model.config.eos_token_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return ""  # names a cache of requests, which is not used

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat.render(self.subject.tokenizer, chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What a chat template writes has its special tokens already."""
        special = not self.spec.chat if add_special_tokens is None else add_special_tokens
        return list(self.subject.tokenizer(string, add_special_tokens=special)["input_ids"])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.items = [(r.task_name, r.doc_id) for r in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self.too_long |= {item for item, pair in zip(self.items, pairs, strict=True) if too_long(pair, self.context)}
        return loglikelihoods(self.subject.model, pairs, self.subject.batch_size, self.context, self._progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task here needs rolling likelihoods; perplexity is in evals.fidelity")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy. Settings are those of the first request: a task's requests all have the same."""
        settings = requests[0].args[1]
        self.new_tokens = min(settings["max_gen_toks"], self.max_new_tokens or settings["max_gen_toks"])
        subject = self.subject
        prompts = [self.tok_encode(r.args[0]) for r in requests]
        made = replies(subject.model, prompts, self.new_tokens, subject.batch_size, self.context, self._progress)
        self.too_long |= {(r.task_name, r.doc_id) for r, reply in zip(requests, made, strict=True) if reply is None}
        return [self._text(reply, settings["until"]) for reply in made]

    def _text(self, reply: Sequence[int] | None, until: Sequence[str]) -> str:
        """A reply up to the first of the texts that end it."""
        text = str(self.subject.tokenizer.decode(list(reply or ()), skip_special_tokens=True))
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]

    def _progress(self, share: float) -> None:
        self.subject.progress(share, self.spec.name)


def _records(
    spec: Task,
    row: Mapping[str, Any],
    number: int,
    sample: Mapping[str, Any],
    choices: Sequence[str],
    how: Sequence[str],
) -> list[dict[str, Any]]:
    """how: limits that were part of what was asked. Replies of unlike lengths must not be compared, nor prompts of
    which one model read more than the other."""
    prompt_hash = sample["prompt_hash"]
    if how:
        prompt_hash = hashlib.sha256(" ".join([prompt_hash, *how]).encode()).hexdigest()
    shared = {
        "benchmark": spec.name,
        "item": str(row[spec.item]) if spec.item else str(number),
        "item_hash": sample["doc_hash"],
        "prompt_hash": prompt_hash,
    }
    shared["cluster"] = _cluster(row[spec.cluster]) if spec.cluster else shared["item"]
    if spec.kind == "text":
        said = {metric: sample["filtered_resps"][0] for metric in spec.metrics}
        values = {metric: sample[metric] for metric in spec.metrics}
    else:
        scores = np.array([score for score, _ in sample["filtered_resps"]])
        per_character = scores / np.array([len(choice) for choice in choices])
        said = {m: choices[int(np.argmax(per_character if m == "acc_norm" else scores))] for m in spec.metrics}
        values = {metric: sample[metric] for metric in spec.metrics}
        if spec.calibrated:
            said["confidence"] = choices[int(np.argmax(scores))]
            values["confidence"] = 1 / float(np.exp(scores - scores.max()).sum())
    asked = row[spec.question] if spec.question else sample["arguments"][0][0]
    return [
        {
            **shared,
            "metric": metric,
            "score": float(np.mean(value)),
            "n": int(np.size(value)),
            "response": said[metric],
            "prompt": excerpt(str(asked), end=not spec.question) if metric == spec.metrics[0] else "",
        }
        for metric, value in values.items()
    ]


def _cluster(value: Any) -> str:
    """A short name as it is, a passage by its hash."""
    text = str(value)
    return text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()[:16]
