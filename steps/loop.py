"""The only training loop: align, KL, SFT and DPO differ in their batches and their loss, not in how they train."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hybrid import HybridForCausalLM
from hybrid.compiled import compiled_blocks
from steps import distributed
from steps.config import TrainConfig
from steps.graphed import GraphedPass, Pass
from steps.optimizers import make_optimizers
from steps.stage import Checkpoints, Progress, StageContext
from steps.utilisation import peak_flops, training_flops, utilisation

log = logging.getLogger(__name__)

CHECK_EVERY = 10
"""Steps between looks at the loss: each look waits for the device."""
REPORT_SECONDS = 5.0
BATCHES_AHEAD = 2
"""Micro-batches that are packed while the device works."""
DIVERGED = 3.0
JUDGED_AFTER = 20
"""After this many steps, a smoothed loss DIVERGED times its lowest value, and above where it began, is divergence: the
first steps of a warm-up often jump and come back."""


class TrainingFailed(RuntimeError):
    """The loss is not a number, or diverges; the message names step, documents and the last good checkpoint."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on.

    data:      whatever the stage's loss takes: a tensor or a dataclass of tensors, on the host; of a micro-batch that
               several processes share, this process's rows.
    tokens:    tokens in it that count, those of all processes.
    documents: names of the documents in it, for error messages.
    positions: tokens that pass through the model, padding and those that do not count included, of all processes; as
               many as `tokens` where it is None.
    weight:    how many the loss is a mean of (tokens, pairs), over all processes; as many as `tokens` where it is None.
               A step's loss is the mean over all of them, however they are spread over micro-batches and processes.
    share:     the part of `weight` that `data` has; 1 on one process.
    """

    data: Any
    tokens: int
    documents: tuple[str, ...]
    positions: int | None = None
    weight: int | None = None
    share: float = 1.0


BatchSource = Callable[[int], MicroBatch]
"""Micro-batch number → micro-batch. A pure function, so a run that continues sees the same data and a thread can work
ahead."""

LossFunction = Callable[[HybridForCausalLM, Any], tuple[Tensor, dict[str, Tensor]]]


def train(
    model: HybridForCausalLM,
    batches: BatchSource,
    loss_function: LossFunction,
    config: TrainConfig,
    context: StageContext,
    *,
    teacher: HybridForCausalLM | None = None,
    called: Sequence[nn.Module] = (),
    forward_flops: int = 0,
    one_shape: bool = False,
) -> dict[str, Any]:
    """Train `model` in place for config.steps optimiser steps; returns the summary for the manifest.

    Mixers train at mixer_lr, everything else at rest_lr, where 0 freezes; trained weights are float32, products run in
    context.compute. Continues from the newest checkpoint, to the same weights as if it had never stopped.

    On several processes the weights of `model` and of `teacher` are spread over them from here on
    (`steps.distributed.shard`): `gathered` makes them whole. The losses are those of one process, and so is the
    checkpoint, which any number of processes continues from. Random numbers in a loss are drawn alike on all.

    teacher:       what the loss runs besides, to be spread too.
    called:        mixers of `model` that the loss calls on inputs without a gradient, instead of model.hidden; only
                   they train.
    forward_flops: per token of what the loss runs besides, for the utilisation (`steps.utilisation`).
    one_shape:     all micro-batches have the same shapes and the loss waits for nothing, so that one GPU runs compiled
                   blocks and replays the pass as a CUDA graph.
    """
    torch.manual_seed(context.seed)
    groups = select_parameters(model, config, called)
    flops_per_token = training_flops(model, called) + forward_flops
    if distributed.world_size() > 1:
        for spread, through in ((model, called), (teacher, ())):
            if spread is not None:
                distributed.shard(spread, through)
        placed = dict(model.named_parameters())
        groups = [(rate, {name: placed[name] for name in group}) for rate, group in groups]
    trained = {name: p for _, group in groups for name, p in group.items()}
    optimizers = make_optimizers(groups, config)
    if context.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.train()
    fixed = one_shape and context.device == "cuda" and distributed.world_size() == 1

    def forward(data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(context):
            return loss_function(model, data)

    weights, alone = list(trained.values()), config.accumulation == 1
    passes = GraphedPass(forward, weights, each_tensor, alone) if fixed else _EagerPass(forward)
    compiled = (m for m in (model, teacher) if fixed and m is not None)
    kept = config.kept_activations
    with compiled_blocks(*compiled, kept_activations=kept), _Saver(context, trained, optimizers) as saver:
        state = saver.restore()
        if state.step:
            log.info("continuing from step %d of %d", state.step, config.steps)
        watch = _Watch(context, config, state, flops_per_token)
        numbers = range(state.step * config.accumulation, config.steps * config.accumulation)
        with closing(_prefetched(batches, numbers, context.device)) as stream:
            while state.step < config.steps:
                micro_batches = list(islice(stream, config.accumulation))
                loss, figures = _gradients(passes, micro_batches)
                _update(optimizers, weights, rate_factor(state.step, config), config.grad_clip)
                state.step += 1
                watch.after_step(micro_batches, loss, figures)
                saver.check()
                if state.step < config.steps and state.step % config.checkpoint_every == 0:
                    watch.look()
                    saver.save(state)
                    watch.last_checkpoint = state.step
        watch.look()
    model.eval().requires_grad_(False)
    return watch.summary(sum(p.numel() for p in trained.values()))


class _EagerPass:
    def __init__(self, run: Pass) -> None:
        self.run = run

    def step(self, data: Any, scale: float, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """As `GraphedPass.step`."""
        loss, figures = self.run(data)
        loss = loss * scale
        loss.backward()
        return loss.detach(), {name: value.detach() for name, value in figures.items()}


def _gradients(passes: _EagerPass | GraphedPass, micro_batches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Make the step's gradients; its loss, and the figures of its last micro-batch, as means over the processes.

    FSDP takes the mean of the processes' gradients, so a process's loss counts `share` times their number.
    """
    weights = [batch.tokens if batch.weight is None else batch.weight for batch in micro_batches]
    total, losses = sum(weights) or 1, []
    figures: dict[str, Tensor] = {}
    for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
        scale = weight / total * batch.share * distributed.world_size()
        loss, figures = passes.step(batch.data, scale, number == 0)
        losses.append(loss.clone())
    step = torch.stack([torch.stack(losses).sum(), *(value.float() for value in figures.values())])
    loss, *values = distributed.mean(step)
    return loss, dict(zip(figures, values, strict=True))


