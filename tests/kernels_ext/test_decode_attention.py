"""Attention over a static cache, and the rotation that fills it, against a float64 loop over rows and heads."""

from __future__ import annotations

import math

import pytest
import torch

from kernels_ext.attention import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.attention.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
BOTH = pytest.mark.parametrize("ops", [reference, kernel], ids=["reference", "kernel"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAN = float("nan")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius; NaN anywhere fails every comparison."""
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def strided_cache(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """(S, G, M, P), a view of a wider tensor."""
    slots, groups, positions, headdim = shape
    return draw(slots, positions + 3, groups, headdim, seed=seed, dtype=dtype).transpose(1, 2)[:, :, 1:-2]


def attend(q, k, v):
    """q (T, H, P), k and v (G, keys, P) of one row in float64; the last query sees all keys."""
    tokens, heads, headdim = q.shape
    ratio = heads // k.shape[0]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for i in range(tokens):
        seen = k.shape[1] - tokens + i + 1
        for h in range(heads):
            weights = torch.softmax(k[h // ratio, :seen] @ q[i, h] / math.sqrt(headdim), dim=0)
            out[i, h] = weights @ v[h // ratio, :seen]
    return out


@BOTH
@DTYPES
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    ("tokens", "groups", "ratio", "headdim", "offset"), [(1, 3, 3, 16, 0), (2, 4, 1, 8, 3), (5, 1, 4, 32, 0)]
)
def test_attention_is_the_formula(ops, tokens, groups, ratio, headdim, offset, splits, dtype, nan_filled):
    """Rows from one key to several blocks, fewer than there are splits among them; what is dead holds NaN."""
    slots, lengths, positions = [5, 0, -1, 3, 1, 2], [40, 23, 33 - tokens - offset, 0, 7, 95], 110
    heads = groups * ratio  # by 16 keys in three parts, the last query of slot 2 alone sees the third part's only key
    wide = draw(len(slots), tokens, heads + 2, headdim, seed=0, dtype=dtype)
    q = wide[:, :, 1:-1]
    k, v = (strided_cache(6, groups, positions, headdim, seed=s, dtype=dtype) for s in (1, 2))
    for slot, length in enumerate(lengths):
        seen = length + offset + tokens if slot in slots else 0
        k[slot, :, seen:], v[slot, :, seen:] = NAN, NAN
    config = {"config": {"BLOCK_K": 16, "num_warps": 2}} if ops is kernel and splits else {}
    out = ops.decode_attention(q, k, v, ints(lengths), ints(slots), offset, splits, **config)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (out[row] == 0).all()
        else:
            seen = lengths[slot] + offset + tokens
            wanted = attend(q[row].double(), k[slot, :, :seen].double(), v[slot, :, :seen].double())
            assert distance(out[row], wanted) < TOLERANCE[dtype]


def test_attention_refuses_too_many_query_rows():
    q, cache = torch.zeros(1, 33, 4, 16, device=DEVICE), torch.zeros(1, 1, 64, 16, device=DEVICE)
    with pytest.raises(ValueError, match="33 tokens × 4 heads per group are 132 query rows, more than 128"):
        kernel.decode_attention(q, cache, cache, ints([0]), ints([0]))


def test_default_splits_fill_the_gpu():
    assert kernel.default_splits(2048, 3, 1024) == 1
    assert kernel.default_splits(1, 8, 16384) == 33
    assert kernel.default_splits(1, 8, 4096) == 16
    assert kernel.default_splits(1, 3, 400) == 4
    assert kernel.default_splits(1, 8, 100) == 1  # none of them tiny
    assert kernel.default_splits(1, 1, 10**6) == kernel.MAX_SPLITS


def rotate(x, position, theta):
    """Pairs (x_j, x_{j + P/2}) as complex numbers, turned by position · theta_j; x (heads, P) in float64."""
    half = x.shape[-1] // 2
    angle = position * theta.double()
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag], dim=-1)


@BOTH
@DTYPES
@pytest.mark.parametrize(
    ("tokens", "groups", "ratio", "headdim", "offset"), [(1, 3, 3, 16, 0), (2, 4, 1, 8, 3), (5, 5, 4, 32, 0)]
)
def test_rope_append(ops, tokens, groups, ratio, headdim, offset, dtype, nan_filled):
    """Keys are turned and appended, values appended as they are; the rest of the caches stays, bit for bit."""
    slots, lengths, positions = [5, 0, -1, 3, 1], [20, 23, 0, 0, 7, 9], 30
    heads = groups * ratio
    width = (heads + 2 * groups) * headdim
    qkv = draw(len(slots), tokens, width + 6, seed=0, dtype=dtype)[..., 2 : 2 + width]
    k, v = (torch.full((6, groups, positions, headdim), NAN, device=DEVICE, dtype=dtype) for _ in range(2))
    theta = 100.0 ** -torch.linspace(0, 1, headdim // 2, device=DEVICE)
    angles = torch.arange(positions, device=DEVICE)[:, None].double() * theta.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    q = ops.rope_append(qkv, k, v, cos, sin, ints(lengths), ints(slots), heads, offset)
    assert q.shape == (len(slots), tokens, heads, headdim) and q.dtype == dtype and q.is_contiguous()
    untouched = torch.ones(6, positions, dtype=torch.bool)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (q[row] == 0).all()
            continue
        for i in range(tokens):
            position = lengths[slot] + offset + i
            parts = qkv[row, i].view(-1, headdim).split([heads, groups, groups])
            assert distance(q[row, i], rotate(parts[0].double(), position, theta)) < TOLERANCE[dtype]
            assert distance(k[slot, :, position], rotate(parts[1].double(), position, theta)) < TOLERANCE[dtype]
            assert torch.equal(v[slot, :, position], parts[2])
            untouched[slot, position] = False
    assert k.transpose(1, 2)[untouched].isnan().all() and v.transpose(1, 2)[untouched].isnan().all()


@BOTH
def test_only_padding(ops, nan_filled):
    k, v = draw(2, 2, 10, 16, seed=0), draw(2, 2, 10, 16, seed=1)
    before = k.clone(), v.clone()
    table, lengths, slots = torch.ones(10, 8, device=DEVICE), ints([9, 4]), ints([-1, -1, -1])
    q = ops.rope_append(draw(3, 2, 8 * 16, seed=2), k, v, table, table, lengths, slots, 4)
    assert (q == 0).all() and torch.equal(k, before[0]) and torch.equal(v, before[1])
    for splits in (1, 2):
        assert (ops.decode_attention(draw(3, 2, 4, 16, seed=3), k, v, lengths, slots, 0, splits) == 0).all()


@BOTH
def test_window_by_window_equals_one_window(ops):
    """A draft reads a round's tokens one by one at growing offsets; the verifier reads them at once."""
    qkv, lengths, slots = draw(2, 4, 4 * 16, seed=0), ints([6, 3]), ints([1, 0])
    table = torch.linspace(0, 30, 12, device=DEVICE)[:, None] * torch.linspace(1, 0.1, 8, device=DEVICE)
    outputs = []
    for parts in (qkv.split(4, dim=1), qkv.split(1, dim=1), qkv.split(3, dim=1)):
        k, v, offset, out = draw(2, 1, 12, 16, seed=1), draw(2, 1, 12, 16, seed=2), 0, []
        for part in parts:
            q = ops.rope_append(part, k, v, table.cos(), table.sin(), lengths, slots, 2, offset)
            out.append(ops.decode_attention(q, k, v, lengths, slots, offset, 1))
            offset += part.shape[1]
        outputs.append(torch.cat(out, dim=1))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-6)


@BOTH
@DTYPES
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("tokens", "sliding"), [(1, 1), (1, 20), (4, 3), (5, 33), (3, 500)])
def test_sliding_window(ops, tokens, sliding, splits, dtype, nan_filled):
    """Each query of the window sees its own last keys; what none of them sees holds NaN and is not read."""
    groups, ratio, headdim, positions, offset = 2, 3, 16, 100, 2
    slots, lengths = [2, -1, 0], [60, 0, 10]
    q = draw(len(slots), tokens, groups * ratio, headdim, seed=0, dtype=dtype)
    k, v = (strided_cache(3, groups, positions, headdim, seed=s, dtype=dtype) for s in (1, 2))
    for slot, length in enumerate(lengths):
        begin = max(0, length + offset + 1 - sliding)
        for cache in (k, v):
            cache[slot, :, :begin] = NAN
            cache[slot, :, length + offset + tokens :] = NAN
    config = {"config": {"BLOCK_K": 16, "num_warps": 2}} if ops is kernel and splits else {}
    out = ops.decode_attention(q, k, v, ints(lengths), ints(slots), offset, splits, sliding_window=sliding, **config)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (out[row] == 0).all()
            continue
        for i in range(tokens):
            end = lengths[slot] + offset + i + 1
            part = slice(max(0, end - sliding), end)
            wanted = attend(q[row, i : i + 1].double(), k[slot, :, part].double(), v[slot, :, part].double())
            assert distance(out[row, i : i + 1], wanted) < TOLERANCE[dtype]


