"""Softmax attention over a token's last few tokens and one learned sink, for whole texts: differentiable, linear in the
length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: int,
    seq_idx: Tensor | None = None,
    before: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """a_t = (e^{s_0} v_0 + Σ_j e^{s_j} v_j) / (e^{s_0} + Σ_j e^{s_j}) over the last `window` tokens j of t's document,
    t among them; s_j = q_t·k_j / √P, s_0 = q_t·k_0 / √P.

    The sink (k_0, v_0) stands for the first tokens of a text, which take most of many heads' attention and give next to
    nothing (2309.17453); it is learned, and every token sees it.

    q (B, L, H, P); k, v (B, L, G, P), H a multiple of G; sink (2, G, P); seq_idx (B, L) or None: one document a row.
    before: k and v (B, window, G, P) of the tokens before a row's first, and which of them there are, (B, window) bool;
    None: there are none. Returns (B, L, H, P) in v's type; scores and sums are float32.

    Queries are cut into pieces of `window` tokens, each of which needs the keys of its own piece and the one before.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    missing = -length % window
    ids = q.new_zeros(batch, length, dtype=torch.int32) if seq_idx is None else seq_idx.int()
    if before is None:
        k_before, v_before = k.new_zeros(batch, window, groups, width), v.new_zeros(batch, window, groups, width)
        ids_before = ids.new_full((batch, window), -1)
    else:
        k_before, v_before, present = before
        ids_before = torch.where(present, ids[:, :1], -1)

    def pieces(t: Tensor) -> Tensor:
        """(B, …, G, ·) → (B, pieces, G, window, ·)."""
        return t.unflatten(1, (-1, window)).transpose(2, 3)

    def both(t: Tensor, previous: Tensor) -> Tensor:
        """Keys or values of a piece and the one before, (B, pieces, G, 2 · window, P)."""
        whole = pieces(torch.cat([previous.to(t.dtype), pad(t, (0, 0, 0, 0, 0, missing))], dim=1))
        return torch.cat([whole[:, :-1], whole[:, 1:]], dim=3)

    q = pad(q, (0, 0, 0, 0, 0, missing)).unflatten(2, (groups, -1))  # (B, L', G, R, P)
    ratio = q.shape[3]
    q = q.unflatten(1, (-1, window)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # (B, pieces, G, R · window, P)
    ids_q = pad(ids, (0, missing), value=-2).unflatten(1, (-1, window))
    ids_k = torch.cat([ids_before, pad(ids, (0, missing), value=-2)], dim=1).unflatten(1, (-1, window))
    ids_k = torch.cat([ids_k[:, :-1], ids_k[:, 1:]], dim=2)
    place = torch.arange(window, device=q.device)
    lag = place[:, None] + window - torch.arange(2 * window, device=q.device)
    visible = (lag >= 0) & (lag < window) & (ids_q[..., None] == ids_k[..., None, :])  # (B, pieces, window, 2 · window)
    visible = visible[:, :, None, None].expand(-1, -1, -1, ratio, -1, -1).flatten(3, 4)

    scale = width**-0.5
    keys, values = both(k, k_before), both(v, v_before)
    scores = (q @ keys.mT.to(q.dtype)).float() * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    k_0, v_0 = (t[:, None].float() for t in sink)  # (G, 1, P)
    sink_score = (q.float() * k_0).sum(-1, keepdim=True) * scale
    highest = torch.maximum(scores.amax(-1, keepdim=True), sink_score).detach()
    weights, sink_weight = (scores - highest).exp(), (sink_score - highest).exp()
    total = weights.sum(-1, keepdim=True) + sink_weight
    out = ((weights.to(v.dtype) @ values).float() + sink_weight * v_0) / total
    out = out.unflatten(3, (ratio, window)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)  # (B, L', G, R, P)
    return out[:, :length].flatten(2, 3).to(v.dtype)
