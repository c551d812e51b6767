"""State-space duality scan of Mamba-2 (2405.21060 §6) with inputs shared by groups of heads.

For head h of group g = h // R, with a_t = dt_t·A ≤ 0:

    S_t = exp(a_t)·S_{t−1} + dt_t · x_t ⊗ B_t        (P, N)
    y_t = S_t · C_t + D·x_t                          (P,)

x and B belong to the group and C, dt, A, D to the head, as k, v and q do in grouped-query attention; nothing is
repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_SIZE = 64


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence written token by token in float64: the definition that the fast forms are tested against.

    Arguments and results as `ssd_chunked`, in float64.
    """
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, length, groups, headdim = x.shape
    heads, d_state = C.shape[2:]
    x, B = (t.repeat_interleave(heads // groups, dim=2) for t in (x, B))
    state = x.new_zeros(batch, heads, headdim, d_state) if initial_state is None else initial_state.double()
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = state * same[:, None, None, None]
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + update
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.double()[:, None] * x
    return y, state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The same by chunks: quadratic inside a chunk, a recurrence over the chunks' states (2405.21060 §6, Listing 1).

    x (B, L, G, P); dt (B, L, H) after softplus, 0 leaves the state as it is; A (H,) negative; B (B, L, G, N);
    C (B, L, H, N); D (H,) or None. seq_idx (B, L): document number of each token, non-decreasing; the state starts from
    zero at each change, and `initial_state` (B, H, P, N) belongs to the first token's document.
    Products run in x's type, decays and states in float32. Returns y (B, L, H, P) in x's type, final state (B, H, P,
    N) float32.
    """
    batch, length, groups, headdim = x.shape
    heads, d_state = C.shape[2:]
    ratio = heads // groups
    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.int32, device=x.device)
    first_document = seq_idx[:, :1]
    skip = None if D is None else D[:, None] * x.repeat_interleave(ratio, dim=2)
    if padding:  # dt = 0: padded tokens neither decay nor write
        x, B, C = (pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
        dt = pad(dt, (0, 0, 0, padding))
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1)
    chunks = x.shape[1] // chunk_size

    x = x.view(batch, chunks, chunk_size, groups, headdim).transpose(2, 3)  # (B, c, G, Q, P)
    B = B.view(batch, chunks, chunk_size, groups, d_state).transpose(2, 3)  # (B, c, G, Q, N)
    C = C.view(batch, chunks, chunk_size, groups, ratio, d_state).permute(0, 1, 3, 4, 2, 5)  # (B, c, G, R, Q, N)
    dt = dt.float().view(batch, chunks, chunk_size, groups, ratio).permute(0, 1, 3, 4, 2)  # (B, c, G, R, Q)
    document = seq_idx.view(batch, chunks, 1, 1, chunk_size)
    last_document = document[..., -1:]  # (B, c, 1, 1, 1)
    previous_document = torch.cat([first_document[:, None, None, None], last_document[:, :-1]], dim=1)

    log_decay = torch.cumsum(dt * A.float().view(groups, ratio, 1), dim=-1)  # (B, c, G, R, Q), from the chunk's start

    # Inside the chunk: attention without softmax, weighted by the decay from s to t.
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    visible = causal & (document[..., :, None] == document[..., None, :])  # (B, c, 1, 1, Q, Q)
    span = log_decay[..., :, None] - log_decay[..., None, :]
    weights = torch.exp(span.masked_fill(~visible, float("-inf"))) * dt[..., None, :]  # (B, c, G, R, Q, Q)
    scores = (C.reshape(batch, chunks, groups, ratio * chunk_size, d_state) @ B.transpose(-1, -2)).view_as(weights)
    mixed = (scores * weights).to(x.dtype).view(batch, chunks, groups, ratio * chunk_size, chunk_size)
    y = (mixed @ x).view(batch, chunks, groups, ratio, chunk_size, headdim)

    # What each chunk adds to the state by its end.
    to_end = torch.exp(log_decay[..., -1:] - log_decay) * dt * (document == last_document)  # (B, c, G, R, Q)
    added = torch.einsum("bcgrq,bcgqp,bcgqn->bcgrpn", to_end, x.float(), B.float())

    # From chunk to chunk.
    carry = torch.exp(log_decay[..., -1]) * (last_document == previous_document)[..., 0]  # (B, c, G, R)
    state = added.new_zeros(batch, groups, ratio, headdim, d_state)
    if initial_state is not None:
        state = initial_state.float().view_as(state)
    before = []
    for c in range(chunks):
        before.append(state)
        state = state * carry[:, c, ..., None, None] + added[:, c]

    # What the state before the chunk gives to its tokens.
    from_start = torch.exp(log_decay) * (document == previous_document)  # (B, c, G, R, Q)
    entering = torch.stack(before, dim=1).to(x.dtype)  # (B, c, G, R, P, N)
    y = y + (C @ entering.transpose(-1, -2)) * from_start[..., None].to(x.dtype)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * chunk_size, heads, headdim)[:, :length]
    if skip is not None:
        y = y + skip.to(y.dtype)
    return y, state.view(batch, heads, headdim, d_state)
