"""Mamba-2 decoding from one checkpointed state and a ring of raw inputs (2405.21060 §6; 2408.15237 §5).

For head h of group g = h // R, with a_t = dt_t·A ≤ 0 and the columns j of the ring from `start` on, where token t of
the window is column c_t and S is the state before column 0:

    y_t = exp(Σ_{r≤c_t} a_r)·S·C_t + Σ_{j≤c_t} exp(Σ_{j<r≤c_t} a_r)·dt_j·(B_j·C_t)·x_j + D·x_t

Folding m columns:  S ← exp(Σ_{r<m} a_r)·S + Σ_{j<m} exp(Σ_{j<r<m} a_r)·dt_j·x_j ⊗ B_j.

Tokens are addressed by their absolute position: position p lives in ring slot p % L. `lengths` (S,) counts the
committed tokens of a cache slot and `folded` (S,) those of them that are in its state; positions [folded, lengths) are
the history. The first call of a round (offset 0) folds the history if `lengths − folded + 2·window > L`; the later
calls of that round then start at `lengths`. To roll back is to leave `lengths` as it is.

Legend: B rows of the batch, T window tokens, S slots of the cache, L ring slots, H heads, G groups (H = G·R), P
headdim, N d_state. `slots` (B,) int32 gives the cache slot of each row, each at most once; −1 is padding: its output
is zero and no cache is touched. Ring slots without a live token may hold anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_ext.slots import writing_rows


def check_groups(heads: int, groups: int) -> None:
    """ValueError unless the groups share the heads evenly."""
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups evenly: change n_heads or n_kv_heads")


def check_window(tokens: int, offset: int, window: int, ring: int) -> None:
    """ValueError unless the call stays inside its round's window and the ring holds two windows."""
    if tokens + offset > window:
        raise ValueError(f"{tokens} tokens at offset {offset} exceed the window of {window}: raise the window (K + 1)")
    if ring < 2 * window:
        raise ValueError(
            f"a ring of {ring} slots is shorter than two windows of {window}: "
            f"raise the ring to {2 * window} or more, or lower the window (K + 1)"
        )


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of the recurrence S ← exp(dt·A)·S + dt·x ⊗ B, y = S·C + D·x; the state is written in place.

    state (S, H, P, N) float32 or bfloat16; x (B, G, P), B (B, G, N), C (B, H, N) in the activations' type, the last
    dimension contiguous; dt (B, H) float32 after softplus, 0 leaves the state as it is; A (H,) float32 negative; D
    (H,) or None; slots (B,) int32, None for row b in slot b. Computes in float32; y (B, H, P) in x's type, from the
    new state before it is rounded to its own type. ValueError if G does not divide H.
    """
    batch, groups, headdim = x.shape
    heads, d_state = C.shape[1:]
    check_groups(heads, groups)
    slots = torch.arange(batch, device=state.device) if slots is None else slots
    source, target, writes = writing_rows(slots)
    dtype = x.dtype
    x, dt, B, C = (t[source].float() for t in (x, dt, B, C))
    before = state[target]
    write = x[:, :, None, :, None] * B[:, :, None, None, :]  # (B, G, 1, P, N)
    write = write * dt.view(batch, groups, heads // groups, 1, 1)
    after = before.float() * torch.exp(dt * A.float())[..., None, None] + write.view(batch, heads, headdim, d_state)
    y = (after @ C[..., None]).squeeze(-1)  # (B, H, P)
    if D is not None:
        y = y + D.float()[:, None] * x.repeat_interleave(heads // groups, dim=1)
    state.index_copy_(0, target, torch.where(writes[:, None, None, None], after.to(state.dtype), before))
    return torch.where((slots >= 0)[:, None, None], y, 0.0).to(dtype)


def ssd_verify(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
) -> Tensor:
    """Outputs of the T tokens at positions lengths + offset …, which are in the rings already, as is the history.

    state (S, H, P, N) float32 or bfloat16; ring_x (S, L, G, P) and ring_B (S, L, G, N) in the activations' type, the
    last dimension contiguous; ring_dt (S, H, L) float32 after softplus; C (B, T, H, N); A (H,) float32 negative; D (H,)
    or None; lengths, folded (S,) and slots (B,) int32. `window`: most tokens of a round; `offset`: tokens of the round
    that earlier calls read. The state is read once and written only by the first call of a round that is due to fold.
    Returns y (B, T, H, P) in C's type. ValueError if T + offset > window, L < 2·window or G does not divide H.
    """
    batch, tokens, heads, d_state = C.shape
    ring, groups, headdim = ring_x.shape[1:]
    dtype = C.dtype
    check_groups(heads, groups)
    check_window(tokens, offset, window, ring)
    ratio = heads // groups
    source, target, writes = writing_rows(slots)
    length, start = lengths[target].long(), folded[target].long()
    due = length - start + 2 * window > ring
    if offset > 0:
        start = torch.where(due, length, start)
    history = length - start + offset  # (B,) columns before the window
    x, B, dt = _columns(ring_x, ring_B, ring_dt, target, start, history + tokens)
    log_decay = dt * A.float()[:, None]  # (B, H, L)
    column = torch.arange(ring, device=state.device)
    own = history[:, None] + torch.arange(tokens, device=state.device)  # (B, T): column of each window token
    visible = (column <= own[..., None])[:, None]  # (B, 1, T, L)
    steps = torch.where(visible, log_decay[:, :, None], 0.0)  # (B, H, T, L)
    weights = torch.where(visible, torch.exp(_after(steps)) * dt[:, :, None], 0.0)

    C = C[source].float().view(batch, tokens, groups, ratio, d_state).permute(0, 2, 3, 1, 4)  # (B, G, R, T, N)
    scores = C.flatten(2, 3) @ B.transpose(-1, -2)  # (B, G, R·T, L)
    mixed = (scores * weights.view(batch, groups, ratio * tokens, ring)) @ x  # (B, G, R·T, P)
    before = state[target]
    y = C.reshape(batch, heads, tokens, d_state) @ before.float().transpose(-1, -2)  # (B, H, T, P)
    y = y * torch.exp(steps.sum(-1))[..., None] + mixed.view(batch, heads, tokens, headdim)
    if D is not None:
        place = (start[:, None] + own) % ring
        skip = ring_x[target[:, None], place].float().transpose(1, 2)  # (B, G, T, P)
        y = y + D.float()[:, None, None] * skip.repeat_interleave(ratio, dim=1)
    if offset == 0:
        after = _fold(before, x, B, dt, log_decay, history)
        write = (due & writes)[:, None, None, None]
        state.index_copy_(0, target, torch.where(write, after, before))
    return torch.where((slots >= 0)[:, None, None, None], y.transpose(1, 2), 0.0).to(dtype)


def ssd_fold(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
) -> None:
    """Write each row's history into its state, due or not; the caller then sets folded = lengths.

    Arguments as `ssd_verify`. ValueError if G does not divide H.
    """
    check_groups(state.shape[1], ring_x.shape[2])
    _, target, writes = writing_rows(slots)
    start = folded[target].long()
    history = lengths[target].long() - start
    x, B, dt = _columns(ring_x, ring_B, ring_dt, target, start, history)
    before = state[target]
    after = _fold(before, x, B, dt, dt * A.float()[:, None], history)
    write = (writes & (history > 0))[:, None, None, None]
    state.index_copy_(0, target, torch.where(write, after, before))


def _columns(
    ring_x: Tensor, ring_B: Tensor, ring_dt: Tensor, target: Tensor, start: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, G, L, P), B (B, G, L, N) and dt (B, H, L) in float32 from position `start`; zeros from column `live` on."""
    column = torch.arange(ring_x.shape[1], device=start.device)
    place = (start[:, None] + column) % ring_x.shape[1]  # (B, L)
    mask = column < live[:, None]
    x, B = (
        torch.where(mask[..., None, None], ring[target[:, None], place], 0.0).float().transpose(1, 2)
        for ring in (ring_x, ring_B)
    )
    dt = ring_dt[target[:, None], :, place].transpose(1, 2)
    return x, B, torch.where(mask[:, None], dt, 0.0)


def _after(steps: Tensor) -> Tensor:
    """Σ_{r>j} steps_r along the last dimension: sums of numbers ≤ 0, where differences of a cumulative sum cancel."""
    return torch.nn.functional.pad(steps[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def _fold(before: Tensor, x: Tensor, B: Tensor, dt: Tensor, log_decay: Tensor, history: Tensor) -> Tensor:
    """The state (B, H, P, N) after the first `history` columns, in the state's type."""
    batch, heads, headdim, d_state = before.shape
    groups, ring = x.shape[1:3]
    mask = (torch.arange(ring, device=x.device) < history[:, None])[:, None]  # (B, 1, L)
    steps = torch.where(mask, log_decay, 0.0)
    weights = torch.where(mask, torch.exp(_after(steps)) * dt, 0.0).view(batch, groups, heads // groups, 1, ring)
    added = (x.transpose(-1, -2)[:, :, None] * weights) @ B[:, :, None]  # (B, G, R, P, N)
    after = before.float() * torch.exp(steps.sum(-1))[..., None, None]
    return (after + added.view(batch, heads, headdim, d_state)).to(before.dtype)
