from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, silu

from kernels_ext.causal_conv.reference import causal_conv

BATCH, CHANNELS = 2, 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torch_conv(x, weight, bias, state=None):
    """(B, L, C) by PyTorch's own depthwise convolution over the inputs with the state, or zeros, before them."""
    width = weight.shape[1]
    before = x.new_zeros(len(x), width - 1, x.shape[-1]) if state is None else state
    history = torch.cat([before, x], dim=1).transpose(1, 2)
    return conv1d(history, weight[:, None], bias, groups=x.shape[-1]).transpose(1, 2)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_is_a_depthwise_convolution(length, width):
    x, weight, bias = draw(BATCH, length, CHANNELS), draw(CHANNELS, width, seed=1), draw(CHANNELS, seed=2)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    weights = draw(BATCH, length, CHANNELS, seed=3)
    ours, theirs = causal_conv(x, weight, bias), torch_conv(x, weight, bias)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((theirs * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_silu_and_no_bias():
    x, weight = draw(BATCH, 9, CHANNELS), draw(CHANNELS, 4, seed=1)
    torch.testing.assert_close(causal_conv(x, weight, silu=True), silu(torch_conv(x, weight, None)))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_state_is_what_came_before(length):
    x, weight, bias = draw(BATCH, length, CHANNELS), draw(CHANNELS, 4, seed=1), draw(CHANNELS, seed=2)
    state = draw(BATCH, 3, CHANNELS, seed=3)
    torch.testing.assert_close(causal_conv(x, weight, bias, None, state), torch_conv(x, weight, bias, state))
    one_document = torch.full((BATCH, length), 5, dtype=torch.int32)
    torch.testing.assert_close(causal_conv(x, weight, bias, one_document, state), torch_conv(x, weight, bias, state))


@pytest.mark.parametrize("boundaries", [(5,), (1,), (1, 2, 3), (8,), (2, 4, 7)])
def test_documents_do_not_leak(boundaries):
    length = 9
    x, weight, bias = draw(1, length, CHANNELS), draw(CHANNELS, 4, seed=1), draw(CHANNELS, seed=2)
    state = draw(1, 3, CHANNELS, seed=3)
    seq_idx = torch.zeros(1, length, dtype=torch.int32)
    for boundary in boundaries:
        seq_idx[:, boundary:] += 1
    edges = [0, *boundaries, length]
    alone = [
        torch_conv(x[:, a:b], weight, bias, state if a == 0 else None)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    torch.testing.assert_close(causal_conv(x, weight, bias, seq_idx, state), torch.cat(alone, dim=1))


def test_keeps_the_type_of_its_input():
    x, weight = draw(1, 5, CHANNELS).bfloat16(), draw(CHANNELS, 4, seed=1).float()
    assert causal_conv(x, weight, torch.zeros(CHANNELS)).dtype == torch.bfloat16