@BOTH
@DTYPES
@pytest.mark.parametrize("rotates", [False, True])
def test_norms_of_queries_and_keys(ops, rotates, dtype, nan_filled):
    """Before the rotation, of queries and keys alone; without tables nothing is rotated."""
    heads, groups, headdim, positions, eps = 6, 2, 16, 12, 1e-2
    slots, lengths = [1, -1], [0, 7]
    qkv = draw(2, 2, (heads + 2 * groups) * headdim, seed=0, dtype=dtype)
    gains = [draw(headdim, seed=s, dtype=dtype) for s in (1, 2)]
    theta = 100.0 ** -torch.linspace(0, 1, headdim // 2, device=DEVICE)
    angles = torch.arange(positions, device=DEVICE)[:, None] * theta
    k, v = (torch.full((2, groups, positions, headdim), NAN, device=DEVICE, dtype=dtype) for _ in range(2))
    tables = (angles.cos(), angles.sin()) if rotates else (None, None)
    q = ops.rope_append(qkv, k, v, *tables, ints(lengths), ints(slots), heads, 0, *gains, eps=eps)
    assert (q[1] == 0).all() and k[0].isnan().all()
    for i in range(2):
        parts = qkv[0, i].view(-1, headdim).split([heads, groups, groups])
        position = lengths[1] + i
        assert torch.equal(v[1, :, position], parts[2])
        for ours, part, gain in ((q[0, i], parts[0], gains[0]), (k[1, :, position], parts[1], gains[1])):
            wide = part.double()
            normed = gain.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            wanted = rotate(normed, position * rotates, theta)
            assert distance(ours, wanted) < 3 * TOLERANCE[dtype]  # rounded three times


@BOTH
def test_without_tables_nothing_is_rotated(ops, nan_filled):
    qkv, k, v = draw(1, 2, 8 * 16, seed=0), draw(1, 2, 10, 16, seed=1), draw(1, 2, 10, 16, seed=2)
    q = ops.rope_append(qkv, k, v, None, None, ints([3]), ints([0]), 4)
    parts = qkv.view(2, 8, 16).split([4, 2, 2], dim=1)
    assert torch.equal(q[0], parts[0])
    assert torch.equal(k[0, :, 3:5], parts[1].transpose(0, 1)) and torch.equal(v[0, :, 3:5], parts[2].transpose(0, 1))
