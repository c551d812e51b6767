"""`reference` in Triton: one program per row, which reads it a few times (from L2 after the first) and never sorts.

The tokens that a filter keeps are those whose logit is at least some threshold. It is found by search: each pass over
the row measures how much lies at or above three trial values, which quarters the interval. Trial values are numbers of
the logits' own type, so that the search for bfloat16 logits ends after few passes; do not widen them beforehand.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.sampling.reference import check_filter

LOWEST = tl.constexpr(-1e30)
NO_TOKEN = tl.constexpr(2**31 - 1)
LOG2_E = math.log2(math.e)
PROGRAMS = 264  # about two for each multiprocessor of an H100 or H200


def launch_config(operator: str, rows: int, vocabulary: int) -> dict:
    """Launch parameters of `greedy` ("greedy") and of the filters ("filter")."""
    if operator == "greedy":
        block = min(1024, triton.next_power_of_2(vocabulary))
        splits = min(triton.cdiv(vocabulary, block), triton.cdiv(PROGRAMS, rows))
        return {"BLOCK": block, "splits": splits, "num_warps": 4}
    few = rows < PROGRAMS
    block = min(4096 if few else 2048, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, min(16 if few else 8, block // 256))}


def greedy(logits: Tensor, *, config: dict | None = None) -> Tensor:
    """See `reference.greedy`. Few rows are split over many programs, whose results a second launch compares."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    if rows == 0:
        return torch.empty(0, dtype=torch.int32, device=logits.device)
    config = launch_config("greedy", rows, vocabulary) | (config or {})
    splits = config.pop("splits")
    span = triton.cdiv(triton.cdiv(vocabulary, splits), config["BLOCK"]) * config["BLOCK"]
    splits = triton.cdiv(vocabulary, span)
    best = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    _argmax_kernel[(rows, splits)](logits, best, tokens, vocabulary, logits.stride(0), span, splits, **config)
    if splits == 1:
        return tokens[:, 0]
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _best_part_kernel[(rows,)](best, tokens, out, splits, BLOCK=triton.next_power_of_2(splits), num_warps=1)
    return out


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, *, config: dict | None = None
) -> Tensor:
    """See `reference.sample`; config is that of the operator which the temperature selects."""
    check_filter(temperature, top_k, top_p)
    if temperature == 0.0:
        return greedy(logits, config=config)
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and uniforms.shape == (rows,)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](
            logits,
            uniforms.contiguous(),
            out,
            vocabulary,
            logits.stride(0),
            *_filter_arguments(temperature, top_k, top_p),
            TOP_K=0 < top_k < vocabulary,
            TOP_P=top_p < 1.0,
            **(launch_config("filter", rows, vocabulary) | (config or {})),
        )
    return out


def filtered_probabilities(
    logits: Tensor, temperature: float, top_k: int, top_p: float, *, config: dict | None = None
) -> Tensor:
    """See `reference.filtered_probabilities`. Logits that differ by less than 2^-24 · temperature count as equal."""
    check_filter(temperature, top_k, top_p, greedy_allowed=False)
    vocabulary = logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    assert flat.stride(1) == 1
    rows = flat.shape[0]
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if rows:
        _probabilities_kernel[(rows,)](
            flat,
            out,
            vocabulary,
            flat.stride(0),
            *_filter_arguments(temperature, top_k, top_p),
            TOP_K=0 < top_k < vocabulary,
            TOP_P=top_p < 1.0,
            **(launch_config("filter", rows, vocabulary) | (config or {})),
        )
    return out


def _filter_arguments(temperature: float, top_k: int, top_p: float) -> tuple[float, float, float, float, float]:
    """scale, closest, top_k, top_p, outside: numbers that Triton takes as float32 whatever their value."""
    return LOG2_E / temperature, temperature * 2.0**-24, float(top_k), float(top_p), 1.0 - top_p


@triton.jit
def pick(weight, at, before, target):
    """The first token of a block whose cumulative weight passes the target, `before` being what came before the block;
    where none does, the last of positive weight."""
    passed = (before + tl.cumsum(weight, 0) > target) & (weight > 0.0)
    first = tl.min(tl.where(passed, at, NO_TOKEN), 0)
    last = tl.max(tl.where(weight > 0.0, at, 0), 0)
    return tl.where(first < NO_TOKEN, first, last)


