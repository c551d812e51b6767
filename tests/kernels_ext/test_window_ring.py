"""One round's window and gates against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch

from kernels_ext.window import ring_reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.window.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
BOTH = pytest.mark.parametrize(
    "operator", [ring_reference.window_gate, kernel.window_gate], ids=["reference", "kernel"]
)
NAN = float("nan")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rings(keys, values, slots, starts, tokens, window, length):
    """Rings that hold what the tokens of each row's round see, and NaN elsewhere."""
    made = [
        torch.full((max(slots) + 2, length, *t.shape[2:]), NAN, device=DEVICE, dtype=t.dtype) for t in (values, keys)
    ]
    for row, slot in enumerate(slots):
        for p in range(max(0, starts[row] - window + 1), starts[row] + tokens) if slot >= 0 else ():
            for ring, source in zip(made, (values, keys), strict=True):
                ring[slot, p % length] = source[row, p]
    return made


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "window", "groups", "ratio", "headdim", "offset"),
    [(1, 4, 2, 1, 16, 0), (5, 16, 3, 1, 8, 0), (2, 5, 1, 3, 12, 3), (3, 1, 2, 2, 16, 1), (1, 33, 1, 2, 32, 0)],
)
def test_is_the_softmax_of_the_last_tokens_and_the_sink(
    operator, tokens, window, groups, ratio, headdim, offset, dtype, nan_filled
):
    """Slots permuted, a padding row, texts shorter than the window and beyond the ring's wrap; what no token sees is
    poisoned."""
    heads, length = groups * ratio, window + tokens + offset
    slots, lengths = [4, 0, -1, 2, 5, 1], [1, window - 1, 0, 47, 2, 0]  # slot 3 belongs to no row
    starts = [lengths[slot] + offset for slot in slots]
    keys, values = (draw(len(slots), 60, groups, headdim, seed=i, dtype=dtype) for i in (0, 1))
    ring_x, ring_B = rings(keys, values, slots, starts, tokens, window, length)
    y = draw(len(slots), tokens, heads, headdim, seed=2, dtype=dtype)
    C = draw(len(slots), tokens, 3 * heads * headdim, seed=3, dtype=dtype)[..., headdim : headdim + heads * headdim]
    C = C.unflatten(-1, (heads, headdim))
    z = draw(len(slots), tokens, 2 * heads * headdim + 7, seed=4, dtype=dtype)[..., 3:-4]
    y[slots.index(-1)] = NAN
    weight, sink = draw(2 * heads * headdim, seed=5), draw(2, groups, headdim, seed=6, dtype=dtype)
    made = operator(y, C, z, weight, sink, ring_x, ring_B, ints(*lengths), ints(*slots), window, offset)
    assert made.dtype == dtype and made.is_contiguous() and made.shape == (len(slots), tokens, 2 * heads * headdim)
    k_0, v_0 = sink.double()
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (made[row] == 0).all()
            continue
        attended = torch.empty(tokens, heads, headdim, dtype=torch.float64, device=DEVICE)
        for i in range(tokens):
            at = starts[row] + i
            seen = slice(max(0, at - window + 1), at + 1)
            for h in range(heads):
                k, v = (
                    torch.cat([s[None, h // ratio], t[row, seen, h // ratio].double()])
                    for s, t in ((k_0, keys), (v_0, values))
                )
                attended[i, h] = (k @ C[row, i, h].double() / headdim**0.5).softmax(0) @ v
        both = torch.cat([y[row].double().flatten(1), attended.flatten(1)], dim=1)
        wanted = both * torch.nn.functional.silu(z[row].double()) * weight.double()
        assert (made[row].double() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


@BOTH
def test_token_by_token_equals_one_round(operator):
    """A draft reads a round's tokens one by one at growing offsets; the verifier reads them at once."""
    keys, values = draw(2, 20, 1, 8, seed=0), draw(2, 20, 1, 8, seed=1)
    slots, lengths, window = [1, 0], [6, 3], 4
    ring_x, ring_B = rings(keys, values, slots, [3, 6], 4, window, 9)
    y, C, z = (draw(2, 4, *rest, seed=i) for i, rest in enumerate([(2, 8), (2, 8), (32,)], 2))
    weight, sink = draw(32, seed=5), draw(2, 1, 8, seed=6)
    rest = weight, sink, ring_x, ring_B, ints(*lengths), ints(*slots), window
    whole = operator(y, C, z, *rest)
    parts = [operator(*(t[:, i : i + 1].contiguous() for t in (y, C, z)), *rest, i) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("sign", [1, -1], ids=["sink wins", "token wins"])
def test_scores_beyond_the_range_of_exp(operator, sign):
    """Scores of ± 400 each way, whose exponentials overflow and vanish: all weight is on the sink or on the tokens,
    which have one value; a scan in float32 beside float16 caches, and a weight of their type."""
    heads, headdim, half = 2, 16, torch.float16
    C = torch.full((1, 1, heads, headdim), 10.0, device=DEVICE, dtype=half)
    keys = torch.full((1, 3, 1, headdim), -10.0 * sign, device=DEVICE, dtype=half)
    sink = torch.stack([-keys[0, 0], draw(1, headdim, seed=0, dtype=half)])
    values = draw(1, 1, 1, headdim, seed=1, dtype=half).expand(1, 3, -1, -1).contiguous()
    y, z = draw(1, 1, heads, headdim, seed=2), draw(1, 1, 2 * heads * headdim, seed=3, dtype=half)
    weight = draw(2 * heads * headdim, seed=4, dtype=half)
    made = operator(y, C, z, weight, sink, values, keys, ints(2), ints(0), 3)
    assert made.dtype == half
    chosen = (sink[1, 0] if sign > 0 else values[0, 0, 0]).double().repeat(heads)
    wanted = torch.cat([y.double().flatten(), chosen]) * torch.nn.functional.silu(z.double()[0, 0]) * weight.double()
    assert (made[0, 0].double() - wanted).norm() / wanted.norm() < 1e-3
