"""mamba-ssm's CUDA kernel of the selective scan behind the signature of `selective_scan`. Needs CUDA and an installed
mamba-ssm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_ext.selective_scan.reference import check_groups, selective_scan

RESET = 2.0**40
"""Time step that leaves nothing of a state: exp(−|A|·RESET) is 0 in float32 for all |A| > 1e-10."""


def selective_scan_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.selective_scan`, which serves where there is an initial state, as the kernel has none; no gradient
    passes through the final state.

    The kernel wants one x per channel, one B and C per N channels, one type for all, here float32, and tokens last. Nor
    does it know of documents: before each but a row's first a token of x = 0 and dt = RESET ends what the state held.
    How many the fullest row has is asked of the device, so this cannot be captured in a CUDA graph.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    check_groups(x.shape[2], C.shape[2])
    if initial_state is not None:
        return selective_scan(x, dt, A, B, C, D, seq_idx, initial_state)
    heads, headdim = C.shape[2], x.shape[-1]
    ratio = heads // x.shape[2]
    inputs = [
        x.repeat_interleave(ratio, dim=2).flatten(2),  # (B, L, D)
        dt,
        B.repeat_interleave(ratio, dim=2).flatten(2),
        C.flatten(2),
    ]
    inputs = [t.float() for t in inputs]
    place = None
    if seq_idx is not None:
        is_first = pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # (B, L)
        place = torch.arange(x.shape[1], device=x.device) + is_first.cumsum(1)
        length = x.shape[1] + int(is_first.sum(1).max())
        inputs = [_spread(t, place, length) for t in inputs]
        row, token = is_first.nonzero(as_tuple=True)
        inputs[1] = inputs[1].index_put((row, place[row, token] - 1), inputs[1].new_tensor(RESET))
    u, delta, B, C = (t.transpose(1, 2).contiguous() for t in inputs)  # (B, D, L)
    pieces = (-1, A.shape[1])
    y, state = selective_scan_fn(
        u, delta, A.float(), B.unflatten(1, pieces), C.unflatten(1, pieces), D.float(), return_last_state=True
    )
    y = y.transpose(1, 2)
    if place is not None:
        y = y.gather(1, place[..., None].expand(-1, -1, y.shape[-1]))
    return y.unflatten(-1, (heads, headdim)).to(x.dtype), state.detach()


def _spread(tokens: Tensor, place: Tensor, length: int) -> Tensor:
    """(B, length, ·) with tokens (B, L, ·) at their places (B, L), which increase, and zeros between them."""
    spread = tokens.new_zeros(len(tokens), length, tokens.shape[-1])
    return spread.scatter(1, place[..., None].expand_as(tokens), tokens)
