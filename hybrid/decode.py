"""What the layers of a model share while a window of tokens is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.cache import Cursors


@dataclass(frozen=True)
class DecodeStep:
    """One window of tokens per row.

    batch, length: B rows, T tokens each. slots (B,) int32: each row's slot of the cache, −1 for rows that are inert.
    window: the most tokens that a round may read, K + 1. offset: how many of them were read before this call.
    rope: cos and sin by position, (max_length, P / 2) float32.
    """

    batch: int
    length: int
    slots: Tensor
    cursors: Cursors
    window: int
    offset: int
    rope: tuple[Tensor, Tensor]


def joined(*weights: Tensor) -> Tensor:
    """One weight (Σ out, in) of those of projections of the same input, so that they are one matrix product; or one
    bias (Σ out,).

    Nothing is held twice: the projections' own weights become views of it, in place, which training and saving do not
    notice. Made once; afterwards found again by address.
    """
    first, rows = weights[0], sum(w.shape[0] for w in weights)
    expected = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != expected or not weight.is_contiguous():
            break
        expected += weight.numel() * weight.element_size()
    else:
        storage = first.untyped_storage()
        if all(w.untyped_storage().data_ptr() == storage.data_ptr() for w in weights):
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([w.detach() for w in weights])
    for weight, part in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part
    return whole
