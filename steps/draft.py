"""Stage: the draft model of speculative decoding.

Some of the student's own layers, trained against the student on text of its own (2408.15237 §5.3, "shrink and
fine-tune"): what a draft is worth is how often it agrees with the model that verifies it, so that model is the one to
imitate, and on what it says itself. Such layers may read the student's features besides (Li et al., 2401.15077; the
later passes over a batch as in 2503.01840, §3.2). Or a checkpoint that fits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from corpora import chat, preferences, self_chat
from corpora.shards import Shard
from evals.fidelity import Block, summarise, token_scores
from hybrid import HybridForCausalLM, load_pretrained, save_pretrained
from hybrid.drafts import save_tokens
from hybrid.generate import Generator
from steps import teacher
from steps.config import DraftConfig
from steps.loop import autocast, train
from steps.losses import kl_loss
from steps.stage import Checkpoints, Progress, StageContext
from steps.students import TokenBatch, compute_type, load_student, token_batches
from steps.utilisation import FORWARD, TRAINED, matrix_weights

logger = logging.getLogger(__name__)

TEXT = "text.npz"
MEASURED_REPLIES = 32


class DraftError(ValueError):
    """A draft that cannot propose tokens for the student; the message names both sides."""


def run(config: DraftConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """A checkpoint folder in `out`, as the other stages that train leave it, and of a draft that learns the text it
    learnt from and, if it proposes among `vocabulary` tokens alone, their ids.

    Raises DraftError where layers do not exist or vocabularies differ, SourceError and TeacherError as the teacher
    stage does.
    """
    return _fetched(config, inputs, out, context) if config.source else _shrunk(config, inputs, out, context)


def shrink(
    student: HybridForCausalLM,
    layers: Sequence[int],
    reads_features: bool = False,
    feature_init: Literal["zeros", "identity"] = "zeros",
    branch_scale: float = 1.0,
) -> HybridForCausalLM:
    """A model of these layers of the student, with copies of its embedding, final norm and head.

    reads_features: it has a projection of features besides, which is as feature_init says. branch_scale: factor of what
    mixers and MLPs add to the residual stream.
    """
    depth = student.config.n_layers
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise DraftError(f"draft.kind names layers {wrong}, but the student has {depth}, 0 to {depth - 1}")
    with torch.device("meta"):
        draft = HybridForCausalLM(replace(student.config.of_layers(layers), reads_features=reads_features))
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    weights = {}
    for name, weight in student.named_parameters():
        if not name.startswith("model.layers."):
            weights[name] = weight.detach().clone()
            continue
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in place:
            weights[place[prefix] + name.removeprefix(prefix)] = weight.detach().clone()
    if reads_features:
        norm = student.model.norm.weight.detach()
        weights["feature_norm.weight"] = torch.ones_like(norm)
        weights["feature_proj.weight"] = torch.eye(len(norm), dtype=norm.dtype, device=norm.device)
        if feature_init == "zeros":
            weights["feature_proj.weight"].zero_()
    draft.load_state_dict(weights, assign=True)
    draft.inv_freq = student.inv_freq.clone()
    if branch_scale != 1.0:
        for block in draft.blocks:
            mixed = block.self_attn.o_proj if block.is_attention else block.mamba.out_proj
            for p in (*mixed.parameters(), *block.mlp.down_proj.parameters()):
                p.detach().mul_(branch_scale)
    return draft.requires_grad_(False).eval()


def shifted(features: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Features (B, L, d_model) of tokens → of the tokens before them, zeros at the start of each document."""
    moved = torch.nn.functional.pad(features, (0, 0, 1, 0))[:, :-1]
    if seq_idx is None:
        return moved
    goes_on = torch.nn.functional.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))
    return moved * goes_on[..., None]


class _Informed:
    """A draft as a model of tokens alone: it finds the features that it reads."""

    def __init__(self, draft: HybridForCausalLM, target: HybridForCausalLM) -> None:
        self.draft, self.target, self.lm_head_weight = draft, target, draft.lm_head_weight

    def hidden(self, tokens: Tensor) -> Tensor:
        features = shifted(self.target.residual(tokens), None)
        return self.draft.model.norm(self.draft.residual(tokens, features=features))