@triton.jit
def _logits(row, at, V):
    return tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(row, at, V, maximum, threshold, scale):
    """Probabilities up to a factor: that of the largest logit is 1."""
    x = _logits(row, at, V)
    return tl.where(x >= threshold, tl.exp2((x - maximum) * scale), 0.0)


@triton.jit
def _maximum_and_mass(row, V, scale, BLOCK: tl.constexpr):
    """The largest logit and the sum of all weights, in one pass (online softmax, 1805.02867)."""
    offsets = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = _logits(row, start + offsets, V)
        higher = tl.maximum(top, x)
        mass = mass * tl.exp2((top - higher) * scale) + tl.exp2((x - higher) * scale)
        top = higher
    maximum = tl.max(top, 0)
    return maximum, tl.sum(mass * tl.exp2((top - maximum) * scale), 0)


@triton.jit
def _minimum(row, V, maximum, BLOCK: tl.constexpr):
    """The smallest logit that is not −∞."""
    offsets = tl.arange(0, BLOCK)
    bottom = tl.zeros([BLOCK], tl.float32) + maximum
    for start in range(0, V, BLOCK):
        x = _logits(row, start + offsets, V)
        bottom = tl.where(x > LOWEST, tl.minimum(bottom, x), bottom)
    return tl.min(bottom, 0)


