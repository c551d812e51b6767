"""Selective scan of Mamba-1 (2312.00752 §3.2) with inputs shared by groups of heads (2408.15237 §2).

For channel d = (h, p), position p of head h in group g = h // R, and its piece j = p // N of the head:

    h_t[d, n] = exp(dt_t[d]·A[d, n])·h_{t−1}[d, n] + dt_t[d]·x_t[g, p]·B_t[g, j, n]
    y_t[d] = Σ_n C_t[h, j, n]·h_t[d, n] + D[d]·x_t[g, p]

x and B belong to the group and C to the head, as v, k and q do in grouped-query attention, and are cut into pieces of N
channels; nothing is repeated. (The paper's code repeats B and x by pieces of N instead of by heads, so that with
grouped queries most channels read another head's.) Shapes: J = P // N pieces of a head, D = H·P channels.

The decay depends on channel and n, so there is no matrix form as for Mamba-2: decoding replays the tokens since the
last stored state in order. dt = 0 is the identity step, which makes one program serve every number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from kernels_ext.slots import writing_rows

CHUNK_SIZE = 16
SEGMENT_NUMBERS = 2**26
"""Numbers of state (B·L·D·N) that the scan holds at a time; a longer text is cut into segments."""


def selective_scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence written token by token in float64, everything repeated for each channel: the definition that the
    other forms are tested against.

    Arguments and results as `selective_scan`, in float64.
    """
    x, dt, A, B, C, D = (t.double() for t in (x, dt, A, B, C, D))
    groups, headdim = x.shape[2:]
    heads, d_state = C.shape[2], C.shape[-1]
    x = x.repeat_interleave(heads // groups, dim=2).flatten(2)  # (B, L, D)
    B = B.repeat_interleave(heads // groups, dim=2).repeat_interleave(d_state, dim=3).flatten(2, 3)  # (B, L, D, N)
    C = C.repeat_interleave(d_state, dim=3).flatten(2, 3)  # (B, L, D, N)
    state = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.double()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        ys.append((C[:, t] * state).sum(-1) + D * x[:, t])
    return torch.stack(ys, dim=1).unflatten(-1, (heads, headdim)), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in float32, with gradients: chunks of a segment advance side by side and are then joined by their
    states.

    x (B, L, G, P); dt (B, L, D) after softplus, 0 leaves the state as it is; A (D, N) negative; B (B, L, G, J, N);
    C (B, L, H, J, N); D (D,). seq_idx (B, L): document number of each token, non-decreasing; the state starts from zero
    at each change, and `initial_state` (B, D, N) belongs to the first token's document.
    Returns y (B, L, H, P) in x's type, final state (B, D, N) float32. Backward keeps the states between segments and
    computes the others anew.
    """
    check_groups(x.shape[2], C.shape[2])
    batch, length = x.shape[:2]
    keep = dt.new_ones(batch, length)
    if seq_idx is not None:
        keep[:, 1:] = (seq_idx[:, 1:] == seq_idx[:, :-1]).to(keep.dtype)
    state = dt.new_zeros(batch, *A.shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    segment = CHUNK_SIZE * max(1, SEGMENT_NUMBERS // (batch * CHUNK_SIZE * A.numel()))
    ys = []
    for begin in range(0, length, segment):
        part = slice(begin, begin + segment)
        arguments = (state, x[:, part], dt[:, part], A, B[:, part], C[:, part], D, keep[:, part])
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_segment(*arguments)
        ys.append(y)
    return torch.cat(ys, dim=1), state


def _scan_segment(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """keep (B, L): 0 where a document starts, 1 elsewhere."""
    length = x.shape[1]
    decay, write = _decay_and_write(x, dt, A, B)  # (B, L, D, N)
    decay = decay * keep[..., None, None]
    padding = -length % CHUNK_SIZE
    if padding:  # the identity step
        decay = pad(decay, (0, 0, 0, 0, 0, padding), value=1.0)
        write = pad(write, (0, 0, 0, 0, 0, padding))
    decay, write = (t.unflatten(1, (-1, CHUNK_SIZE)) for t in (decay, write))  # (B, c, Q, D, N)

    # Inside each chunk: the states from zero, and what is left of the state before the chunk.
    states, left = [write[:, :, 0]], [decay[:, :, 0]]
    for q in range(1, CHUNK_SIZE):
        states.append(decay[:, :, q] * states[-1] + write[:, :, q])
        left.append(decay[:, :, q] * left[-1])

    # From chunk to chunk.
    before = []
    for c in range(decay.shape[1]):
        before.append(state)
        state = left[-1][:, c] * state + states[-1][:, c]

    joined = torch.stack(states, dim=2) + torch.stack(left, dim=2) * torch.stack(before, dim=1)[:, :, None]
    return _read(joined.flatten(1, 2)[:, :length], C, D, x).to(x.dtype), state


def _decay_and_write(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt·A) and dt·x ⊗ B, (…, D, N) float32, of x (…, G, P), dt (…, D), A (D, N), B (…, G, J, N)."""
    groups, (pieces, d_state) = x.shape[-2], B.shape[-2:]
    decay = torch.exp(dt.float()[..., None] * A.float())
    dt = dt.float().unflatten(-1, (groups, -1, pieces, d_state))  # (…, G, R, J, N channels of the piece)
    x = x.float().unflatten(-1, (1, pieces, d_state))  # (…, G, 1, J, N)
    write = (dt * x)[..., None] * B.float()[..., None, :, None, :]
    return decay, write.flatten(-5, -2)


def _read(state: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """y (…, H, P) float32 of state (…, D, N), C (…, H, J, N), D (D,), x (…, G, P)."""
    heads, pieces, d_state = C.shape[-3:]
    groups = x.shape[-2]
    y = (state.unflatten(-2, (heads, pieces, d_state)) * C.float()[..., None, :]).sum(-1).flatten(-2)  # (…, H, P)
    return y + D.float().view(heads, -1) * x.float().repeat_interleave(heads // groups, dim=-2)


def selective_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of each row, the state in place.

    state (S, D, N) float32 or bfloat16; x (B, G, P), B (B, G, J, N), C (B, H, J, N) in the activation type; dt (B, D)
    float32 after softplus, 0 leaves the state as it is; A (D, N) and D (D,) float32. slots (B,) int32: slot of each
    row, −1 touches nothing and gives zeros; None is slot b for row b. Returns y (B, H, P) in C's type.
    """
    check_groups(x.shape[1], C.shape[1])
    if slots is None:
        slots = torch.arange(len(x), device=x.device)
    slot, live = slots.long().clamp(min=0), slots >= 0
    decay, write = _decay_and_write(x, dt, A, B)
    new = decay * state[slot].float() + write
    _store(state, slots, new, live)
    return torch.where(live[:, None, None], _read(new, C, D, x), 0.0).to(C.dtype)


def selective_verify(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
    window: int,
    offset: int = 0,
) -> Tensor:
    """Outputs of the T tokens at positions lengths + offset + i, whose inputs are in the rings with all since `folded`.

    state (S, D, N) float32 or bfloat16; ring_x and ring_B (S, L, G, P) in the activation type, ring_dt (S, L, D)
    float32 after softplus, the token of position p in slot p % L; C (B, T, H, J, N); A (D, N) and D (D,) float32;
    lengths, folded (S,) and slots (B,) int32, −1 touches nothing and gives zeros.
    The state is written only if lengths − folded + 2·window > L and offset = 0: to what it is after the history
    (positions folded to lengths); calls of the same round with offset > 0 read it from there. What the window adds is
    never stored. Returns y (B, T, H, P) in C's type. Raises ValueError where the window does not fit the ring.
    """
    check_groups(ring_x.shape[2], C.shape[2])
    check_window(C.shape[1], window, offset, ring_x.shape[1])
    slot, live = slots.long().clamp(min=0), slots >= 0
    length, start = lengths[slot], folded[slot]
    due = length - start + 2 * window > ring_x.shape[1]
    if offset > 0:
        start = torch.where(due, length, start)
    rings = (ring_x, ring_B, ring_dt)
    current = state[slot].float()
    for decay, write, _ in _replayed(rings, A, slot, start, ring_x.shape[1] - window, length + offset):
        current = decay * current + write
    if offset == 0:
        _store(state, slots, current, due)
    ys = []
    first = length + offset
    for t, (decay, write, x) in enumerate(_replayed(rings, A, slot, first, C.shape[1], first + C.shape[1])):
        current = decay * current + write
        ys.append(_read(current, C[:, t], D, x))
    return torch.where(live[:, None, None, None], torch.stack(ys, dim=1), 0.0).to(C.dtype)


def selective_fold(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    lengths: Tensor,
    folded: Tensor,
    slots: Tensor,
) -> None:
    """Bring each row's state from `folded` to `lengths`, whether it is due or not; the caller then moves `folded`.

    Arguments as `selective_verify`.
    """
    slot = slots.long().clamp(min=0)
    length, start = lengths[slot], folded[slot]
    rings = (ring_x, ring_B, ring_dt)
    current = state[slot].float()
    for decay, write, _ in _replayed(rings, A, slot, start, ring_x.shape[1], length):
        current = decay * current + write
    _store(state, slots, current, start < length)


def selective_ring_append(
    x: Tensor,
    B: Tensor,
    dt: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    lengths: Tensor,
    slots: Tensor,
    offset: int = 0,
) -> None:
    """Write x (B, T, G, P), B (B, T, G, J, N) and dt (B, T, D), the tokens at positions lengths + offset + i, into the
    rings of `selective_verify`."""
    tokens, ring = x.shape[1], ring_x.shape[1]
    check_append(tokens, ring)
    source, slot, live = writing_rows(slots)
    position = lengths[slot].long()[:, None] + offset + torch.arange(tokens, device=x.device)  # (B, T)
    index = (slot[:, None], position % ring)
    for target, values in ((ring_x, x), (ring_B, B.flatten(3)), (ring_dt, dt)):
        is_live = live.view(-1, *[1] * (target.ndim - 1))
        target[index] = torch.where(is_live, values[source].to(target.dtype), target[index])


def _replayed(
    rings: tuple[Tensor, Tensor, Tensor], A: Tensor, slot: Tensor, start: Tensor, count: int, end: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Decay and write (B, D, N) and x (B, G, P) of positions start + i for i < count; the identity step, whatever the
    ring holds there, from `end` on."""
    position = start.long()[:, None] + torch.arange(count, device=slot.device)  # (B, count)
    is_live = position < end[:, None]

    def read(ring: Tensor) -> Tensor:
        tokens = ring[slot[:, None], position % ring.shape[1]]
        return torch.where(is_live.view(*is_live.shape, *[1] * (tokens.ndim - 2)), tokens, 0)

    x, B, dt = (read(ring) for ring in rings)
    decay, write = _decay_and_write(x, dt, A, B.unflatten(-1, (-1, A.shape[1])))
    return list(zip(decay.unbind(1), write.unbind(1), x.unbind(1), strict=True))


def _store(state: Tensor, slots: Tensor, values: Tensor, wanted: Tensor) -> None:
    """state[slots[b]] = values[b] for the live rows that are wanted."""
    source, slot, live = writing_rows(slots)
    is_wanted = (wanted[source] & live)[:, None, None]
    state[slot] = torch.where(is_wanted, values[source].to(state.dtype), state[slot])


def check_groups(groups: int, heads: int) -> None:
    if heads % groups:
        raise ValueError(f"n_heads {heads} is not a multiple of n_kv_heads {groups}")


def check_window(tokens: int, window: int, offset: int, ring: int) -> None:
    """T + offset ≤ window and 2·window ≤ L, or a ValueError that names both."""
    if tokens + offset > window:
        raise ValueError(f"{tokens} tokens at offset {offset} pass the window of {window}: raise the window (K + 1)")
    if ring < 2 * window:
        raise ValueError(f"a ring of {ring} slots cannot hold two windows of {window}: raise the ring or lower K")


def check_append(tokens: int, ring: int) -> None:
    if tokens > ring:
        raise ValueError(f"{tokens} tokens do not fit a ring of {ring} slots: raise the ring or lower K")
