"""Stage: how much every layer's attention is needed, as a ranking from which each budget takes its first layers.

`restore`: what giving one layer of an all-Mamba student its attention back takes off the KL to the teacher (after
2512.20569, which trains the student before; here its mixers are calibrated in closed form, so nothing is trained).
`recall`: what replacing the attention of one layer of the teacher adds to its loss on synthetic recall (after
2601.22156). Recall takes several layers at once, so it is looked for where all of them are still there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from corpora.recall import recall_texts
from corpora.shards import Shard
from evals.fidelity import Block, clustered_error, hidden_states, token_scores
from evals.head import EvaluationError
from hybrid import HybridForCausalLM
from steps.config import LayerScoresStageConfig
from steps.init_from_attention import build, calibrate
from steps.loop import autocast
from steps.stage import Progress, StageContext
from steps.students import SKIPPED_POSITIONS, load_teacher

Losses = list[np.ndarray]
"""Losses of the scored tokens, an array (T,) a text; nats."""

UNITS = {
    "restore": "KL to the teacher, nats per token of training text",
    "recall": "cross entropy, nats per value asked for",
}


@dataclass(frozen=True)
class Score:
    """What the attention of one layer is worth: mean loss without it − with it, all else equal.

    se: standard error of that difference, texts as clusters; None for a single text. round: in which the layer was
    chosen, from 0; scores of different rounds were taken beside different other layers.
    """

    layer: int
    score: float
    se: float | None
    round: int


def run(config: LayerScoresStageConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Writes scores.json, which is the summary too.

    method, rounds, unit. ranking: layers, the one that needs its attention most first. layers: their `Score`s, in the
    order of the ranking. start: mean loss that the first round starts from, of the student without attention
    (`restore`) or of the teacher (`recall`). texts, tokens: read and scored in every pass. passes: how many.
    """
    teacher = load_teacher(inputs, context)
    student = build(config.init, teacher, (), "copy", context.seed)
    calibrate(config.init, teacher, student, inputs, context)
    n_layers = teacher.config.n_layers
    with autocast(context):
        reader = _recall_reader if config.method == "recall" else _kl_reader
        read = reader(config, inputs, teacher, context)
        measure = _Passes(read, teacher, student, context, passes(n_layers, config.rounds))
        scores = rank(measure, n_layers, config.rounds, forward=config.method == "restore")
    summary = {
        "method": config.method,
        "rounds": config.rounds,
        "unit": UNITS[config.method],
        "ranking": [s.layer for s in scores],
        "layers": [asdict(s) for s in scores],
        "start": float(np.concatenate(measure.first).mean()),
        "texts": len(measure.first),
        "tokens": sum(len(losses) for losses in measure.first),
        "passes": measure.done,
    }
    (out / "scores.json").write_text(json.dumps(summary, indent=1))
    return summary


def rank(losses: Callable[[frozenset[int]], Losses], n_layers: int, rounds: int, *, forward: bool) -> list[Score]:
    """Scores of all layers, the most needed first; losses: of the model that keeps the attention of these layers.

    forward: from no attention on, the best of each round are kept. Otherwise from all attention on, those that are
    missed least are given up. Each round takes ⌈n_layers / rounds⌉ layers; one round scores every layer alone.
    """
    kept = frozenset() if forward else frozenset(range(n_layers))
    left = list(range(n_layers))
    chosen: list[Score] = []
    for number, size in enumerate(_round_sizes(n_layers, rounds)):
        now = losses(kept)
        found = [_score(layer, number, now, losses(kept ^ {layer}), forward) for layer in left]
        found.sort(key=lambda s: s.score, reverse=forward)
        chosen += found[:size]
        kept ^= {s.layer for s in found[:size]}
        left = sorted(s.layer for s in found[size:])
    return chosen if forward else chosen[::-1]


def passes(n_layers: int, rounds: int) -> int:
    """How many models `rank` asks the losses of: n_layers + 1 for one round."""
    left, total = n_layers, 0
    for size in _round_sizes(n_layers, rounds):
        total += left + 1
        left -= size
    return total


