"""The only training loop: align, KL, SFT and DPO differ in their batches and their loss, not in how they train."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid import HybridForCausalLM
from steps.config import TrainConfig
from steps.stage import Progress, StageContext

log = logging.getLogger(__name__)

CHECK_EVERY = 10
"""Steps between looks at the loss: each look waits for the device."""
REPORT_SECONDS = 5.0
DIVERGED = 3.0
JUDGED_AFTER = 20
"""After this many steps, a smoothed loss DIVERGED times its lowest value, and above where it began, is divergence: the
first steps of a warm-up often jump and come back."""


class TrainingFailed(RuntimeError):
    """The loss is not a number, or diverges; the message names step, documents and the last good checkpoint."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on.

    data:      whatever the stage's loss takes, tensors on the device.
    tokens:    tokens in it that count.
    documents: names of the documents in it, for error messages.
    """

    data: Any
    tokens: int
    documents: tuple[str, ...]


BatchSource = Callable[[int], MicroBatch]
"""Micro-batch number → micro-batch. A pure function, so a run that continues sees the same data."""

LossFunction = Callable[[HybridForCausalLM, Any], tuple[Tensor, dict[str, Tensor]]]


def train(
    model: HybridForCausalLM,
    batches: BatchSource,
    loss_function: LossFunction,
    config: TrainConfig,
    context: StageContext,
) -> dict[str, Any]:
    """Train `model` in place for config.steps optimiser steps; returns the summary for the manifest.

    Mixers train at mixer_lr, everything else at rest_lr, where 0 freezes; trained weights are float32, products run in
    context.compute. Continues from the newest checkpoint, to the same weights as if it had never stopped.
    """
    torch.manual_seed(context.seed)
    # Accelerate's own mixed precision is one for the whole process and stays on the model after training.
    accelerator = Accelerator(
        cpu=context.device == "cpu", mixed_precision="no", gradient_accumulation_steps=config.accumulation
    )
    parameters = select_parameters(model, config)
    optimizer = torch.optim.AdamW(
        [
            {"params": part, "lr": lr, "weight_decay": decay}
            for lr, group in parameters
            for part, decay in _decayed(group, config.weight_decay)
        ],
        betas=config.betas,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, config))
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = {name: p for _, group in parameters for name, p in group.items()}
    state = _LoopState()
    if context.checkpoints is not None and (found := context.checkpoints.latest()):
        state = _restore(found[1], trained, optimizer, schedule)
        log.info("continuing from step %d of %d", state.step, config.steps)
    model.train()
    watch = _Watch(context, config, state)
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while state.step < config.steps:
        losses: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        for micro in range(config.accumulation):
            batch = batches(state.step * config.accumulation + micro)
            with accelerator.accumulate(model):
                with autocast(context):
                    loss, figures = loss_function(model, batch.data)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained.values(), config.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            watch.saw(batch)
        schedule.step()
        state.step += 1
        watch.after_step(torch.stack(losses).mean(), figures)
        last = state.step == config.steps
        if context.checkpoints is not None and not last and state.step % config.checkpoint_every == 0:
            watch.look()
            context.checkpoints.save(state.step, lambda folder: _write(folder, state, trained, optimizer, schedule))
            watch.last_checkpoint = state.step
    watch.look()
    model.eval().requires_grad_(False)
    return watch.summary(sum(p.numel() for p in trained.values()))


def autocast(context: StageContext) -> torch.autocast:
    """Products in context.compute, weights as they are."""
    return torch.autocast(context.device, torch.bfloat16, enabled=context.compute == "bfloat16")


def select_parameters(model: HybridForCausalLM, config: TrainConfig) -> list[tuple[float, dict[str, Tensor]]]:
    """[(rate, name → parameter)] for mixers and for the rest; trained ones become float32, frozen ones stay as they
    are."""
    groups: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        is_mixer = ".mamba." in name
        rate = config.mixer_lr if is_mixer else config.rest_lr
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            parameter.data = parameter.data.float()
            groups[is_mixer][name] = parameter
    if not any(groups.values()):
        raise ValueError("nothing to train: mixer_lr and rest_lr are both 0, or the model has no mixer")
    return [(config.mixer_lr, groups[True]), (config.rest_lr, groups[False])]


def _decayed(group: dict[str, Tensor], weight_decay: float) -> list[tuple[list[Tensor], float]]:
    """Matrices decay; norms, biases, A_log, dt_bias and D do not, as in mamba-ssm."""
    matrices = [p for name, p in group.items() if p.ndim > 1 and not name.endswith("A_log")]  # Mamba-1's is (D, N)
    others = [p for name, p in group.items() if p.ndim <= 1 or name.endswith("A_log")]
    return [(part, decay) for part, decay in ((matrices, weight_decay), (others, 0.0)) if part]


def rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first warmup·steps, then a cosine to min_lr, as a factor of the peak rate."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class _LoopState:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()


class _Watch:
    """Loss curve, rates, progress and the check that training is sane."""

    def __init__(self, context: StageContext, config: TrainConfig, state: _LoopState) -> None:
        self.context, self.config, self.state = context, config, state
        self.pending: list[tuple[int, Tensor, tuple[str, ...]]] = []
        self.documents: tuple[str, ...] = ()
        self.figures: dict[str, Tensor] = {}
        self.last_checkpoint: int | None = state.step or None
        self.smooth = self.lowest = math.nan
        self.began = self.reported = self.looked = time.perf_counter()
        self.first_step, self.first_tokens = state.step, state.tokens

    def saw(self, batch: MicroBatch) -> None:
        self.documents += batch.documents
        self.state.tokens += batch.tokens

    def after_step(self, loss: Tensor, figures: dict[str, Tensor]) -> None:
        self.pending.append((self.state.step, loss, self.documents))
        self.documents, self.figures = (), figures
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
            self.state.curve += ((step, loss),)
        self.pending = []
        now = time.perf_counter()
        self.state.seconds += now - self.looked
        self.looked = now

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
        figures = {"loss": self.state.curve[-1][1], "tokens/s": (self.state.tokens - self.first_tokens) / elapsed}
        figures |= {name: float(value) for name, value in self.figures.items()}
        rate = (self.state.step - self.first_step) / elapsed
        self.context.progress(Progress(self.state.step, self.config.steps, "steps", rate, figures))

    def summary(self, trained: int) -> dict[str, Any]:
        curve = self.state.curve
        stride = max(1, len(curve) // 200)
        peak = torch.cuda.max_memory_allocated() if self.context.device == "cuda" else None
        return {
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "train_seconds": round(self.state.seconds, 2),
            "tokens_per_second": round(self.state.tokens / max(self.state.seconds, 1e-9), 1),
            "loss_first": curve[0][1] if curve else None,
            "loss_last": sum(x for _, x in curve[-10:]) / len(curve[-10:]) if curve else None,
            "curve": [list(point) for point in curve[::stride]],
            "trained_parameters": trained,
            "peak_memory_bytes": peak,
        }


def _write(folder: Path, state: _LoopState, trained: dict[str, Tensor], optimizer: Any, schedule: Any) -> None:
    save_file({name: p.detach().cpu().contiguous() for name, p in trained.items()}, folder / "trained.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    torch.save(
        {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "rng": rng, "loop": vars(state)},
        folder / "state.pt",
    )


def _restore(folder: Path, trained: dict[str, Tensor], optimizer: Any, schedule: Any) -> _LoopState:
    weights = load_file(folder / "trained.safetensors")
    for name, parameter in trained.items():
        parameter.data.copy_(weights[name])
    saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in saved["rng"]:
        with suppress(RuntimeError):  # a checkpoint from another GPU model: no stage draws on the device's generator
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
    return _LoopState(**saved["loop"])
