"""`reference.window_attention` with its gradient written down, as one operator that a compiler does not look into: what
torch.compile makes of the reference, Triton 3.6 cannot compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class _Pieces:
    """q, k and v by pieces of `window` tokens, and their scores; see `reference.window_attention`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seq_idx: Tensor, window: int) -> None:
        self.window, self.length, self.groups = window, q.shape[1], k.shape[2]
        self.missing = -self.length % window
        self.ratio, self.scale = q.shape[2] // self.groups, q.shape[3] ** -0.5
        self.q, self.k, self.v = self.of_queries(q), self.with_previous(k), self.with_previous(v)
        self.k_0, self.v_0 = (t[:, None].float() for t in sink)  # (G, 1, P)
        ids = pad(seq_idx.int(), (window, self.missing), value=-1).unflatten(1, (-1, window))
        ids_k = torch.cat([ids[:, :-1], ids[:, 1:]], dim=2)
        place = torch.arange(window, device=q.device)
        lag = place[:, None] + window - torch.arange(2 * window, device=q.device)
        hidden = (lag < 0) | (lag >= window) | (ids[:, 1:, :, None] != ids_k[:, :, None])
        scores = (self.q @ self.k.mT).float().mul_(self.scale)
        scores.unflatten(3, (self.ratio, window)).masked_fill_(hidden[:, :, None, None], -torch.inf)
        first = (self.q.float() * self.k_0).sum(-1, keepdim=True) * self.scale
        highest = torch.maximum(scores.amax(-1, keepdim=True), first)
        shares, first = scores.sub_(highest).exp_(), (first - highest).exp_()
        total = shares.sum(-1, keepdim=True) + first
        self.shares, self.first = shares.div_(total), first / total
        """Softmax over the keys and over the sink, (B, pieces, G, R · window, 2 · window) and (…, 1), float32."""

    def of_queries(self, t: Tensor) -> Tensor:
        """(B, L, H, P) → (B, pieces, G, R · window, P)."""
        t = pad(t, (0, 0, 0, 0, 0, self.missing)).unflatten(2, (self.groups, -1)).unflatten(1, (-1, self.window))
        return t.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def to_queries(self, t: Tensor) -> Tensor:
        """The inverse of `of_queries`."""
        t = t.unflatten(3, (self.ratio, self.window)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return t[:, : self.length].flatten(2, 3)

    def with_previous(self, t: Tensor) -> Tensor:
        """(B, L, G, P) → (B, pieces, G, 2 · window, P): a piece after the one before it, which is zeros at first."""
        t = pad(t, (0, 0, 0, 0, self.window, self.missing)).unflatten(1, (-1, self.window)).transpose(2, 3)
        return torch.cat([t[:, :-1], t[:, 1:]], dim=3)

    def to_keys(self, t: Tensor) -> Tensor:
        """The gradient of what `with_previous` was given, from that of what it gave."""
        previous, own = t.split(self.window, dim=3)
        own = own + pad(previous[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        return own.transpose(2, 3).flatten(1, 2)[:, : self.length]


@torch.library.custom_op("mamballama::window_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seq_idx: Tensor, window: int) -> Tensor:
    made = _Pieces(q, k, v, sink, seq_idx, window)
    out = (made.shares.to(v.dtype) @ made.v).float() + made.first * made.v_0
    return made.to_queries(out).to(v.dtype).contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seq_idx: Tensor, window: int) -> Tensor:
    return v.new_empty(q.shape)


@torch.library.custom_op("mamballama::window_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seq_idx: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _Pieces(q, k, v, sink, seq_idx, window)
    given = made.of_queries(dout.to(v.dtype))
    of_first = (given.float() * made.v_0).sum(-1, keepdim=True)
    of_shares = (given @ made.v.mT).float()
    mean = (made.shares * of_shares).sum(-1, keepdim=True) + made.first * of_first
    dscores = ((of_shares - mean).mul_(made.shares).mul_(made.scale)).to(q.dtype)
    dfirst = (of_first - mean) * made.first * made.scale
    dq = (dscores @ made.k).float() + dfirst * made.k_0
    dk, dv = dscores.mT @ made.q, made.shares.to(v.dtype).mT @ given
    dsink = [(t * x.float()).sum((0, 1, 3)) for t, x in ((dfirst, made.q), (made.first, given))]
    return (
        made.to_queries(dq).to(q.dtype).contiguous(),
        made.to_keys(dk).to(k.dtype).contiguous(),
        made.to_keys(dv).to(v.dtype).contiguous(),
        torch.stack(dsink).to(sink.dtype),
    )


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seq_idx: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(sink)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, ctx.window), None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: int, seq_idx: Tensor | None = None
) -> Tensor:
    """See `reference.window_attention`; products run in the inputs' type."""
    if seq_idx is None:
        seq_idx = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return _forward(q, k, v, sink, seq_idx, window)
