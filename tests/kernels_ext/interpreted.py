"""Triton kernels on whatever there is: compiled on CUDA, through Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch


def interpreted(name: str) -> ModuleType:
    """Import a module of kernels; without CUDA its kernels are interpreted.

    Triton decides when a kernel is defined, so the variable is set for the import alone: `kernels_ext.dispatch` goes by
    it too, and the rest of the tests is to run on the plain PyTorch code.
    """
    if torch.cuda.is_available():
        return importlib.import_module(name)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module(name)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