def _round_sizes(n_layers: int, rounds: int) -> list[int]:
    size = math.ceil(n_layers / rounds)
    return [min(size, n_layers - at) for at in range(0, n_layers, size)]


def _score(layer: int, number: int, now: Losses, changed: Losses, forward: bool) -> Score:
    without, with_it = (now, changed) if forward else (changed, now)
    difference = [a - b for a, b in zip(without, with_it, strict=True)]
    error = clustered_error(difference, [str(text) for text in range(len(difference))])
    return Score(layer, float(np.concatenate(difference).mean()), error, number)


@contextmanager
def attention_of(
    student: HybridForCausalLM, teacher: HybridForCausalLM, layers: Collection[int]
) -> Iterator[HybridForCausalLM]:
    """Inside the block, these layers of the student are the teacher's."""
    own = {i: student.blocks[i] for i in layers}
    blocks = student.model.layers
    for i in layers:
        blocks[i] = teacher.blocks[i]
    try:
        yield student
    finally:
        for i, block in own.items():
            blocks[i] = block


class _Passes:
    """Losses of the model that keeps the attention of some layers; counts and tells how far it is.

    first: what the first pass found.
    """

    def __init__(
        self,
        read: Callable[[HybridForCausalLM], Losses],
        teacher: HybridForCausalLM,
        student: HybridForCausalLM,
        context: StageContext,
        total: int,
    ) -> None:
        self.read, self.teacher, self.student, self.context, self.total = read, teacher, student, context, total
        self.started, self.done = time.monotonic(), 0
        self.first: Losses = []

    def __call__(self, kept: frozenset[int]) -> Losses:
        with attention_of(self.student, self.teacher, kept) as model:
            losses = self.read(model)
        self.first = self.first or losses
        self.done += 1
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        mean = float(np.concatenate(losses).mean())
        self.context.progress(Progress(self.done, self.total, "passes", rate, {"loss": mean}))
        return losses


def _kl_reader(
    config: LayerScoresStageConfig,
    inputs: Mapping[str, Path],
    teacher: HybridForCausalLM,
    context: StageContext,
) -> Callable[[HybridForCausalLM], Losses]:
    blocks = training_blocks(inputs["corpus"] / "train.npz", config.sequences, config.seq_len, context.seed)
    wanted = hidden_states(teacher, blocks, config.batch_size)

    def read(model: HybridForCausalLM) -> Losses:
        found = token_scores(model, blocks, teacher, batch_size=config.batch_size, teacher_hidden=wanted)
        return [s.kl for s in found if s.kl is not None]

    return read


def training_blocks(shard: Path, count: int, seq_len: int, seed: int) -> list[Block]:
    """Beginnings, up to seq_len tokens, of `count` documents in random order; the first positions are not scored."""
    data = Shard.load(shard)
    order = np.random.default_rng(seed).permutation(len(data))
    documents = ((str(data.ids[i]), data.document(i)[:seq_len]) for i in order)
    long = ((name, text) for name, text in documents if len(text) > SKIPPED_POSITIONS)
    blocks = [Block(name, name, text, SKIPPED_POSITIONS) for name, text in islice(long, count)]
    if not blocks:
        raise EvaluationError(f"{shard}: none of {len(data)} documents has more than {SKIPPED_POSITIONS} tokens")
    return blocks


def _recall_reader(
    config: LayerScoresStageConfig,
    inputs: Mapping[str, Path],
    teacher: HybridForCausalLM,
    context: StageContext,
) -> Callable[[HybridForCausalLM], Losses]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["teacher"], local_files_only=True)
    texts = recall_texts(tokenizer, config.sequences, config.pairs, context.seed)
    blocks = [Block(f"recall {n}", f"recall {n}", text.tokens, text.first) for n, text in enumerate(texts)]

    def read(model: HybridForCausalLM) -> Losses:
        found = token_scores(model, blocks, batch_size=config.batch_size)
        return [s.nll[text.asked[text.first :]] for s, text in zip(found, texts, strict=True)]

    return read
