"""The ring convolution against the plain convolution over each sequence's whole text, round after round."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, silu, softplus

from kernels_ext.causal_conv.ring_reference import conv_ring_update as reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.causal_conv.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
BOTH = pytest.mark.parametrize("update", [reference, kernel.conv_ring_update], ids=["reference", "kernel"])
NAN = float("nan")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius; NaN anywhere fails every comparison."""
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def whole_text(x, weight, bias, use_silu):
    """(T, C) in float64, by PyTorch's depthwise convolution from the text's first token."""
    padded = torch.nn.functional.pad(x.double().T, (weight.shape[1] - 1, 0))
    y = conv1d(padded[None], weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[1])[0].T
    return silu(y) if use_silu else y


def poisoned_ring(text, lengths, slots, ring_length, width):
    """Only the width − 1 inputs before each row's window are there."""
    ring = torch.full((max(slots) + 2, ring_length, text.shape[2]), NAN, device=DEVICE, dtype=text.dtype)
    for row, slot in enumerate(slots):
        if slot >= 0:
            for p in range(max(0, lengths[slot] - width + 1), lengths[slot]):
                ring[slot, p % ring_length] = text[row, p]
    return ring


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "width", "channels", "use_silu", "use_bias"),
    [
        (1, 4, 37, True, True),
        (2, 4, 300, True, False),
        (5, 4, 37, False, True),
        (5, 2, 7, True, True),
        (3, 1, 7, False, True),
    ],
)
def test_is_the_convolution_of_the_whole_text(update, tokens, width, channels, use_silu, use_bias, dtype, nan_filled):
    """Rows at lengths 0 … 3 and beyond the ring's wrap, slots permuted, a padding row, x a slice of wider rows."""
    slots, lengths = [4, 0, -1, 2, 5, 1], [1, 3, 0, 7, 2, 23]  # slot 3 belongs to no row
    offset = 1 if tokens == 2 else 0
    ring_length = width - 1 + tokens + 1 + offset
    text = draw(len(slots), 32, channels, seed=0, dtype=dtype)
    weight, bias = draw(channels, width, seed=1, dtype=dtype), draw(channels, seed=2, dtype=dtype)
    starts = [lengths[slot] + offset for slot in slots]
    ring = poisoned_ring(text, [n + offset for n in lengths], slots, ring_length, width)
    before = ring.clone()
    wide = torch.full((len(slots), tokens, channels + 5), NAN, device=DEVICE, dtype=dtype)
    x = wide[..., 3 : 3 + channels]
    for row, start in enumerate(starts):
        x[row] = text[row, start : start + tokens]
    bias = bias if use_bias else None
    y, dt_out = update(x, ring, weight, bias, ints(*lengths), ints(*slots), use_silu, offset)
    assert dt_out is None and y.dtype == dtype and y.is_contiguous() and y.shape == x.shape
    for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        if slot < 0:
            assert (y[row] == 0).all()
            continue
        wanted = whole_text(text[row], weight, bias, use_silu)[start : start + tokens]
        assert distance(y[row], wanted) < TOLERANCE[dtype]
        for p in range(start, start + tokens):
            before[slot, p % ring_length] = text[row, p]
    assert torch.equal(ring.view(torch.uint8), before.view(torch.uint8))  # bitwise, NaN included


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "groups", "ratio", "headdim", "offset", "has_ring", "block"),
    [
        (1, 3, 3, 16, 0, False, None),
        (2, 4, 1, 8, 3, True, None),
        (5, 5, 4, 32, 0, True, {"BLOCK_C": 16}),  # a head's halves in two programs
        (3, 1, 2, 12, 1, True, {"BLOCK_C": 32}),  # and in parts of them
    ],
)
def test_turns_b_and_c_by_position(update, tokens, groups, ratio, headdim, offset, has_ring, block, dtype, nan_filled):
    """Against the same without rotation and complex numbers in float64: slots permuted, a padding row, rings that wrap;
    x and what is kept of the inputs are the same bit for bit, and the ring holds the turned B."""
    slots, lengths, history, heads = [4, 0, -1, 2, 5], [1, 3, 9, 7, 0, 30], 11, 4
    d_xb = groups * headdim
    channels = (2 + ratio) * d_xb
    theta = 100.0 ** -torch.linspace(0, 1, headdim // 2, device=DEVICE, dtype=torch.float64)
    angles = torch.arange(40, device=DEVICE)[:, None] * theta
    rope = angles.cos().float(), angles.sin().float()
    x, weight, bias = (
        draw(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(len(slots), tokens, channels), (channels, 4), (channels,)])
    )
    raw = draw(len(slots), tokens, heads, seed=5, dtype=dtype)
    options = {} if update is reference or block is None else {"config": block}
    made = []
    for turn in ((), (rope, d_xb)):
        ring = draw(6, 3 + tokens + offset, channels, seed=4, dtype=dtype)
        rings = [
            torch.full((6, history, groups, headdim), NAN, device=DEVICE, dtype=dtype),
            torch.full((6, history, groups, headdim), NAN, device=DEVICE, dtype=dtype),
            torch.full((6, heads, history), NAN, device=DEVICE),
        ]
        given = (raw, None, *rings) if has_ring else (None,) * 5
        y, _ = update(x, ring, weight, bias, ints(*lengths), ints(*slots), True, offset, *given, *turn, **options)
        made.append((y, ring, *rings))
    (plain, plain_ring, plain_x, _, _), (y, ring, ring_x, ring_B, _) = made
    assert y.dtype == dtype
    assert torch.equal(ring, plain_ring)
    assert torch.equal(ring_x.view(torch.uint8), plain_x.view(torch.uint8))
    untouched = torch.ones(6, history, dtype=torch.bool)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (y[row] == 0).all()
            continue
        for i in range(tokens):
            position = lengths[slot] + offset + i
            ours, given = y[row, i].view(-1, headdim), plain[row, i].view(-1, headdim)
            assert torch.equal(ours[:groups], given[:groups])
            pairs = torch.complex(*given[groups:].double().chunk(2, dim=-1)) * torch.exp(1j * position * theta)
            assert distance(ours[groups:], torch.cat([pairs.real, pairs.imag], dim=-1)) < TOLERANCE[dtype]
            if has_ring:
                assert torch.equal(ring_B[slot, position % history], ours[groups : 2 * groups])
                untouched[slot, position % history] = False
    assert ring_B[untouched].isnan().all()