def _update(
    optimizers: Sequence[torch.optim.Optimizer], trained: list[Tensor], factor: float, grad_clip: float
) -> None:
    """One step at `factor` times the peak rates, of gradients whose norm over everything is at most grad_clip."""
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = distributed.full(get_total_norm(gradients))
    clip_grads_with_norm_(trained, grad_clip, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def _prefetched(batches: BatchSource, numbers: Iterable[int], device: str) -> Generator[MicroBatch]:
    """Micro-batches on the device, in order; the next ones are packed by a thread, which ends with the generator.

    What it packs lies in pinned memory, so copies to a GPU wait for nothing.
    """

    def packed(number: int) -> MicroBatch:
        batch = batches(number)
        return batch if device == "cpu" else replace(batch, data=each_tensor(batch.data, Tensor.pin_memory))

    remaining = iter(numbers)
    with ThreadPoolExecutor(1, "batches") as pool:
        waiting = deque(pool.submit(packed, number) for number in islice(remaining, BATCHES_AHEAD))
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(packed, number) for number in islice(remaining, 1))
                yield replace(batch, data=on_device(batch.data, device))
        finally:
            for future in waiting:
                future.cancel()


def on_device(data: Any, device: str) -> Any:
    """The tensors of a micro-batch's data on the device; copies from pinned memory do not wait."""
    return each_tensor(data, lambda tensor: tensor.to(device, non_blocking=True))


