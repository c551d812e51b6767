"""A short training run with all that a crash could disturb; as a program, one that can be killed in its midst.

`python training.py STORE BLOCK`: says "waiting" when it is asked for micro-batch BLOCK, and goes no further.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from stage_store import Checkpoints, Store
from steps.config import TrainConfig
from steps.loop import MicroBatch, train
from steps.losses import ce_loss
from steps.stage import StageContext
from tests.hybrid import tiny_hybrid

CONFIG = TrainConfig(
    optimizer="muon",
    steps=9,
    batch_size=4,
    accumulation=2,
    mixer_lr=3e-3,
    rest_lr=1e-3,
    warmup=0.3,
    weight_decay=0.01,
    checkpoint_every=2,
)


def context(checkpoints: Any = None, compute: str = "float32") -> StageContext:
    return StageContext("cpu", compute, seed=5, scratch=Path("unused"), checkpoints=checkpoints)


def store_checkpoints(store: Path) -> Checkpoints:
    return Checkpoints(Store(store), "align", "0" * 64)


def student(**changes: Any) -> HybridForCausalLM:
    return tiny_hybrid.model(n_layers=2, attention_layers=(1,), **changes)


def batches(number: int, rows: int = 2) -> MicroBatch:
    text = tiny_hybrid.tokens(rows, 13, seed=number)
    return MicroBatch(text, text.numel() - rows, (f"d{number}",))


def loss_function(model: HybridForCausalLM, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = model.hidden(text[:, :-1])
    return ce_loss(hidden, model.lm_head_weight, text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool)), {}


def noisy_loss(model: HybridForCausalLM, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws random numbers as dropout would: their generator is part of the state."""
    loss, figures = loss_function(model, text)
    return loss * (0.5 + torch.rand(())), figures


def run(checkpoints: Any, source: Any = batches) -> tuple[HybridForCausalLM, dict[str, Any]]:
    model = student()
    return model, train(model, source, noisy_loss, CONFIG, context(checkpoints))


def main() -> None:
    store, block = Path(sys.argv[1]), int(sys.argv[2])

    def blocking(number: int) -> MicroBatch:
        if number == block:
            print("waiting", flush=True)
            sys.stdin.readline()
        return batches(number)

    run(store_checkpoints(store), blocking)


if __name__ == "__main__":
    main()
