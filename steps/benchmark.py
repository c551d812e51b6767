"""Measure a teacher, or a student beside it: fidelity, multiple-choice tasks, decoding cost, sample answers.

The teacher is measured once; every student is then compared with the teacher's rows, item by item.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.config import BenchmarkConfig
from steps.stage import Progress, StageContext

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

DECODE_PROMPT_TOKENS = 16
PLAIN_TEXTS = ("held_out_text", "natural")
"""Documents of the corpus that are no conversations, where it holds them: the teacher's own, and what neither wrote."""
# One metric per benchmark enters the comparison: (metric, higher is better). δ counts accuracy, or nats of nll.
PRIMARY = {
    "held_out": ("nll", False),
    "held_out_text": ("nll", False),
    "natural": ("nll", False),
    "hellaswag_100": ("acc_norm", True),
    "truthfulqa_mc1_100": ("acc", True),
    "mmlu_dev": ("acc", True),
}


def run(config: BenchmarkConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Roles: teacher, corpus; student and teacher_rows (the teacher's own benchmark) to measure a student.

    Writes rows.parquet, summary.json, samples.jsonl and, for a student, comparison.json. Returns the summary.
    """
    import torch
    from transformers import AutoTokenizer

    from evals import efficiency, fidelity, rows
    from evals.items import load_items
    from evals.lm_eval_adapter import evaluate_tasks
    from hybrid import load_pretrained
    from steps.device import hardware

    name = "student" if "student" in inputs else "teacher"
    dtype = getattr(torch, context.compute)
    model = load_pretrained(inputs[name], context.device, dtype)
    teacher = load_pretrained(inputs["teacher"], context.device, dtype) if name == "student" else None
    tokenizer = AutoTokenizer.from_pretrained(inputs["teacher"])
    held_out = inputs["corpus"] / "held_out.npz"
    texts = {
        "held_out": fidelity.conversation_blocks(
            held_out, config.held_out_conversations, config.seq_len, config.skip_positions
        )
    }
    for text in PLAIN_TEXTS if config.natural_tokens else ():
        if (shard := inputs["corpus"] / f"{text}.npz").is_file():
            texts[text] = fidelity.text_blocks(shard, config.natural_tokens, config.seq_len)
    progress = _Parts(context, len(texts) + len(config.tasks) + len(config.decode_batches) + bool(config.samples))

    records: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": name, "fidelity": {}, "tasks": {}, "decode": []}
    for benchmark, blocks in texts.items():
        scores = fidelity.token_scores(model, blocks, teacher, batch_size=config.batch_size)
        summary["fidelity"][benchmark] = fidelity.summarise(scores)
        records += fidelity.score_records(scores, benchmark)
        progress.done(f"{benchmark} ppl", summary["fidelity"][benchmark]["ppl"])
    del teacher

    for task in config.tasks:
        items = load_items(task, config.items_per_task, context.seed)
        found = evaluate_tasks(model, tokenizer, {task: items}, config.batch_size)
        records += found
        chance = sum(1 / len(item.choices) for item in items) / len(items)
        summary["tasks"][task] = rows.mean_scores(rows.table(found, name), task) | {"chance": chance}
        progress.done(f"{task} acc", summary["tasks"][task]["acc"])
    frame = rows.table(records, name)
    frame.to_parquet(out / "rows.parquet", index=False)

    prompts = first_turns(held_out, config.seq_len) if config.decode_batches or config.samples else []
    for batch in config.decode_batches:
        beginnings = [prompts[i % len(prompts)][:DECODE_PROMPT_TOKENS] for i in range(batch)]
        summary["decode"].append(efficiency.decode_speed(model, beginnings, config.decode_tokens))
        progress.done(f"tokens/s at batch {batch}", summary["decode"][-1]["tokens_per_second"])
    summary["state_bytes"] = efficiency.state_bytes(model)
    summary["device"] = str(hardware(context.device)["name"])

    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for sample in _answers(model, tokenizer, prompts[: config.samples], config.sample_tokens):
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    if config.samples:
        progress.done("samples", config.samples)
    if "teacher_rows" in inputs:
        import pandas as pd

        teacher_rows = pd.read_parquet(inputs["teacher_rows"] / "rows.parquet")
        _write(out / "comparison.json", _compare(teacher_rows, frame, config.non_inferiority))
    _write(out / "summary.json", summary)
    return summary


def first_turns(shard: Path, max_tokens: int) -> list[list[int]]:
    """Tokens of each conversation up to its first reply, in the shard's order, none twice: the same for every model.

    Raises EvaluationError if no conversation has a reply within max_tokens.
    """
    from corpora import preferences
    from corpora.shards import Shard
    from evals.head import EvaluationError

    prompts = dict.fromkeys(tokens for _, tokens in preferences.prompts(Shard.load(shard), max_tokens))
    if not prompts:
        raise EvaluationError(
            f"{shard}: no conversation has a reply that begins within {max_tokens} tokens; "
            "give the corpus stage conversations with user and assistant messages"
        )
    return [list(p) for p in prompts]


def _answers(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[dict[str, str]]:
    """Greedy answers to all prompts, as text."""
    from hybrid.generate import generate

    if not prompts:
        return []
    replies = generate(model, prompts, new_tokens)
    return [
        {"prompt": _user_text(tokenizer, prompt), "response": tokenizer.decode(reply, skip_special_tokens=True).strip()}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def _user_text(tokenizer: Any, prompt: list[int]) -> str:
    """The user's words in a rendered prompt; the whole prompt where it does not open as the template does by itself."""
    from corpora import chat

    text = tokenizer.decode(prompt)
    opening = chat.opening(tokenizer)
    closing = chat.render(tokenizer, [{"role": "user", "content": "u"}], generation_prompt=True)[len(opening) + 1 :]
    if text.startswith(opening) and text.endswith(closing):
        return text.removeprefix(opening).removesuffix(closing).strip()
    return text


def _compare(teacher_rows: pd.DataFrame, student_rows: pd.DataFrame, delta: float) -> list[dict[str, Any]]:
    """Paired comparisons of all benchmarks that have an interval, with p-values adjusted over them as one family."""
    from evals.stats import compare, holm

    found = []
    for benchmark, (metric, higher_is_better) in PRIMARY.items():
        clusters = student_rows[student_rows.benchmark == benchmark].cluster.nunique()
        if clusters == 1:
            logger.warning("%s: all tokens are of one document, so there is no interval and no comparison", benchmark)
        if clusters > 1:
            found.append(
                compare(teacher_rows, student_rows, benchmark, metric, delta, higher_is_better=higher_is_better)
            )
    adjusted = holm([c["p"] for c in found])
    return [{**c, "p_holm": p} for c, p in zip(found, adjusted, strict=True)]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class _Parts:
    """Progress by finished parts: texts, tasks, speeds, samples."""

    def __init__(self, context: StageContext, total: int):
        self.context, self.total = context, total
        self.finished, self.begin = 0, time.monotonic()

    def done(self, figure: str, value: float) -> None:
        self.finished += 1
        rate = self.finished / max(time.monotonic() - self.begin, 1e-9)
        self.context.progress(Progress(self.finished, self.total, "parts", rate, {figure: value}))
