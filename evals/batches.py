"""Sequences of unequal length to right-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

PADDING = 0


def length_sorted(
    sequences: Sequence[Sequence[int] | np.ndarray], batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of neighbours in length, longest first, so that little is padded and memory runs out at once or never.

    Yields the positions in `sequences` and tokens (B, L) int64. Padding is on the right, where no position of a causal
    model that is scored can see it, neither by attention nor through a convolution or a state.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        tokens = torch.full((len(chosen), len(sequences[chosen[0]])), PADDING, dtype=torch.int64)
        for row, i in enumerate(chosen):
            tokens[row, : len(sequences[i])] = torch.as_tensor(np.asarray(sequences[i], dtype=np.int64))
        yield chosen, tokens.to(device)