@BOTH
@pytest.mark.parametrize("tokens", [1, 5])
def test_rings_of_the_mamba_layer(update, tokens, nan_filled):
    """The convolved x and B and the new dt lie where the verify kernel looks for them; all else is untouched."""
    groups, headdim, d_state, heads, ring_length, history = 3, 4, 5, 6, 8, 11
    channels = groups * (headdim + d_state) + heads * d_state
    slots, lengths = [2, -1, 0, 3], [9, 5, 40, 2]
    live = [0, 2, 3]
    ring = draw(5, ring_length, channels, seed=0)
    ring_x = torch.full((5, history, groups, headdim), NAN, device=DEVICE)
    ring_B = torch.full((5, history, groups, d_state), NAN, device=DEVICE)
    ring_dt = torch.full((5, heads, history), NAN, device=DEVICE)
    x, weight, bias = draw(4, tokens, channels, seed=1), draw(channels, 4, seed=2), draw(channels, seed=3)
    raw = draw(4, tokens, 3 * heads, seed=4)[..., heads : 2 * heads] * 8  # a view; some below −7, some above 20
    raw[0, 0, :3] = torch.tensor([-18.0, 30.0, -9.0], device=DEVICE)
    dt_bias = draw(heads, seed=5)
    arguments = (raw, dt_bias, ring_x, ring_B, ring_dt)
    y, dt_out = update(x, ring, weight, bias, ints(*lengths), ints(*slots), True, 0, *arguments)
    assert dt_out.dtype == torch.float32 and (y[1] == 0).all() and (dt_out[1] == 0).all()
    wanted = softplus(raw.double() + dt_bias.double(), threshold=200)[live]
    assert ((dt_out[live] - wanted).abs() / wanted).max() < 2e-6  # relative, each: a small dt keeps its digits
    x_part, B_part, _ = y.split([groups * headdim, groups * d_state, heads * d_state], dim=-1)
    untouched = [torch.ones(t.shape[:2], dtype=torch.bool) for t in (ring_x, ring_B, ring_dt.mT)]
    for row, slot in enumerate(slots):
        for i in range(tokens if slot >= 0 else 0):
            at = (lengths[slot] + i) % history
            assert torch.equal(ring_x[slot, at].flatten(), x_part[row, i])
            assert torch.equal(ring_B[slot, at].flatten(), B_part[row, i])
            assert torch.equal(ring_dt[slot, :, at], dt_out[row, i])
            for mask in untouched:
                mask[slot, at] = False
    for mask, tensor in zip(untouched, (ring_x, ring_B, ring_dt.mT), strict=True):
        assert tensor[mask].isnan().all()


@BOTH
def test_rounds_with_roll_back(update):
    """Windows of which only some tokens are kept, a draft's calls one by one in between, through several wraps."""
    channels, width, window, generator = 9, 4, 4, torch.Generator().manual_seed(0)
    text = draw(2, 60, channels, seed=0)
    weight, bias = draw(channels, width, seed=1), draw(channels, seed=2)
    ring = torch.full((3, width - 1 + window, channels), NAN, device=DEVICE)
    wanted = torch.stack([whole_text(t, weight, bias, True) for t in text])
    lengths, slots = ints(0, 0, 0), [2, 0]
    for round_ in range(12):
        starts = [int(lengths[slot]) for slot in slots]
        x = draw(2, window, channels, seed=10 + round_)  # the rejected tail is something else than the text
        keep = torch.randint(1, window + 1, (2,), generator=generator).tolist()
        for row in range(2):
            x[row, : keep[row]] = text[row, starts[row] : starts[row] + keep[row]]
        calls = [(x[:, i : i + 1], i) for i in range(window)] if round_ % 2 else [(x, 0)]
        y = torch.cat(
            [update(part, ring, weight, bias, lengths, ints(*slots), True, offset)[0] for part, offset in calls], dim=1
        )
        for row, slot in enumerate(slots):
            kept = slice(starts[row], starts[row] + keep[row])
            assert distance(y[row, : keep[row]], wanted[row, kept]) < 2e-6
            lengths[slot] += keep[row]


@BOTH
def test_only_padding(update):
    ring = draw(2, 6, 5, seed=0)
    before = ring.clone()
    x = draw(3, 2, 5, seed=1)
    y, dt = update(x, ring, draw(5, 4, seed=2), draw(5, seed=3), ints(7, 0), ints(-1, -1, -1), True, 0, x, None)
    assert (y == 0).all() and (dt == 0).all() and torch.equal(ring, before)
