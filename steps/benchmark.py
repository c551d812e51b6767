"""Measure a teacher, or a student beside it: fidelity, tasks, long context, cost of decoding, a judge's opinion.

The teacher is measured once; every student is then compared with the teacher's rows, item by item. The benchmarks run
one after another. One that fails is named in the summary and the others go on; one that is finished is kept until the
stage ends, so that a stage that was killed goes on with the next.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evals.benchmark import Found, Subject
from steps.config import BenchmarkStageConfig
from steps.stage import Progress, StageContext

logger = logging.getLogger(__name__)

Measure = Callable[[Subject], Found]
WITH_TEACHER = ("fidelity", "layers")
"""Benchmarks that run the teacher beside the student; they come first, then the teacher leaves the device."""


def run(config: BenchmarkStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Roles: teacher, corpus; student and teacher_rows (the teacher's own benchmark) to measure a student.

    Writes rows.parquet, summary.json, samples.jsonl and, for a student, comparison.json and means.json. Returns the
    summary. Raises EvaluationError if benchmarks failed and the others gave no rows.
    """
    from evals import rows
    from evals.head import EvaluationError
    from steps.device import hardware

    work = context.checkpoints.work() if context.checkpoints else context.scratch
    subject = _subject(config, inputs, context, work)
    found, failed = _measure_all(_benchmarks(config, subject), subject, work, context)
    records = [record for part in found.values() for record in part.records]
    if failed and not records:
        raise EvaluationError(
            "no benchmark gave a row: " + "; ".join(f"{lost['benchmark']}: {lost['error']}" for lost in failed)
        )
    frame = rows.table(records, subject.name)
    frame.to_parquet(out / "rows.parquet", index=False)

    summary: dict[str, Any] = {"model": subject.name, "device": str(hardware(context.device)["name"]), "failed": failed}
    if failed:
        stage = "benchmark" if subject.name == "student" else "benchmark_teacher"
        summary["recompute"] = f"run the same command with --force {stage}"
        logger.error("%d benchmarks failed; once that is mended, %s", len(failed), summary["recompute"])
    summary |= {"fidelity": {}, "tasks": {}}
    samples = found.pop("samples", Found()).summary or []
    for name, part in found.items():
        if name in config.tasks:
            summary["tasks"][name] = part.summary
        elif part.summary is not None:
            summary[name] = part.summary
    (out / "samples.jsonl").write_text(
        "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8"
    )
    if "teacher_rows" in inputs:
        summary["not_compared"] = _compare(config, inputs["teacher_rows"], frame, out)
    _write(out / "summary.json", summary)
    return summary


def _subject(config: BenchmarkStageConfig, inputs: Mapping[str, Path], context: StageContext, work: Path) -> Subject:
    import torch
    from transformers import AutoTokenizer

    from hybrid import load_pretrained

    name = "student" if "student" in inputs else "teacher"
    dtype = getattr(torch, context.compute)
    return Subject(
        name=name,
        model=load_pretrained(inputs[name], context.device, dtype),
        tokenizer=AutoTokenizer.from_pretrained(inputs[name]),
        teacher=load_pretrained(inputs["teacher"], context.device, dtype) if name == "student" else None,
        corpus=inputs["corpus"],
        teacher_rows=inputs.get("teacher_rows"),
        seed=context.seed,
        batch_size=config.batch_size,
        train_length=config.train_length,
        work=work,
        progress=lambda share, phrase: None,
    )


def _benchmarks(config: BenchmarkStageConfig, subject: Subject) -> dict[str, Measure]:
    """Name → what measures it, in order: all that the configuration asks for."""
    from evals import efficiency, fidelity, judge, layers, length, needle

    def task(name: str) -> Measure:
        return lambda s: _task(s, name, config)

    wanted: dict[str, Measure] = {"fidelity": lambda s: fidelity.measure(s, config)}
    if subject.teacher is not None and config.layer_conversations:
        wanted["layers"] = lambda s: layers.measure(s, config)
    wanted |= {name: task(name) for name in config.tasks}
    if config.length.enabled:
        wanted["length"] = lambda s: length.measure(s, config.length)
    if config.needle.enabled:
        wanted["needle"] = lambda s: needle.measure(s, config.needle)
    wanted["efficiency"] = lambda s: efficiency.measure(s, config.efficiency)
    if config.judge.enabled:
        wanted["judge"] = lambda s: judge.measure(s, config.judge)
    if config.samples:
        wanted["samples"] = lambda s: _answers(s, config)
    return wanted


def _task(subject: Subject, name: str, config: BenchmarkStageConfig) -> Found:
    """What lm-eval finds, and how well the model knows when it is right."""
    from evals import calibration, lm_eval_adapter, rows

    found = lm_eval_adapter.measure_task(subject, name, config)
    figures = calibration.of_task(rows.table(found.records, subject.name), name)
    return replace(found, summary=found.summary | {"calibration": figures}) if figures else found


