"""Attention over the last tokens and a sink against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch

from kernels_ext.window import operator
from kernels_ext.window.reference import window_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def expected(q, k, v, sink, window, ids):
    """Token by token, head by head; k, v and ids may begin before q's first token."""
    q, k, v, sink = (t.double() for t in (q, k, v, sink))
    batch, length, heads, width = q.shape
    ratio, early = heads // k.shape[2], k.shape[1] - length
    out = torch.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            at = t + early
            seen = [j for j in range(max(0, at - window + 1), at + 1) if ids[b][j] == ids[b][at]]
            for h in range(heads):
                g = h // ratio
                keys, values = torch.stack([sink[0, g], *k[b, seen, g]]), torch.stack([sink[1, g], *v[b, seen, g]])
                out[b, t, h] = (keys @ q[b, t, h] / width**0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("length", "window", "groups", "ratio"), [(1, 4, 2, 1), (8, 4, 3, 1), (13, 5, 2, 3), (9, 16, 1, 2), (7, 1, 2, 1)]
)
def test_is_the_softmax_of_what_a_token_sees(length, window, groups, ratio, dtype, tolerance):
    """Two rows, of which one is packed: documents do not see each other, and all see the sink."""
    q = draw(2, length, groups * ratio, 8, seed=0, dtype=dtype)
    k, v, sink = (
        draw(*shape, 8, seed=i, dtype=dtype) for i, shape in enumerate([(2, length, groups)] * 2 + [(2, groups)])
    )
    ids = [[0] * length, [int(t >= 3) + int(t >= 6) for t in range(length)]]
    out = window_attention(q, k, v, sink, window, torch.tensor(ids, device=DEVICE))
    assert out.dtype == dtype and out.shape == q.shape
    wanted = expected(q, k, v, sink, window, ids)
    assert (out.double() - wanted).norm() / wanted.norm() < tolerance
    whole = window_attention(q[:1], k[:1], v[:1], sink, window)
    torch.testing.assert_close(whole, out[:1])


@pytest.mark.parametrize(("cut", "window"), [(3, 4), (9, 4), (1, 8)])
def test_goes_on_after_tokens_that_were_read_before(cut, window):
    q, k, v = (draw(2, 14, 2, 8, seed=i) for i in range(3))
    sink = draw(2, 2, 8, seed=3)
    whole = window_attention(q, k, v, sink, window)
    places = torch.arange(cut - window, cut, device=DEVICE)
    past = [
        torch.where((places >= 0)[None, :, None, None], t[:, places.clamp(min=0)], float("nan")).nan_to_num(7.0)
        for t in (k, v)
    ]
    part = window_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], sink, window, before=(*past, (places >= 0).expand(2, -1))
    )
    torch.testing.assert_close(part, whole[:, cut:], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_loop():
    inputs = [draw(1, 7, 2, 4, seed=0, dtype=torch.float64)] + [
        draw(1, 7, 1, 4, seed=i, dtype=torch.float64) for i in (1, 2)
    ]
    inputs.append(draw(2, 1, 4, seed=3, dtype=torch.float64))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=DEVICE)
    for t in inputs:
        t.requires_grad_()
    dy = draw(1, 7, 2, 4, seed=5, dtype=torch.float64)
    found = torch.autograd.grad(window_attention(*inputs, 3, ids), inputs, dy)
    batched = [t.detach().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(differentiable(*batched, 3, ids), batched, dy)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("length", "window", "groups", "ratio"), [(13, 5, 2, 3), (8, 4, 3, 1), (3, 16, 1, 2)])
def test_the_operator_is_the_reference_with_its_gradients(length, window, groups, ratio, dtype, tolerance):
    shapes = [(2, length, groups * ratio, 8), (2, length, groups, 8), (2, length, groups, 8), (2, groups, 8)]
    inputs = [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    ids = torch.tensor([[0] * length, [int(t >= 3) + int(t >= 6) for t in range(length)]], device=DEVICE)
    dy = draw(*shapes[0], seed=5, dtype=dtype)
    made = [f(*inputs, window, ids) for f in (window_attention, operator.window_attention)]
    wanted, found = ([y, *torch.autograd.grad(y, inputs, dy)] for y in made)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < tolerance
    alone = operator.window_attention(*(t[:1] if t.dim() == 4 else t for t in inputs), window)
    torch.testing.assert_close(alone, made[1][:1])


def test_the_operator_is_traced_as_one():
    inputs = [draw(1, 9, 2, 8, seed=i).requires_grad_() for i in range(3)] + [draw(2, 2, 8, seed=3).requires_grad_()]
    ids = torch.zeros(1, 9, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(operator._forward, (*inputs, ids, 4))
    compiled = torch.compile(lambda *t: 2 * operator.window_attention(*t, 4, ids), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), 2 * operator.window_attention(*inputs, 4, ids))


def differentiable(q, k, v, sink, window, ids):
    """All scores at once, masked."""
    ratio = q.shape[2] // k.shape[2]
    k, v = (
        torch.cat([s.expand(len(q), 1, -1, -1), t], 1).repeat_interleave(ratio, 2)
        for s, t in ((sink[0], k), (sink[1], v))
    )
    place = torch.arange(q.shape[1], device=q.device)
    lag = place[:, None] - place
    seen = (lag >= 0) & (lag < window) & (ids[:, :, None] == ids[:, None])
    seen = torch.nn.functional.pad(seen, (1, 0), value=True)[:, None]
    scores = torch.einsum("bthp,bshp->bhts", q, k) / q.shape[3] ** 0.5
    return torch.einsum("bhts,bshp->bthp", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
