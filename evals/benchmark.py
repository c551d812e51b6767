"""What every benchmark takes and gives: `measure(subject: Subject, config) -> Found`, one function a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hybrid.model import HybridForCausalLM


@dataclass(frozen=True)
class Subject:
    """What is measured, and what with.

    Attributes:
        name: "teacher" or "student".
        model: the measured model, in evaluation mode on its device.
        tokenizer: the tokenizer of both models, with the chat template that goes with the measured one.
        teacher: the model that a student is compared with inside a benchmark (KL, layers); None for the teacher itself.
            Only `fidelity` and `layers` may run it: before the others it leaves the device.
        corpus: folder of the corpus stage (held_out.npz, held_out_text.npz, natural.npz, …).
        teacher_rows: folder of the teacher's own benchmark (rows.parquet, summary.json), for a student.
        seed: of every sample of items and every drawn prompt: the same one for teacher and student.
        batch_size: sequences read at a time.
        train_length: tokens of a training sequence; figures of long context mark it.
        work: folder that survives a crash of the stage, for what a benchmark appends to (answers, judgments).
        progress: told the share of this benchmark that is done (0 to 1) and a phrase with the latest figure.
    """

    name: str
    model: HybridForCausalLM
    tokenizer: PreTrainedTokenizerBase
    teacher: HybridForCausalLM | None
    corpus: Path
    teacher_rows: Path | None
    seed: int
    batch_size: int
    train_length: int
    work: Path
    progress: Callable[[float, str], None]

    @property
    def context(self) -> int:
        """Tokens that the model and, for a student, its teacher have positions for."""
        models = [self.model, *([self.teacher] if self.teacher is not None else [])]
        return min(model.config.max_position_embeddings for model in models)


@dataclass
class Found:
    """What a benchmark measured.

    Attributes:
        records: rows with the columns of `evals.rows`, except run and model, which the stage adds.
        summary: JSON for summary.json under the benchmark's section; None leaves the section out.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    summary: Any = None