def _measure_all(
    benchmarks: Mapping[str, Measure], subject: Subject, work: Path, context: StageContext
) -> tuple[dict[str, Found], list[dict[str, str]]]:
    """What was found, by name, and [{"benchmark", "error"}] of what raised; interrupts and a full host pass."""
    folder = work / "found"
    folder.mkdir(exist_ok=True)
    found: dict[str, Found] = {}
    failed: list[dict[str, str]] = []
    bars = _Bars(context, len(benchmarks))
    for name, measure in benchmarks.items():
        if subject.teacher is not None and name not in WITH_TEACHER:
            subject.teacher.to("cpu")
        kept = folder / f"{name}.json"
        reused = kept.exists()
        began = time.monotonic()
        try:
            if not reused:
                _keep(kept, measure(replace(subject, progress=bars.of(name))))
            found[name] = Found(**json.loads(kept.read_text(encoding="utf-8")))
        except MemoryError:
            raise
        except Exception as error:
            logger.exception("%s failed; the other benchmarks go on", name)
            failed.append({"benchmark": name, "error": f"{type(error).__name__}: {error}"})
        if context.device == "cuda" and name not in found:
            _free_gpu()
        figures = _headlines(found[name]) if name in found else {}
        bars.done(figures, reused)
        if name in found:
            how = "kept from before" if reused else f"{time.monotonic() - began:.1f} s"
            logger.info("%s: %s  %s", name, how, "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    return found, failed


def _keep(path: Path, found: Found) -> None:
    """The file is whole or absent, whenever the process ends. Raises EvaluationError on a figure that is no number."""
    from evals.head import EvaluationError
    from evals.rows import table

    table(found.records, "")  # a benchmark that breaks the schema fails by itself, not the whole stage at its end
    try:
        text = json.dumps(asdict(found), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise EvaluationError(f"a figure is NaN or infinite; the model's output is broken ({error})") from None
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _free_gpu() -> None:
    """Give back what a failed benchmark held, so that one that ran out of memory does not take the next one with it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _headlines(found: Found) -> dict[str, float]:
    """{"natural nll": mean, …}: the metric that each benchmark among the records is compared by."""
    from evals.comparison import PRIMARY

    scores: dict[str, list[tuple[float, int]]] = {}
    for record in found.records:
        primary = PRIMARY.get(record["benchmark"])
        if primary and record["metric"] == primary.metric:
            scores.setdefault(f"{record['benchmark']} {primary.metric}", []).append((record["score"], record["n"]))
    return {name: sum(s * n for s, n in pairs) / sum(n for _, n in pairs) for name, pairs in scores.items()}


def _answers(subject: Subject, config: BenchmarkStageConfig) -> Found:
    """Greedy answers to the first questions of held-out conversations, as text; no rows."""
    from hybrid.generate import generate

    prompts = first_turns(subject.corpus / "held_out.npz", config.seq_len)[: config.samples]
    replies = generate(subject.model, prompts, config.sample_tokens)
    tokenizer: Any = subject.tokenizer
    return Found(
        summary=[
            {
                "prompt": _user_text(tokenizer, prompt),
                "response": tokenizer.decode(reply, skip_special_tokens=True).strip(),
            }
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
    )


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


def _user_text(tokenizer: Any, prompt: list[int]) -> str:
    """The user's words in a rendered prompt; the whole prompt where it does not open as the template does by itself."""
    from corpora import chat

    text = tokenizer.decode(prompt)
    opening = chat.opening(tokenizer)
    closing = chat.render(tokenizer, [{"role": "user", "content": "u"}], generation_prompt=True)[len(opening) + 1 :]
    if text.startswith(opening) and text.endswith(closing):
        return text.removeprefix(opening).removesuffix(closing).strip()
    return text


def _compare(config: BenchmarkStageConfig, teacher: Path, frame: Any, out: Path) -> list[dict[str, str]]:
    """Write comparison.json and means.json; what was refused, and why."""
    import pandas as pd

    from evals.comparison import compare_runs

    compared = compare_runs(pd.read_parquet(teacher / "rows.parquet"), frame, config.deltas)
    _write(out / "comparison.json", compared.comparisons)
    _write(out / "means.json", compared.means)
    return compared.refused


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class _Bars:
    """Progress over all benchmarks, and within the one under way by the share that it says is done."""

    def __init__(self, context: StageContext, total: int):
        self.context, self.total = context, total
        self.finished = self.reused = 0
        self.begin = time.monotonic()

    def of(self, name: str) -> Callable[[float, str], None]:
        began = time.monotonic()

        def tell(share: float, phrase: str) -> None:
            share = min(max(share, 0.0), 1.0)
            left = (time.monotonic() - began) * (1 - share) / share if share else float("inf")
            self._tell(round(self.finished + share, 3), {}, f"{name} {100 * share:.0f} %, {left:.0f} s left: {phrase}")

        return tell

    def done(self, figures: Mapping[str, float], reused: bool) -> None:
        self.finished += 1
        self.reused += reused
        self._tell(self.finished, figures, "")

    def _tell(self, done: float, figures: Mapping[str, float], detail: str) -> None:
        rate = (done - self.reused) / max(time.monotonic() - self.begin, 1e-9)
        self.context.progress(Progress(done, self.total, "benchmarks", rate, figures, detail))