def _shrunk(config: DraftConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    draft = shrink(
        load_student(inputs, context), config.layers, config.reads_features, config.feature_init, config.branch_scale
    )
    # In the type in which it will be decoded: that is the model whose tokens are to be foreseen.
    target = load_pretrained(inputs["student"], context.device, compute_type(context))
    ends, known = target.config.eos_token_ids, target.config.vocab_size
    if config.vocabulary and not len(ends) <= config.vocabulary <= known:
        raise DraftError(
            f"draft.vocabulary is {config.vocabulary}, but the student has {known} tokens, {len(ends)} of which end a "
            "turn and are always kept: set it between these, or to 0 for all"
        )
    text, checkpoints = _text(config, inputs, target, context)
    text.save(out / TEXT)
    held_out = _replies(_prompts(config, inputs, "held_out", MEASURED_REPLIES, context), target, config, context, 1.0)
    before = _agreement(target, draft, held_out, context)

    def loss_function(model: HybridForCausalLM, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = target.residual(batch.tokens, batch.seq_idx)
            taught = target.model.norm(x)
        head, target_head = model.lm_head_weight, target.lm_head_weight
        losses = []
        for _ in range(passes):
            features = shifted(x, batch.seq_idx) if config.reads_features else None
            x = model.residual(batch.tokens, batch.seq_idx, features=features)
            losses.append(kl_loss(model.model.norm(x), head, taught, target_head, batch.mask, config.loss))
        return torch.stack(losses).mean(), {}

    passes = config.passes if config.reads_features else 1
    batches = token_batches(out / TEXT, config, context)
    summary = train(
        draft,
        batches,
        loss_function,
        config,
        replace(context, checkpoints=checkpoints),
        teacher=target,
        forward_flops=FORWARD * matrix_weights(target) + (passes - 1) * TRAINED * matrix_weights(draft),
        one_shape=True,
    )
    save_pretrained(draft, out, tokenizer_from=inputs["student"])
    vocabulary: dict[str, Any] = {}
    if config.vocabulary:
        tokens = frequent_tokens(text, config.vocabulary, known, ends)
        save_tokens(out, tokens)
        covered = {"text": _covered(text, tokens), "held_out": _covered(held_out, tokens)}
        vocabulary = {"vocabulary": {"tokens": len(tokens), "covered": covered}}
    return {
        **summary,
        "kind": config.kind,
        "parameters": sum(p.numel() for p in draft.parameters()),
        "text": {
            "conversations": len(text),
            "tokens": len(text.tokens),
            "reply_tokens": int(text.assistant.sum()),
        },
        **vocabulary,
        "start": before,
        "held_out": _agreement(target, draft, held_out, context),
    }


def frequent_tokens(text: Shard, count: int, vocab_size: int, always: Sequence[int] = ()) -> np.ndarray:
    """Ids of the `count` tokens that the text's replies have most often, those of `always` among them: (count,), in
    ascending order. Of equally frequent ones the lowest."""
    times = np.bincount(text.tokens[text.assistant], minlength=vocab_size)
    times[list(always)] = times.max() + 1
    return np.sort(np.argsort(-times, kind="stable")[:count])


def _covered(text: Shard, tokens: np.ndarray) -> float | None:
    """Share of the tokens of the text's replies that are among these."""
    replies = text.tokens[text.assistant]
    return float(np.isin(replies, tokens).mean()) if len(replies) else None


@dataclass(frozen=True)
class _TextBeside:
    """Checkpoints of the training loop, each with the text beside it: a run that continues writes none anew.

    The text alone is the checkpoint of step 0, which the loop must not take for one of its own."""

    inner: Checkpoints
    text: Shard

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        def both(folder: Path) -> None:
            write(folder)
            self.text.save(folder / TEXT)

        self.inner.save(step, both)

    def latest(self) -> tuple[int, Path] | None:
        found = self.inner.latest()
        return found if found and found[0] > 0 else None

    def work(self) -> Path:
        return self.inner.work()


def _text(
    config: DraftConfig, inputs: Mapping[str, Path], target: HybridForCausalLM, context: StageContext
) -> tuple[Shard, _TextBeside | None]:
    """Questions of the training conversations, and of the student itself where those are too few, with the student's
    own answers, and checkpoints that keep them."""
    checkpoints = context.checkpoints
    if checkpoints is not None and (found := checkpoints.latest()):
        text = Shard.load(found[1] / TEXT)
        return text, _TextBeside(checkpoints, text)
    prompts = _prompts(config, inputs, "train", config.conversations, context)
    prompts += _questions(config, inputs, target, context, config.conversations - len(prompts))
    greedy = config.greedy_share if config.temperature else 1.0
    text = _replies(prompts, target, config, context, greedy)
    if checkpoints is None:
        return text, None
    checkpoints.save(0, lambda folder: text.save(folder / TEXT))
    return text, _TextBeside(checkpoints, text)


def _prompts(
    config: DraftConfig, inputs: Mapping[str, Path], split: str, count: int, context: StageContext
) -> list[tuple[str, tuple[int, ...]]]:
    """(id, tokens) of at most `count` conversations up to their first reply, in an order that the seed says."""
    shard = Shard.load(inputs["corpus"] / f"{split}.npz")
    found = preferences.drawn_prompts(shard, config.max_prompt_tokens, count, context.seed)
    if not found:
        raise DraftError(
            f"no conversation of {split}.npz has an opening of at most {config.max_prompt_tokens} tokens: "
            "raise draft.max_prompt_tokens"
        )
    return found


def _questions(
    config: DraftConfig, inputs: Mapping[str, Path], target: HybridForCausalLM, context: StageContext, count: int
) -> list[tuple[str, tuple[int, ...]]]:
    """At most `count` openings that the student says itself: sampled from the template's opening to the turn's end.

    None where the template does not end a turn by one token. Draws that do not end in time are dropped, and drawing
    stops after twice as many as are wanted.
    """
    from transformers import AutoTokenizer

    if count <= 0:
        return []
    tokenizer = AutoTokenizer.from_pretrained(inputs["student"], local_files_only=True)
    try:
        parser = self_chat.TurnParser(tokenizer)
    except chat.ChatTemplateError as error:
        logger.info("draft: only the corpus's own openings: %s", error)
        return []
    opening, end, to_reply = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (parser.opening, parser.end, parser.separators["user"].removeprefix(parser.end))
    )
    room = config.max_prompt_tokens - len(opening) - len(to_reply)
    if len(end) != 1 or room < 2:
        return []
    generate, found = Generator(), dict[tuple[int, ...], None]()
    for batch in range(-(-2 * count // config.generation_batch)):
        drawn = generate(
            target,
            [opening] * config.generation_batch,
            room,
            temperature=config.temperature or 1.0,
            top_p=config.top_p,
            seed=int(np.random.SeedSequence([context.seed, batch]).generate_state(1)[0]),
            eos_token_ids=end,
        )
        found |= {(*opening, *turn, *to_reply): None for turn in drawn if turn[-1] == end[0] and len(turn) > 1}
        if len(found) >= count:
            break
    return [(f"own-{number}", tokens) for number, tokens in enumerate(list(found)[:count])]


def _replies(
    prompts: Sequence[tuple[str, tuple[int, ...]]],
    target: HybridForCausalLM,
    config: DraftConfig,
    context: StageContext,
    greedy_share: float,
) -> Shard:
    """Conversations of one turn; the first `greedy_share` of the replies are greedy, the others sampled."""
    greedy, began = round(greedy_share * len(prompts)), time.monotonic()
    asked, replies = [list(tokens) for _, tokens in prompts], list[list[int]]()

    def told(share: float, part: int) -> None:
        done = len(replies) + share * part
        context.progress(Progress(round(done), len(prompts), "replies", done / max(time.monotonic() - began, 1e-9)))

    for part, temperature, top_p in ((asked[:greedy], 0.0, 1.0), (asked[greedy:], config.temperature, config.top_p)):
        if part:
            replies += Generator()(
                target,
                part,
                config.max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=context.seed,
                slots=config.generation_batch,
                progress=partial(told, part=len(part)),
            )
    documents, masks = [], []
    for (_, prompt), reply in zip(prompts, replies, strict=True):
        documents.append(np.array([*prompt, *reply], np.uint32))
        masks.append(np.arange(len(prompt) + len(reply)) >= len(prompt))
    return Shard.of(documents, [name for name, _ in prompts], masks)


def _agreement(
    target: HybridForCausalLM, draft: HybridForCausalLM, text: Shard, context: StageContext
) -> dict[str, Any]:
    """KL(target ‖ draft) in nats per token and top-1 agreement on replies: of a greedy reply, the latter is what share
    of tokens the draft would propose as the target says them. Both are over the whole vocabulary."""
    model = cast(HybridForCausalLM, _Informed(draft, target)) if draft.config.reads_features else draft
    blocks = []
    for index, name in enumerate(text.ids):
        first = int(text.assistant[text.starts[index] : text.starts[index + 1]].argmax())
        if first:  # 0: the reply is empty
            blocks.append(Block(str(name), str(name), text.document(index), first))
    if not blocks:
        return {"kl": None, "top1": None, "tokens": 0, "conversations": 0}
    with autocast(context):
        found = summarise(token_scores(model, blocks, target))
    return {
        "kl": found["kl_mean"],
        "top1": found["top1"],
        "tokens": found["tokens"],
        "conversations": found["documents"],
    }


def _fetched(config: DraftConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """The checkpoint of `checkpoint:SOURCE` in this project's form, once it is known to fit the student."""
    fingerprint = teacher.fetch(config.source, out, context)
    if mismatch := teacher.token_mismatch(out, inputs["student"]):
        raise DraftError(f"draft.kind {config.kind}: {mismatch}; a draft needs the student's own tokenizer")
    logger.info("draft: %s", config.source)
    parameters = sum(p.numel() for p in load_pretrained(out).parameters())
    return {"kind": config.kind, "fingerprint": fingerprint, "parameters": parameters}