def each_tensor(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A micro-batch's data with `change` applied to its tensors, in one order always."""
    if isinstance(data, Tensor):
        return change(data)
    if is_dataclass(data) and not isinstance(data, type):
        return replace(data, **{part.name: each_tensor(getattr(data, part.name), change) for part in fields(data)})
    return data


def autocast(context: StageContext) -> torch.autocast:
    """Products in context.compute, weights as they are."""
    return torch.autocast(context.device, torch.bfloat16, enabled=context.compute == "bfloat16")


_PARTS = (
    (".mamba.", "mixer"),
    (".self_attn.", "attention"),
    (".mlp.", "mlp"),
    ("norm", "norms"),
    ("embed_tokens", "embeddings"),
    ("feature_proj", "embeddings"),
    ("lm_head", "embeddings"),
)
"""What marks a parameter's name → its part as `TrainConfig.frozen` calls it; the first that fits."""


DECAYS = ("A_log", "dt_bias", ".D")
"""Numbers of Mamba that are logarithms or few: at a matrix's rate they hardly move in a thousand steps."""


def select_parameters(
    model: HybridForCausalLM, config: TrainConfig, among: Sequence[nn.Module] = ()
) -> list[tuple[float, dict[str, Tensor]]]:
    """[(rate, name → parameter)] for mixers, their steps and decays where those have a rate of their own, and the rest
    but `config.frozen`; trained ones become float32, frozen ones stay as they are.

    among: modules of the model whose parameters alone can train, all if none is named.
    """
    mixers: dict[str, Tensor] = {}
    decays: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    eligible = {id(p) for module in among or [model] for p in module.parameters()}
    for name, parameter in model.named_parameters():
        part = next(part for mark, part in _PARTS if mark in name)
        is_mixer = part == "mixer"
        rate = config.mixer_lr if is_mixer else 0.0 if part in config.frozen else config.rest_lr
        rate = rate if id(parameter) in eligible else 0.0
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            parameter.data = parameter.data.float()
            is_decay = is_mixer and config.decay_lr_factor != 1.0 and name.endswith(DECAYS)
            (decays if is_decay else mixers if is_mixer else others)[name] = parameter
    if not mixers and not others:
        raise ValueError("nothing to train: mixer_lr and rest_lr are both 0, all is frozen, or the model has no mixer")
    groups = [(config.mixer_lr, mixers), (config.rest_lr, others)]
    return [*groups, (config.mixer_lr * config.decay_lr_factor, decays)] if decays else groups


def rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first warmup·steps, then a cosine to min_lr, as a factor of the peak rate."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class _LoopState:
    """steady_seconds, steady_positions: without the time up to a run's first look, when code is compiled."""

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    steady_seconds: float = 0.0
    steady_positions: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        if self.steady_positions:
            return self.steady_positions / max(self.steady_seconds, 1e-9)
        return self.positions / max(self.seconds, 1e-9)


class _Watch:
    """Loss curve, rates, progress and the check that training is sane."""

    def __init__(self, context: StageContext, config: TrainConfig, state: _LoopState, flops_per_token: int) -> None:
        self.context, self.config, self.state, self.flops_per_token = context, config, state, flops_per_token
        self.peak_flops = peak_flops(context.device)
        self.pending: list[tuple[int, Tensor, tuple[str, ...]]] = []
        self.figures: dict[str, Tensor] = {}
        self.last_checkpoint: int | None = state.step or None
        self.smooth = self.lowest = math.nan
        self.began = self.reported = self.looked = time.perf_counter()
        self.first_step, self.looked_positions = state.step, state.positions
        self.warm = False

    def after_step(self, micro_batches: list[MicroBatch], loss: Tensor, figures: dict[str, Tensor]) -> None:
        for batch in micro_batches:
            self.state.tokens += batch.tokens
            self.state.positions += batch.tokens if batch.positions is None else batch.positions
        documents = tuple(name for batch in micro_batches for name in batch.documents)
        self.pending.append((self.state.step, loss, documents))
        self.figures = figures
        waited = time.perf_counter() - self.reported
        if len(self.pending) >= CHECK_EVERY or waited > REPORT_SECONDS:
            self.look()
        if waited > REPORT_SECONDS:
            self._report()

    def look(self) -> None:
        """Read the losses since the last look; raises TrainingFailed."""
        for (step, _, documents), loss in zip(self.pending, [x.item() for _, x, _ in self.pending], strict=True):
            self.smooth = loss if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
            first = self.state.curve[0][1] if self.state.curve else loss
            self.lowest = min(self.smooth, self.lowest) if not math.isnan(self.lowest) else self.smooth
            if not math.isfinite(loss):
                self._fail(f"loss is {loss}", step, documents)
            if step > JUDGED_AFTER and self.smooth > DIVERGED * self.lowest and self.smooth > first:
                self._fail(f"loss diverges (smoothed {self.smooth:.4g}, lowest {self.lowest:.4g})", step, documents)
            self.state.curve.append((step, loss))
        self.pending = []
        now, positions = time.perf_counter(), self.state.positions
        self.state.seconds += now - self.looked
        if self.warm:
            self.state.steady_seconds += now - self.looked
            self.state.steady_positions += positions - self.looked_positions
        self.warm, self.looked, self.looked_positions = True, now, positions

    def _fail(self, what: str, step: int, documents: tuple[str, ...]) -> None:
        saved = f"step {self.last_checkpoint}" if self.last_checkpoint else "none"
        shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
        raise TrainingFailed(
            f"{what} at step {step} of {self.config.steps}; documents: {shown}; last good checkpoint: {saved}"
        )

    def _report(self) -> None:
        now = time.perf_counter()
        self.reported = now
        elapsed = max(now - self.began, 1e-9)
        figures = {"loss": self.state.curve[-1][1], "tokens/s": self.state.tokens_per_second}
        if (used := self._utilisation()) is not None:
            figures["utilisation"] = used
        if self.context.device == "cuda":
            figures["GB"] = torch.cuda.max_memory_reserved() / 1e9
        figures |= {name: float(value) for name, value in self.figures.items()}
        rate = (self.state.step - self.first_step) / elapsed
        self.context.progress(Progress(self.state.step, self.config.steps, "steps", rate, figures))

    def _utilisation(self) -> float | None:
        rate = self.state.tokens_per_second
        return utilisation(self.flops_per_token, rate, self.peak_flops, distributed.world_size())

    def summary(self, trained: int) -> dict[str, Any]:
        """What the manifest says of a training stage.

        tokens counts the tokens that the loss counts; tokens_per_second all positions that pass through the model,
        padding included, over all processes and after the first look (compilation). peak_memory_bytes is what torch
        held of the device at most, on process 0: what a CUDA graph works in does not count as allocated. utilisation is
        defined in `steps.utilisation`.
        """
        curve, used = self.state.curve, self._utilisation()
        stride = max(1, len(curve) // 200)
        peak = torch.cuda.max_memory_reserved() if self.context.device == "cuda" else None
        return {
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "positions": self.state.positions,
            "train_seconds": round(self.state.seconds, 2),
            "tokens_per_second": round(self.state.tokens_per_second, 1),
            "flops_per_token": self.flops_per_token,
            "utilisation": None if used is None else round(used, 4),
            "processes": distributed.world_size(),
            "loss_first": curve[0][1] if curve else None,
            "loss_last": sum(x for _, x in curve[-10:]) / len(curve[-10:]) if curve else None,
            "curve": [list(point) for point in curve[::stride]],
            "trained_parameters": trained,
            "peak_memory_bytes": peak,
        }


MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS, STATE, LOOP = "trained.safetensors", "state.safetensors", "loop.json"
GENERATORS = CPU_GENERATOR, CUDA_GENERATOR = "generator cpu", "generator cuda"


class _Saver:
    """Checkpoints of the loop: taken between two steps, written behind the training by a thread, one at a time.

    Process 0 alone reads and writes them. What they hold is whole, however many processes there are. Leaving the block
    waits for the last one.
    """

    def __init__(
        self, context: StageContext, trained: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.checkpoints: Checkpoints | None = context.checkpoints if distributed.rank() == 0 else None
        self.wanted = distributed.agreed(self.checkpoints is not None)
        self.trained = trained
        self.states = {p: o.state for o in optimizers for group in o.param_groups for p in group["params"]}
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what the last write ended with, if it has ended."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def save(self, state: _LoopState) -> None:
        """Take everything as it is now, and have it written once the checkpoint before is."""
        if not self.wanted:
            return
        if self.writing is not None:
            self.writing.result()
        weights = {name: _on_host(p) for name, p in self.trained.items()}
        moments = {
            f"{name} {moment}": _on_host(self.states[p][p][moment])
            for name, p in self.trained.items()
            for moment in MOMENTS
            if moment in self.states[p].get(p, ())
        }
        if torch.cuda.is_available():
            moments[CUDA_GENERATOR] = torch.cuda.get_rng_state()
            torch.cuda.synchronize()
        moments[CPU_GENERATOR] = torch.get_rng_state()
        if self.checkpoints is not None:
            write = _writer(weights, moments, json.dumps(asdict(state)))
            self.writing = self.pool.submit(self.checkpoints.save, state.step, write)

    def restore(self) -> _LoopState:
        """Weights, moments and generators as in the newest checkpoint; a state of no steps where there is none."""
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        text = distributed.agreed((found[1] / LOOP).read_text() if found else None)
        if text is None:
            return _LoopState()
        state = _LoopState(**json.loads(text))
        state.curve = [(step, loss) for step, loss in state.curve]
        weights, moments = (load_file(found[1] / name) if found else {} for name in (WEIGHTS, STATE))
        kept = distributed.agreed(set(moments))
        for name, p in self.trained.items():
            distributed.fill(p, weights.get(name))
            for moment in MOMENTS:
                if (key := f"{name} {moment}") in kept:
                    # Every trained weight has had a gradient in every step, or never.
                    own = self.states[p].setdefault(p, {"step": torch.tensor(float(state.step), device=p.device)})
                    own[moment] = torch.zeros_like(p)
                    distributed.fill(own[moment], moments.get(key))
        generators = distributed.agreed({name: moments[name] for name in GENERATORS if name in moments})
        torch.set_rng_state(generators[CPU_GENERATOR])
        if CUDA_GENERATOR in generators and torch.cuda.is_available():
            with suppress(RuntimeError):  # a checkpoint from another GPU model: no stage draws on its generator
                torch.cuda.set_rng_state(generators[CUDA_GENERATOR])
        return state


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory of the whole of a tensor; from a GPU it is only under way."""
    whole = distributed.full(tensor.detach())
    if distributed.rank() != 0:
        return torch.empty(0)
    if whole.device.type == "cpu":
        return whole.clone()
    return torch.empty_like(whole, device="cpu", pin_memory=True).copy_(whole, non_blocking=True)


def _writer(weights: dict[str, Tensor], state: dict[str, Tensor], loop: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)
        save_file(state, folder / STATE)
        (folder / LOOP).write_text(loop)

    return write
