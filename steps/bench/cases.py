"""The rows of the bench, in order, and what fills them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hybrid.bench import peers, timed
from hybrid.bench.cases import CHAT, short_prompts
from hybrid.bench.timed import GATE_TOKENS, RefusedError, Spread, TimedEngine, attempt, require
from hybrid.shapes import random_model, shape
from steps.bench.clock import StepClock
from steps.bench.naive import NaiveForm
from steps.bench.rows import NAIVE, OURS, Row
from steps.bench.trial import TRAINED, Trial
from steps.loop import autocast, on_device
from steps.stage import StageContext
from steps.students import compute_type
from steps.utilisation import FORWARD, matrix_weights

NAMES = ("kl", "align", "self-chat", "sft", "dpo")
PROFILED = ("kl", "align")
PROFILED_STEPS = 3
LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 1e-4}
"""Largest relative difference of the first loss from the naive form's, by the type of matrix products. Rounding to
bfloat16 moves KL by 1.4e-3 at SmolLM2's depth and width, DPO by 2e-2 for one pair, by less for the mean of many."""
HIDDEN_TOLERANCE = {"bfloat16": 0.08, "float32": 1e-4}
"""Largest relative Frobenius error of the student's final hidden states. There bfloat16 puts each form 3e-2 to 4e-2
from float32, in which both are the same."""


@dataclass(frozen=True)
class Load:
    """What is run at a shape. batches: (rows, length) of a training step, tried in order until one fits in memory.

    chat: (conversations, new tokens of each). naive_chat_tokens: new tokens of each with transformers' `generate`.
    """

    batches: tuple[tuple[int, int], ...]
    chat: tuple[int, int]
    naive_chat_tokens: int


LOADS = {
    "smollm2": Load(((32, 512),), (2048, 512), 64),
    "1b": Load(((8, 2048), (16, 512), (8, 512)), (2048, 128), 32),
    "tiny-llama": Load(((4, 64),), (4, 16), 4),
}


@dataclass(frozen=True)
class Settings:
    """What is measured. steps: timed, of our form; warm_up: before them, and before the naive form's too.

    profile: trace PROFILED_STEPS more of the stages PROFILED. naive: time the naive form too; the check of the losses
    runs it once in any case. chat_repeats: of self-chat, all conversations each.
    """

    device: str = "cuda"
    compute: str = "bfloat16"
    shapes: tuple[str, ...] = ("smollm2", "1b")
    steps: int = 10
    naive_steps: int = 5
    warm_up: int = 3
    naive_warm_up: int = 2
    chat_repeats: int = 3
    chat_prompt: int = 8
    profile: bool = False
    naive: bool = True


@dataclass
class Job:
    """A row and what fills it in, or raises."""

    row: Row
    fill: Callable[[Row], None]

    def run(self) -> None:
        """Fill the row in, or say in its note why not."""
        name = f"{self.row.stage} {self.row.shape} {self.row.form}"
        self.row.note = attempt(lambda: self.fill(self.row), name) or self.row.note


