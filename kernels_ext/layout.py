"""How training's kernels take their arguments: any strides but in the last dimension, and documents where there are
any."""

from __future__ import annotations

from torch import Tensor


def rows_contiguous(t: Tensor) -> Tensor:
    """Kernels step by one through the last dimension and by any stride through the others."""
    return t if t.stride(-1) == 1 else t.contiguous()


def document_strides(seq_idx: Tensor | None) -> tuple[int, ...]:
    """Of seq_idx (B, L); zeros, never used, where no documents are told."""
    return (0, 0) if seq_idx is None else seq_idx.stride()