@triton.jit
def _kept_mass(row, V, maximum, threshold, scale, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        mass += _weights(row, start + offsets, V, maximum, threshold, scale)
    return tl.sum(mass, 0)


@triton.jit
def _largest_threshold(
    row, V, low, high, needed, total, maximum, scale, closest, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest t such that the tokens with logit ≥ t have together at least the weight (BY_MASS) or number `needed`.

    low is known to be such a t, high not to be; both are numbers of the logits' type. total: weight or number of all.
    Returns t and what lies at or above it, which is `total` if t is still low.
    """
    element = row.dtype.element_ty
    offsets = tl.arange(0, BLOCK)
    above_low = total  # an upper bound until low moves
    above_high = total * 0.0
    surplus = total  # positive while the interval may hold more than one token
    middle = (low + 0.5 * (high - low)).to(element).to(tl.float32)
    while (middle > low) & (middle < high) & (high - low > closest) & (surplus > 0.0):
        first = (low + 0.25 * (high - low)).to(element).to(tl.float32)
        third = (low + 0.75 * (high - low)).to(element).to(tl.float32)
        above_first = tl.zeros([BLOCK], tl.float32)
        above_middle = tl.zeros([BLOCK], tl.float32)
        above_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x = _logits(row, start + offsets, V)
            weight = tl.exp2((x - maximum) * scale) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            above_first += tl.where(x >= first, weight, 0.0)
            above_middle += tl.where(x >= middle, weight, 0.0)
            above_third += tl.where(x >= third, weight, 0.0)
        one = tl.sum(above_first, 0)
        two = tl.sum(above_middle, 0)
        three = tl.sum(above_third, 0)
        above_high = tl.where(
            three >= needed, above_high, tl.where(two >= needed, three, tl.where(one >= needed, two, one))
        )
        above_low = tl.where(
            three >= needed, three, tl.where(two >= needed, two, tl.where(one >= needed, one, above_low))
        )
        high = tl.where(three >= needed, high, tl.where(two >= needed, third, tl.where(one >= needed, middle, first)))
        low = tl.where(three >= needed, third, tl.where(two >= needed, middle, tl.where(one >= needed, first, low)))
        if BY_MASS:  # each token in the interval weighs at least as much as one at low would
            surplus = above_low - above_high + 1e-5 * total - 2.0 * tl.exp2((low - maximum) * scale)
        else:
            surplus = above_low - above_high - 1.5
        middle = (low + 0.5 * (high - low)).to(element).to(tl.float32)
    return low, above_low


@triton.jit
def _filter(
    row, V, scale, closest, top_k, top_p, outside, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest logit, the smallest that is kept, and the sum of the weights that are kept."""
    element = row.dtype.element_ty
    maximum, total = _maximum_and_mass(row, V, scale, BLOCK)
    threshold = maximum * 0.0 + LOWEST
    # Two steps of the coarsest type, which has 8 bits.
    beyond = (maximum + tl.abs(maximum) * 0.015625 + 1e-20).to(element).to(tl.float32)
    if TOP_K:
        bound = _minimum(row, V, maximum, BLOCK)
        threshold, _ = _largest_threshold(
            row, V, bound, beyond, top_k, total * 0.0 + V, maximum, scale, closest, False, BLOCK
        )
        total = _kept_mass(row, V, maximum, threshold, scale, BLOCK)
    if TOP_P:
        # Tokens of less than outside/V of the mass each hold less than `outside` of it together: the rest is enough.
        bound = maximum + tl.log2(outside * total / V) / scale
        bound = (bound - tl.abs(bound) * 0.015625 - 1e-20).to(element).to(tl.float32)
        bound = tl.maximum(bound, threshold)
        threshold, total = _largest_threshold(
            row, V, bound, beyond, top_p * total, total, maximum, scale, closest, True, BLOCK
        )
        if threshold == bound:  # the search has not measured it
            total = _kept_mass(row, V, maximum, threshold, scale, BLOCK)
    return maximum, threshold, total


@triton.jit
def _probabilities_kernel(
    logits,
    out,
    V,
    stride,
    scale,
    closest,
    top_k,
    top_p,
    outside,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * stride
    maximum, threshold, total = _filter(row, V, scale, closest, top_k, top_p, outside, TOP_K, TOP_P, BLOCK)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        at = start + offsets
        weight = _weights(row, at, V, maximum, threshold, scale)
        tl.store(out + m * V + at, weight / total, mask=at < V)


@triton.jit
def _sample_kernel(
    logits,
    uniforms,
    out,
    V,
    stride,
    scale,
    closest,
    top_k,
    top_p,
    outside,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * stride
    maximum, threshold, total = _filter(row, V, scale, closest, top_k, top_p, outside, TOP_K, TOP_P, BLOCK)
    target = tl.load(uniforms + m) * total
    # Block by block up to the one in which the target is passed.
    offsets = tl.arange(0, BLOCK)
    start = 0
    latest = 0  # the latest block with a token to choose
    before = total * 0.0
    mass = tl.sum(_weights(row, offsets, V, maximum, threshold, scale), 0)
    while (before + mass <= target) & (start + BLOCK < V):
        latest = tl.where(mass > 0.0, start, latest)
        before += mass
        start += BLOCK
        mass = tl.sum(_weights(row, start + offsets, V, maximum, threshold, scale), 0)
    passed = before + mass > target
    start = tl.where(passed | (mass > 0.0), start, latest)
    target = tl.where(passed, target, float("inf"))
    at = start + offsets
    weight = _weights(row, at, V, maximum, threshold, scale)
    tl.store(out + m, pick(weight, at, before, target))


@triton.jit
def _argmax_kernel(logits, best, tokens, V, stride, span, splits, BLOCK: tl.constexpr):
    m = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + m.to(tl.int64) * stride
    begin = part * span
    end = tl.minimum(begin + span, V)
    offsets = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.zeros([BLOCK], tl.int32) + begin
    for start in range(begin, end, BLOCK):
        at = start + offsets
        x = tl.load(row + at, mask=at < end, other=float("-inf")).to(tl.float32)
        token = tl.where(x > top, at, token)
        top = tl.maximum(top, x)
    maximum = tl.max(top, 0)
    tl.store(best + m * splits + part, maximum)
    tl.store(tokens + m * splits + part, tl.min(tl.where(top == maximum, token, V - 1), 0))


@triton.jit
def _best_part_kernel(best, tokens, out, splits, BLOCK: tl.constexpr):
    m = tl.program_id(0)
    parts = tl.arange(0, BLOCK)
    value = tl.load(best + m * splits + parts, mask=parts < splits, other=float("-inf"))
    token = tl.load(tokens + m * splits + parts, mask=parts < splits, other=NO_TOKEN)
    tl.store(out + m, tl.min(tl.where(value == tl.max(value, 0), token, NO_TOKEN), 0))
