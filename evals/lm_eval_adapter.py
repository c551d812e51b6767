"""Multiple-choice tasks by lm-eval's own code on a model in memory, with items from local files and no network.

lm-eval's `use_cache` is never used: its key leaves out the model, so a student would be served its teacher's answers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from evals.items import Item
from evals.loglikelihood import loglikelihoods

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

    from hybrid import HybridForCausalLM

METRICS = {"hellaswag_100": ("acc", "acc_norm"), "truthfulqa_mc1_100": ("acc",), "mmlu_dev": ("acc",)}
"""The metrics of lm-eval that each task is scored by; kept in code, so that a stage's key sees them."""


def evaluate_tasks(
    model: HybridForCausalLM, tokenizer: Any, tasks: Mapping[str, Sequence[Item]], batch_size: int
) -> list[dict[str, Any]]:
    """Rows, one record per item and metric, for {task: items}.

    The response is the choice taken: for `acc` the most probable, for `acc_norm` the most probable per character.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=False)
    loaded = manager.load([_definition(name, items) for name, items in tasks.items()])
    with redirect_stderr(StringIO()):  # bars that cannot be switched off
        results = evaluate(_harness_model(model, tokenizer, batch_size), loaded, bootstrap_iters=0, log_samples=True)
    return [r for name, samples in results["samples"].items() for sample in samples for r in _records(name, sample)]


def _definition(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """A zero-shot multiple-choice task as lm-eval's YAML files have it, with its items in place of a data set."""
    from datasets import Dataset

    data = {"test": Dataset.from_list([item.to_dict() for item in items])}
    return {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS[name]],
        "metadata": {"version": 1.0},
    }


def _harness_model(model: HybridForCausalLM, tokenizer: Any, batch_size: int) -> TemplateLM:
    from lm_eval.api.model import TemplateLM

    class HarnessModel(TemplateLM):
        """lm-eval asks in texts; this answers with our own model's log-probabilities."""

        @property
        def eot_token_id(self) -> int:
            return model.config.eos_token_ids[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [(context, continuation) for _, context, continuation in requests], batch_size)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("no task here needs rolling likelihoods; perplexity is in evals.fidelity")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("no task here generates text")

    return HarnessModel()


def _records(task: str, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    doc = sample["doc"]
    scores = [score for score, _ in sample["filtered_resps"]]
    by_metric = {"acc": scores, "acc_norm": [s / len(c) for s, c in zip(scores, doc["choices"], strict=True)]}
    return [
        {
            "benchmark": task,
            "item": doc["id"],
            "item_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"],
            "cluster": doc["cluster"],
            "metric": metric,
            "score": float(sample[metric]),
            "n": 1,
            "response": doc["choices"][max(range(len(scores)), key=by_metric[metric].__getitem__)],
        }
        for metric in sample["metrics"]
    ]