@dataclass
class Bench:
    """scratch: folder for the random corpus. peak: FLOP per second that utilisation is a share of, None if unknown."""

    settings: Settings
    scratch: Path
    peak: float | None = None
    _ours: dict[tuple[str, str], Row] = field(default_factory=dict)

    def jobs(self, names: Sequence[str]) -> Iterator[Job]:
        """Our form of a stage at each shape, each followed by the naive one."""
        for stage in (name for name in NAMES if name in names):
            trains = stage in TRAINED
            for name in self.settings.shapes:
                self._ours[stage, name] = Row(stage, name, OURS)
                yield Job(self._ours[stage, name], self._train if trains else self._chat)
                if self.settings.naive:
                    yield Job(Row(stage, name, NAIVE), self._train_naively if trains else self._chat_naively)

    def _train(self, row: Row) -> None:
        self._in_largest_batch(row, self._fit)

    def _train_naively(self, row: Row) -> None:
        self._in_largest_batch(row, self._fit_naively)
        self._compare(row)

    def _fit(self, row: Row, rows: int, length: int) -> None:
        settings = self.settings
        profiled = PROFILED_STEPS if settings.profile and row.stage in PROFILED else 0
        clock = StepClock(settings.device, settings.warm_up, settings.steps, profiled)
        trial = self._trial(row, rows, length, clock.steps)
        expected = self._expected_loss(trial)
        if row.stage == "sft":
            del trial.teacher  # the stage has none while it trains
        free()
        with clock:
            summary = trial.fit()
        row.loss, row.flops_per_token = summary["loss_first"], summary["flops_per_token"]
        tolerance = LOSS_TOLERANCE[settings.compute]
        if not abs(row.loss - expected) <= tolerance * abs(expected):
            raise RefusedError(
                f"wrong: the first loss is {row.loss:.5g}, the naive form's on the same weights {expected:.5g}, "
                f"allowed are {tolerance:.2%}"
            )
        self._fill(row, clock, trial)
        row.profile = clock.profile

    def _fit_naively(self, row: Row, rows: int, length: int) -> None:
        settings = self.settings
        clock = StepClock(settings.device, settings.naive_warm_up, min(settings.steps, settings.naive_steps))
        trial = self._trial(row, rows, length, clock.steps)
        row.flops_per_token = self._ours[row.stage, row.shape].flops_per_token
        naive = NaiveForm(row.stage, trial.teacher, trial.student, trial.config)
        del trial.teacher, trial.student
        free()
        with clock:
            row.loss = naive.fit(trial.batches, clock.steps, trial.context)
        self._fill(row, clock, trial)

    def _trial(self, row: Row, rows: int, length: int, steps: int) -> Trial:
        trial = Trial(row.stage, row.shape, rows, length, steps, self._context, self.scratch)
        row.rows, row.length = trial.batch_shape
        return trial

    @torch.no_grad()
    def _expected_loss(self, trial: Trial) -> float:
        """The naive form's on the first batch and the trial's weights. RefusedError unless the students' final hidden
        states agree too: among random tokens a cross entropy says little of the model."""
        naive = NaiveForm(trial.stage, trial.teacher, trial.student, trial.config)
        batch = on_device(trial.batches(0).data, trial.context.device)
        tokens, seq_idx = batch.tokens[:1], batch.seq_idx[:1]
        with autocast(trial.context):
            theirs = naive.hidden(tokens, seq_idx).double()
            error = float((trial.student.hidden(tokens, seq_idx).double() - theirs).norm() / theirs.norm())
            loss = naive.loss(batch).item()
        tolerance = HIDDEN_TOLERANCE[self.settings.compute]
        if not error <= tolerance:  # so that NaN is refused
            raise RefusedError(f"wrong: hidden states differ from the naive form's by {error:.1e} > {tolerance:.0e}")
        return loss

    def _fill(self, row: Row, clock: StepClock, trial: Trial) -> None:
        spans = clock.milliseconds
        computed = [trial.positions[step] for step in range(clock.warm_up, clock.warm_up + clock.timed)]
        rates = [n / ms * 1e3 for n, ms in zip(computed, spans, strict=True)]
        row.time(Spread.of(spans), Spread.of(rates).median, self.peak)
        row.first_step_s = clock.first_step_s
        row.peak_memory_bytes, row.held_memory_bytes = clock.peak_memory_bytes, clock.held_memory_bytes

    def _in_largest_batch(self, row: Row, fit: Callable[[Row, int, int], None]) -> None:
        """`fit` in the first of the shape's batches that fits in memory."""
        too_large = []
        for rows, length in LOADS[row.shape].batches:
            try:
                fit(row, rows, length)
            except torch.OutOfMemoryError:
                too_large.append(f"{row.rows}×{row.length}")
            else:
                row.note = "; ".join(f"{batch} does not fit in memory" for batch in too_large)
                return
            free()  # not within `except`, where the traceback holds the tensors
        raise RefusedError(f"no memory for {', '.join(too_large)}")

    def _chat(self, row: Row) -> None:
        """Sampling many conversations at once as the corpus stage does, prompts read included."""
        settings = self.settings
        row.rows, new_tokens = LOADS[row.shape].chat
        row.length = settings.chat_prompt + new_tokens
        model = random_model(shape(row.shape), settings.device, compute_type(self._context))
        row.flops_per_token = FORWARD * matrix_weights(model)
        longest = max(row.length, settings.chat_prompt + GATE_TOKENS)
        engine = TimedEngine(model, batch=row.rows, max_length=longest, sampling=CHAT)
        prompts = short_prompts(model, row.rows, settings.chat_prompt)
        require(engine, prompts)
        self._reset_peak()
        runs = [engine.generate(prompts, new_tokens, seed=i) for i in range(settings.chat_repeats + 1)]
        seconds = [run.prefill_seconds + run.decode_seconds for run in runs]
        self._fill_chat(row, Spread.of([s / new_tokens * 1e3 for s in seconds[1:]]))

    def _chat_naively(self, row: Row) -> None:
        """`generate` of transformers with SDPA and its dynamic cache."""
        settings, load = self.settings, LOADS[row.shape]
        row.rows, new_tokens = load.chat[0], load.naive_chat_tokens
        row.length = settings.chat_prompt + new_tokens
        model = random_model(shape(row.shape), settings.device, compute_type(self._context))
        row.flops_per_token = FORWARD * matrix_weights(model)
        tokens = torch.tensor(short_prompts(model, row.rows, settings.chat_prompt), device=settings.device)
        twin = peers.transformers_twin(model)
        del model
        self._reset_peak()
        sampled = {"do_sample": True, "temperature": 1.0, "top_p": CHAT.top_p, "top_k": 0}
        spread, _ = peers.generate_seconds(twin, tokens, new_tokens, repeats=2, **sampled)
        ms = 1e3 / new_tokens
        self._fill_chat(row, Spread(spread.median * ms, spread.iqr * ms, spread.repeats))
        self._compare(row)

    def _fill_chat(self, row: Row, per_token: Spread) -> None:
        row.time(per_token, row.rows / per_token.median * 1e3, self.peak)
        if self.settings.device == "cuda":
            row.peak_memory_bytes = torch.cuda.max_memory_allocated()
            row.held_memory_bytes = torch.cuda.max_memory_reserved()

    def _compare(self, row: Row) -> None:
        ours = self._ours[row.stage, row.shape].tokens_per_second
        if ours is not None and row.tokens_per_second is not None:
            row.ratio = ours / row.tokens_per_second

    def _reset_peak(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def _context(self) -> StageContext:
        return StageContext(self.settings.device, self.settings.compute, seed=0, scratch=self.scratch)


def free() -> None:
    """Give back what nothing refers to any more, compiled code too: a stage has a process of its own, and so many forms
    of one function in one process would run uncompiled."""
    torch.compiler.reset()
    timed.free()
