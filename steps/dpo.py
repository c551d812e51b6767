"""Stage: direct preference optimisation against the teacher (2408.15237 §3, eq. 3–4) or against the student as it
was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpora import preferences
from corpora.preferences import PreferencePair
from corpora.shards import Shard
from hybrid import HybridForCausalLM, load_pretrained
from hybrid.generate import Generator
from steps import distributed
from steps.config import DPOConfig
from steps.loop import BatchSource, MicroBatch, autocast, on_device, train
from steps.losses import dpo_loss, sequence_log_probability
from steps.stage import StageContext
from steps.students import compute_type, load_student, load_teacher, measure, save_student


@dataclass(frozen=True)
class PairBatch:
    """P pairs: rows 0 … P−1 chosen, P … 2P−1 rejected, all (2P, L); reference (2P,) log-probabilities of the
    replies."""

    tokens: Tensor
    seq_idx: Tensor
    targets: Tensor
    mask: Tensor
    reference: Tensor


def run(config: DPOConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Pairs: the corpus's own if it has any, else the teacher's sampled reply over the student's to the same prompt."""
    teacher, student = load_teacher(inputs, context), load_student(inputs, context)
    pairs = distributed.agreed(_pairs(config, inputs, context, teacher) if distributed.rank() == 0 else [])
    reference = teacher if config.reference == "teacher" else student
    batches = pair_batches(pairs, reference, config, context)
    before = _accuracy(student, batches, len(pairs), config, context)
    summary = fit(student, batches, config, context)
    save_student(student, inputs, out)
    return {
        **summary,
        "pairs": len(pairs),
        "accuracy_first": before,
        "accuracy_last": _accuracy(student, batches, len(pairs), config, context),
        "held_out": measure(teacher, student, inputs, context),
    }


def fit(student: HybridForCausalLM, batches: BatchSource, config: DPOConfig, context: StageContext) -> dict[str, Any]:
    """Train the student in place on `PairBatch`es; returns the loop's summary."""

    def loss_function(model: HybridForCausalLM, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = reply_log_probabilities(model, batch)
        chosen, rejected = policy.chunk(2)
        reference_chosen, reference_rejected = batch.reference.chunk(2)
        loss, margins = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, config.beta)
        return loss, {"accuracy": (margins > 0).float().mean(), "margin": margins.mean()}

    return train(student, batches, loss_function, config, context)


def reply_log_probabilities(model: HybridForCausalLM, batch: PairBatch) -> Tensor:
    """log p(reply | prompt), (2P,)."""
    hidden = model.hidden(batch.tokens, batch.seq_idx)
    return sequence_log_probability(hidden, model.lm_head_weight, batch.targets, batch.mask)


def _pairs(
    config: DPOConfig,
    inputs: Mapping[str, Path],
    context: StageContext,
    teacher: HybridForCausalLM,
) -> list[PreferencePair]:
    given = inputs["corpus"] / "preferences.jsonl"
    if given.is_file():
        from transformers import AutoTokenizer

        pairs = preferences.load(given, AutoTokenizer.from_pretrained(inputs["teacher"]))[: config.pairs]
    else:
        pairs = _self_made_pairs(config, inputs, context, teacher)
    usable = [pair for pair in pairs if pair.informative]
    if len(usable) < config.batch_size:
        raise preferences.PreferenceError(
            f"{len(usable)} of {len(pairs)} preference pairs have two different replies; "
            f"dpo.batch_size is {config.batch_size}"
        )
    return usable


def _self_made_pairs(
    config: DPOConfig,
    inputs: Mapping[str, Path],
    context: StageContext,
    teacher: HybridForCausalLM,
) -> list[PreferencePair]:
    train = Shard.load(inputs["corpus"] / "train.npz")
    prompts = preferences.drawn_prompts(train, config.max_prompt_tokens, config.pairs, context.seed)
    replies: dict[str, list[list[int]]] = {}
    student = load_pretrained(inputs["student"], context.device, compute_type(context))  # decodes in one type
    for name, model in (("teacher", teacher), ("student", student)):
        replies[name] = Generator()(
            model,
            [list(tokens) for _, tokens in prompts],
            config.max_reply_tokens,
            temperature=1.0,
            top_p=0.95,
            seed=context.seed,
            slots=config.generation_batch,
        )
    return [
        PreferencePair(tokens, tuple(chosen), tuple(rejected), name)
        for (name, tokens), chosen, rejected in zip(prompts, replies["teacher"], replies["student"], strict=True)
    ]


def pair_batches(
    pairs: Sequence[PreferencePair], reference: HybridForCausalLM, config: DPOConfig, context: StageContext
) -> BatchSource:
    """Micro-batches of pairs with the reference's log-probabilities, which are computed once and kept."""
    size = config.batch_size // config.accumulation
    rows = distributed.own_rows(size)
    per_epoch = max(1, len(pairs) // size)
    pad = reference.config.pad_token_id or 0

    def collated(chosen: Sequence[PreferencePair]) -> PairBatch:
        batch = preferences.collate(chosen, pad)
        arrays = (batch.tokens, batch.seq_idx, batch.targets, batch.loss_mask, np.zeros(len(batch.tokens), np.float32))
        return PairBatch(*map(torch.from_numpy, arrays))

    known: dict[int, tuple[float, float]] = {}
    with torch.no_grad(), autocast(context):
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            data = on_device(collated(part), context.device)
            better, worse = reply_log_probabilities(reference, data).chunk(2)
            known |= {start + i: (better[i].item(), worse[i].item()) for i in range(len(part))}

    def batch(number: int) -> MicroBatch:
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([context.seed, epoch]).permutation(len(pairs))
        chosen = order[place * size :][:size]
        data = collated([pairs[i] for i in chosen])
        log_probabilities = torch.tensor([known[i] for i in chosen]).T.reshape(-1)
        data = replace(data, reference=log_probabilities)
        tokens, positions = int(data.mask.sum()), data.mask.numel()
        ids = tuple(pairs[i].id for i in chosen)
        own = PairBatch(*(torch.cat([half[rows] for half in tensor.chunk(2)]) for tensor in vars(data).values()))
        return MicroBatch(own, tokens, ids, positions, weight=size, share=1 / distributed.world_size())

    return batch


@torch.no_grad()
def _accuracy(
    model: HybridForCausalLM, batches: BatchSource, pairs: int, config: DPOConfig, context: StageContext
) -> float:
    """Share of pairs whose chosen reply gains more over the reference than the rejected one, over one epoch."""
    size = config.batch_size // config.accumulation
    won = []
    with autocast(context):
        for number in range(max(1, pairs // size)):
            data = on_device(batches(number).data, context.device)
            chosen, rejected = (reply_log_probabilities(model, data) - data.reference).chunk(2)
            won.append((chosen > rejected).float())
    return distributed.mean(torch.cat(won).mean()).item()
