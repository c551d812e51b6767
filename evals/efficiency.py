"""What a model costs to read and to write with: tokens per second, and bytes of state per sequence."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from corpora.shards import Shard
from evals.benchmark import Found, Subject
from hybrid import HybridForCausalLM
from hybrid.engine import DecodeEngine

logger = logging.getLogger(__name__)

STATE_CONTEXTS = (512, 2048, 8192, 32768)
WARM_UP_TOKENS = 4
FEWEST_REPEATS = 2


class Settings(Protocol):
    """What `measure` reads: the `efficiency` section of the benchmark's configuration."""

    batches: list[int]
    contexts: list[int]
    tokens: int
    repeats: int
    seconds_per_cell: float


def measure(subject: Subject, config: Settings) -> Found:
    """Speeds over the grid of batches and contexts, and the bytes of one sequence's state.

    Summary: {"dtype", "prefill": [cell], "decode": [cell], "state": `state_bytes`, "crossover": `crossover` with the
    teacher, None for the teacher itself}. A cell has batch, context, the median tokens_per_second of `repeats` over the
    batch, its quartiles low and high, and oom: whether the device's memory did not suffice, for it or for a cell that
    is no larger in batch and context; then it has no figures. There are no rows: speeds are no scores of items.
    """
    text = Shard.load(subject.corpus / "held_out.npz").tokens.astype(np.int64)
    cells = [(batch, context) for batch in sorted(set(config.batches)) for context in sorted(set(config.contexts))]
    prefill: list[dict[str, Any]] = []
    decode: list[dict[str, Any]] = []
    too_large: list[tuple[int, int]] = []
    for done, (batch, context) in enumerate(cells, 1):
        runs: list[tuple[float, float]] | None = None
        if not any(batch >= b and context >= c for b, c in too_large):
            prompts: list[Any] = list(np.resize(text, (batch, context)))
            runs = _runs(subject.model, prompts, config)
            if runs is None:
                too_large.append((batch, context))
                logger.warning("batch %d at a context of %d tokens: out of memory", batch, context)
        prefill.append(_cell(batch, context, None if runs is None else [read for read, _ in runs]))
        decode.append(_cell(batch, context, None if runs is None else [written for _, written in runs]))
        figure = "out of memory" if runs is None else f"{decode[-1]['tokens_per_second']:.0f} tokens/s"
        subject.progress(done / len(cells), f"batch {batch}, context {context}: {figure}")
    return Found(
        summary={
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "prefill": prefill,
            "decode": decode,
            "state": state_bytes(subject.model),
            "crossover": None if subject.teacher is None else crossover(subject.model, subject.teacher),
        }
    )


def _runs(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], config: Settings
) -> list[tuple[float, float]] | None:
    """Tokens per second (read, written) of each repeat, or None where the device's memory does not suffice."""
    _free(model.device)
    try:
        return list(_timed(model, prompts, config))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
    _free(model.device)
    return None


def _timed(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], config: Settings
) -> Iterator[tuple[float, float]]:
    """Greedy decoding of all prompts together after a warm-up. No reply ends early; a prompt's last token is read by
    the first step of decoding.

    Where the time for the repeats does not suffice, replies get as short as in the warm-up and repeats as few as two.
    """
    batch, context = len(prompts), len(prompts[0])
    engine = DecodeEngine(model, batch=batch, max_length=context + config.tokens, eos_token_ids=())
    shortest = min(config.tokens, WARM_UP_TOKENS)
    engine.generate(prompts, 1)  # compiles kernels where a process has not yet; the second call captures graphs
    seconds_per_token = engine.generate(prompts, shortest).decode_seconds / shortest
    began = time.monotonic()
    affordable = int(config.seconds_per_cell / config.repeats / seconds_per_token)
    tokens = min(config.tokens, max(shortest, affordable))
    for repeat in range(config.repeats):
        if repeat >= FEWEST_REPEATS and time.monotonic() - began > config.seconds_per_cell:
            break
        run = engine.generate(prompts, tokens)
        yield batch * (context - 1) / run.prefill_seconds, batch * tokens / run.decode_seconds


def _cell(batch: int, context: int, rates: Sequence[float] | None) -> dict[str, Any]:
    low, median, high = (None, None, None) if rates is None else statistics.quantiles(rates, n=4, method="inclusive")
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": median,
        "low": low,
        "high": high,
        "repeats": len(rates or ()),
        "oom": rates is None,
    }


def _out_of_memory(error: BaseException) -> bool:
    """Whether CUDA's memory ran out; an error while a graph is captured hides behind that of ending the capture."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return error.__context__ is not None and _out_of_memory(error.__context__)


def _free(device: torch.device) -> None:
    """Give CUDA's memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def state_bytes(model: HybridForCausalLM, contexts: Sequence[int] = STATE_CONTEXTS) -> list[dict[str, Any]]:
    """Bytes of one sequence's decoding state after `context` tokens, by its closed form: keys and values, SSM states,
    convolutions; and `measured`, all of them as they are allocated, None where the device's memory does not suffice.
    """
    return [{"context": c, **model.cache_bytes(batch=1, context=c), "measured": _allocated(model, c)} for c in contexts]


def _allocated(model: HybridForCausalLM, context: int) -> int | None:
    """Bytes that decoding's cache of one sequence takes: what CUDA's allocator hands out, elsewhere the sizes of its
    tensors. The rotary tables, which all sequences of a batch share, are not counted; what the allocator loses by
    rounding is."""
    _free(model.device)
    before = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
    try:
        cache = model.new_cache(1, context)
    except torch.cuda.OutOfMemoryError:
        return None
    cache.rope = (torch.empty(0), torch.empty(0))
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device) - before
    return sum(cache.bytes().values())


def crossover(student: HybridForCausalLM, teacher: HybridForCausalLM) -> int | None:
    """The smallest context from which on the student's state of a sequence takes fewer bytes than the teacher's; None
    if there is none. Exact: bytes are linear in the context."""
    fixed, with_one = (_total(student, c) - _total(teacher, c) for c in (0, 1))
    saved = fixed - with_one  # by each token of context
    return max(1, fixed // saved + 1) if saved > 0 else None


def _total(model: HybridForCausalLM, context: int) -> int:
    return sum(model.cache_bytes(batch=1, context=context).values())
