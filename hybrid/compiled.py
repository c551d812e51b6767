"""Training passes under torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import config as functorch

from hybrid.model import HybridForCausalLM
from kernels_ext import dispatch


@contextmanager
def compiled_blocks(*models: HybridForCausalLM, kept_activations: float = 1.0) -> Iterator[None]:
    """Inside, the blocks of models on CUDA run compiled; elsewhere nothing changes.

    For passes that are all of one shape: a new shape costs seconds of compilation. Compiled code is dropped at the end,
    lest the next models of the process meet the compiler's limit of forms. kept_activations: share of what the backward
    pass needs that is kept for it; below 1 the compiler chooses what is cheapest to compute again.
    """
    on_cuda = [model for model in models if model.device.type == "cuda"]
    for model in on_cuda:
        compile_blocks(model)
    try:
        with functorch.patch(activation_memory_budget=kept_activations):
            yield
    finally:
        for model in on_cuda:
            model.blocks_compiled = False
            for block in model.blocks:
                block._compiled_call_impl = None
        if on_cuda:
            torch.compiler.reset()


def compile_blocks(model: HybridForCausalLM, **options: Any) -> None:
    """All blocks of a kind share one compiled form; a model compiled whole would take minutes.

    options: of torch.compile.
    """
    model.blocks_compiled = model.device.type == "cuda"  # masks by blocks have a gradient there alone
    if model.blocks_compiled:
        dispatch.choose_training_kernels()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, **options)
