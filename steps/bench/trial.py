"""A training stage on random weights and random text: its own batches, loss and loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora.preferences import PreferencePair
from corpora.shards import Shard
from hybrid.init_map import from_attention
from hybrid.layers import attention_layers
from hybrid.shapes import random_model, shape
from steps import align, dpo, kl_distill, sft
from steps.config import AlignConfig, DPOConfig, KLConfig, SFTConfig, TrainConfig
from steps.loop import BatchSource, MicroBatch
from steps.stage import StageContext
from steps.students import compute_type, token_batches

TRAINED = ("align", "kl", "sft", "dpo")
MASKS = {"align": None, "kl": "loss_mask", "sft": "assistant_loss"}
"""Which tokens of packed blocks count, as the stages have it."""
DOCUMENT_TOKENS = (100, 300)
"""Shortest and longest document; as likely as all between, so 200 on average. Its second half is the reply."""
PAIR_TOKENS = 256
"""Longest prompt and reply of DPO together; both are an eighth to a half of it."""


class Trial:
    """Half of the layers replaced, all weights random but equal for equal shapes; `length` tokens in each of `rows`.

    DPO takes as many tokens a step in shorter rows, padding included. positions: micro-batch → positions computed in
    it, of those that were asked for.
    """

    def __init__(
        self, stage: str, name: str, rows: int, length: int, steps: int, context: StageContext, scratch: Path
    ) -> None:
        self.stage, self.context = stage, context
        self.teacher = random_model(shape(name), context.device, compute_type(context))
        config = self.teacher.config
        self.student = from_attention(self.teacher, attention_layers("1/2", config.n_layers))
        draw = torch.Generator(context.device).manual_seed(0)
        for i in self.student.config.mamba_layers:  # the identity would hide what the convolution does across documents
            self.student.blocks[i].mamba.conv1d.weight.normal_(std=0.5, generator=draw)
        self.config = _config(stage, rows, length, steps)
        self.positions: dict[int, int] = {}
        self.batches = self._counted(self._batches(scratch))

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Rows and length of a step's batch; of DPO, whose rows are as long as the longest pair drawn, at most."""
        config = self.config
        return (2 if isinstance(config, DPOConfig) else 1) * config.batch_size, config.seq_len

    def fit(self) -> dict[str, Any]:
        """The stage itself, without what it reads and writes; returns the loop's summary."""
        config, student, batches, context = self.config, self.student, self.batches, self.context
        if isinstance(config, AlignConfig):
            return align.fit(self.teacher, student, batches, config, context)
        if isinstance(config, KLConfig):
            return kl_distill.fit(self.teacher, student, batches, config, context)
        if isinstance(config, DPOConfig):
            return dpo.fit(student, batches, config, context)
        assert isinstance(config, SFTConfig)
        return sft.fit(student, batches, config, context)

    def _batches(self, scratch: Path) -> BatchSource:
        vocabulary = self.teacher.config.vocab_size
        if isinstance(self.config, DPOConfig):
            pairs = random_pairs(vocabulary, 2 * self.config.batch_size, self.config.seq_len)
            return dpo.pair_batches(pairs, self.teacher, self.config, self.context)
        path = scratch / "train.npz"
        random_shard(vocabulary, 4 * self.config.batch_size * self.config.seq_len).save(path)
        return token_batches(path, self.config, self.context, MASKS[self.stage])

    def _counted(self, source: BatchSource) -> BatchSource:
        def batch(number: int) -> MicroBatch:
            found = source(number)
            assert found.positions is not None
            self.positions[number] = found.positions
            return found

        return batch


def _config(stage: str, rows: int, length: int, steps: int) -> TrainConfig:
    common: dict[str, Any] = {"steps": steps, "batch_size": rows, "seq_len": length}
    if stage == "align":
        return AlignConfig(**common)
    if stage == "kl":
        return KLConfig(**common, rest_lr=6e-4)
    if stage == "sft":
        return SFTConfig(**common, mixer_lr=1e-4, rest_lr=1e-4)
    pair = min(PAIR_TOKENS, length)
    common |= {"batch_size": rows * length // (2 * pair), "seq_len": pair}
    return DPOConfig(**common, mixer_lr=1e-5, rest_lr=1e-5)


def random_shard(vocabulary: int, tokens: int, seed: int = 0) -> Shard:
    """At least so many random tokens in documents of DOCUMENT_TOKENS."""
    draw = np.random.default_rng(seed)
    documents: list[np.ndarray] = []
    while tokens > 0:
        documents.append(draw.integers(vocabulary, size=draw.integers(*DOCUMENT_TOKENS, endpoint=True)))
        tokens -= len(documents[-1])
    replies = [np.arange(len(d)) >= len(d) // 2 for d in documents]
    return Shard.of(documents, (f"random-{i}" for i in range(len(documents))), replies)


def random_pairs(vocabulary: int, count: int, longest: int, seed: int = 0) -> list[PreferencePair]:
    """Random prompts, each with two random replies."""
    draw = np.random.default_rng(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.integers(vocabulary, size=draw.integers(longest // 8, longest // 2, endpoint=True)).tolist())

    return [PreferencePair(tokens(), tokens(), tokens(), f"random-{i}") for i in range(count)]
