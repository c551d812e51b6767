"""`reference` in Triton: one program per row, which reads it a few times and never sorts.

The tokens that a filter keeps are those whose logit is above some threshold. It is found by search: each pass over the
row measures how much lies above several trial values, which cut the interval in parts. Trial values are numbers of the
logits' own type, so that the search for bfloat16 logits ends after few passes; do not widen them beforehand. The first
trial values of a nucleus come from a sample of the row. A pass costs arithmetic rather than bandwidth: see `_above`.
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
SHARP = tl.constexpr(2.0**60)
FAR = tl.constexpr(64.0)
SAMPLE_STEPS = tl.constexpr(8)
CHUNK = tl.constexpr(16)
LOG2_E = math.log2(math.e)
PROGRAMS = 264  # about two for each multiprocessor of an H100 or H200
SMALLEST_BLOCK = 128  # Triton does not compile blocks of one element


def launch_config(operator: str, rows: int, vocabulary: int, itemsize: int = 2) -> dict:
    """Launch parameters of `greedy` ("greedy") and of the filters ("filter"), whose logits have `itemsize` bytes.

    PIVOTS: trial values of a pass. Where passes wait for memory, fewer passes with more of them are faster.
    STAGES: blocks of a row under way. SAMPLE: logits of a row by which the first trial values are chosen.
    """
    smallest = max(SMALLEST_BLOCK, triton.next_power_of_2(vocabulary))
    if operator == "greedy":
        block = min(1024, smallest)
        splits = min(triton.cdiv(vocabulary, block), triton.cdiv(PROGRAMS, rows))
        return {"BLOCK": block, "splits": splits, "num_warps": 4}
    few = rows < PROGRAMS
    block = min(4096 if few else 2048, smallest)
    return {
        "BLOCK": block,
        "PIVOTS": 8 if few or itemsize == 4 else 4,
        "STAGES": 3,
        "SAMPLE": min(4096, smallest),
        "num_warps": max(1, min(16 if few else 8, block // 256)),
    }


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
    if vocabulary == 1:  # Triton 3.6 crashes on the kernel's loops over a single token
        return torch.zeros(rows, dtype=torch.int32, device=logits.device)
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
            **(launch_config("filter", rows, vocabulary, logits.element_size()) | (config or {})),
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
            **(launch_config("filter", rows, vocabulary, logits.element_size()) | (config or {})),
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
def _weights(row, at, V, threshold, scale, origin):
    """Probabilities up to a factor."""
    x = _logits(row, at, V)
    return tl.where(x > threshold, tl.exp2((x - origin) * scale), 0.0)


@triton.jit
def _maximum_and_mass(row, V, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The largest logit, the origin of the weights 2^((logit − origin) · scale), and their sum, in one pass.

    The origin is the largest of the first logits; where that is much too small for the rest, the pass is repeated.
    """
    offsets = tl.arange(0, BLOCK)
    origin = tl.maximum(tl.max(_logits(row, offsets, V), 0), LOWEST)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = _logits(row, start + offsets, V)
        mass += tl.exp2((x - origin) * scale)
        top = tl.maximum(top, x)
    maximum = tl.max(top, 0)
    total = tl.sum(mass, 0)
    if (maximum - origin) * scale > FAR:
        origin = maximum
        total = _kept_mass(row, V, LOWEST, scale, origin, BLOCK, STAGES)
    return maximum, origin, total


@triton.jit
def _minimum(row, V, maximum, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The smallest logit that is not −∞."""
    offsets = tl.arange(0, BLOCK)
    bottom = tl.zeros([BLOCK], tl.float32) + maximum
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = _logits(row, start + offsets, V)
        bottom = tl.where(x > LOWEST, tl.minimum(bottom, x), bottom)
    return tl.min(bottom, 0)


@triton.jit
def _kept_mass(row, V, threshold, scale, origin, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        mass += _weights(row, start + offsets, V, threshold, scale, origin)
    return tl.sum(mass, 0)


@triton.jit
def _above(x, weight, trials):
    """The weight where x > trial, else 0. x, weight (1, BLOCK), trials (PIVOTS,) → (PIVOTS, BLOCK).

    The steep ramp is 0 or 1 for all logits but those within 1e-18 above the trial. It becomes one multiply-add that
    saturates, of which a multiprocessor does twice as many as comparisons or selections.
    """
    ramp = x * SHARP - trials[:, None] * SHARP
    return tl.minimum(tl.maximum(ramp, 0.0), 1.0) * weight


@triton.jit
def _cuts(low, high, PIVOTS: tl.constexpr):
    """Values that cut the interval in equal parts."""
    return low + (high - low) * ((tl.arange(0, PIVOTS) + 1).to(tl.float32) / (PIVOTS + 1))


@triton.jit
def _guess(row, V, low, high, tail, scale, origin, SAMPLE: tl.constexpr):
    """About where the tokens that are not above weigh `tail` together, by a sample of chunks of the row."""
    offsets = tl.arange(0, SAMPLE)
    at = offsets // CHUNK * tl.maximum(V // SAMPLE * CHUNK, CHUNK) + offsets % CHUNK
    x = _logits(row, at, V)
    weight = tl.exp2((x - origin) * scale)
    allowed = tail * tl.minimum(V, SAMPLE) / V
    for _ in range(SAMPLE_STEPS):
        middle = low + 0.5 * (high - low)
        fits = tl.sum(tl.where(x > middle, 0.0, weight), 0) <= allowed
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return low


@triton.jit
def _around(guess, low, high, scale, PIVOTS: tl.constexpr):
    """Trial values on both sides of a guess, 0.06, 0.25, 1 … temperatures away."""
    number = tl.arange(0, PIVOTS).to(tl.float32) - (PIVOTS - 1) * 0.5
    distance = tl.exp2(2.0 * tl.abs(number) - 4.5) / scale
    return tl.minimum(tl.maximum(guess + tl.where(number > 0.0, distance, -distance), low), high)


@triton.jit
def _largest_threshold(
    row,
    V,
    low,
    high,
    needed,
    total,
    scale,
    origin,
    closest,
    BY_MASS: tl.constexpr,
    GUESS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    STAGES: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """The largest t such that the tokens with logit > t have together at least the weight (BY_MASS) or number `needed`.

    low is known to be such a t, high not to be; both are numbers of the logits' type. total: weight or number of all.
    GUESS: begin near where a sample of the row says. Returns t and what lies above it, which is `total` if t is still
    low.
    """
    element = row.dtype.element_ty
    offsets = tl.arange(0, BLOCK)[None, :]  # so that logits are loaded in the layout of the products
    above_low = total  # an upper bound until low moves
    above_high = total * 0.0
    surplus = total  # positive while the interval may hold more than one token
    middle = (low + 0.5 * (high - low)).to(element).to(tl.float32)
    first = low < high
    guess = low
    if GUESS:
        guess = _guess(row, V, low, high, total - needed, scale, origin, SAMPLE)
    while (middle > low) & (middle < high) & (high - low > closest) & (surplus > 0.0):
        trials = _cuts(low, high, PIVOTS)
        if GUESS:
            trials = tl.where(first, _around(guess, low, high, scale, PIVOTS), trials)
        trials = trials.to(element).to(tl.float32)
        above = tl.zeros([PIVOTS, BLOCK], tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = _logits(row, start + offsets, V)
            weight = tl.exp2((x - origin) * scale) if BY_MASS else tl.full([1, BLOCK], 1.0, tl.float32)
            above += _above(x, weight, trials)
        found = tl.sum(above, 1)
        enough = found >= needed
        above_high = tl.max(tl.where(enough, above_high, found), 0)
        above_low = tl.min(tl.where(enough, found, above_low), 0)
        low, high = tl.max(tl.where(enough, trials, low), 0), tl.min(tl.where(enough, high, trials), 0)
        if BY_MASS:  # each token in the interval weighs at least as much as one at low would
            surplus = above_low - above_high + 4e-6 * total - 2.0 * tl.exp2((low - origin) * scale)
        else:
            surplus = above_low - above_high - 1.5
        middle = (low + 0.5 * (high - low)).to(element).to(tl.float32)
        first = low > high
    return low, above_low


@triton.jit
def _below(x, element: tl.constexpr):
    """Less than x by two steps of the coarsest type, which has 8 bits."""
    return (x - tl.abs(x) * 0.015625 - 1e-20).to(element).to(tl.float32)


@triton.jit
def _filter(
    row,
    V,
    scale,
    closest,
    top_k,
    top_p,
    outside,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    STAGES: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """The origin of the weights, the threshold above which logits are kept, and the sum of the weights kept."""
    element = row.dtype.element_ty
    maximum, origin, total = _maximum_and_mass(row, V, scale, BLOCK, STAGES)
    threshold = maximum * 0.0 + LOWEST
    if TOP_K:
        bound = _below(_minimum(row, V, maximum, BLOCK, STAGES), element)
        count = total * 0.0 + V
        threshold, _ = _largest_threshold(
            row, V, bound, maximum, top_k, count, scale, origin, closest, False, False, BLOCK, PIVOTS, STAGES, SAMPLE
        )
        total = _kept_mass(row, V, threshold, scale, origin, BLOCK, STAGES)
    if TOP_P:
        # Tokens of less than outside/V of the mass each hold less than `outside` of it together: the rest is enough.
        bound = _below(origin + tl.log2(outside * total / V) / scale, element)
        bound = tl.maximum(bound, threshold)
        needed = top_p * total
        threshold, total = _largest_threshold(
            row,
            V,
            bound,
            maximum,
            needed,
            total,
            scale,
            origin,
            closest,
            True,
            not TOP_K,
            BLOCK,
            PIVOTS,
            STAGES,
            SAMPLE,
        )
        if threshold == bound:  # the search has not measured it
            total = _kept_mass(row, V, threshold, scale, origin, BLOCK, STAGES)
    return origin, threshold, total


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
    PIVOTS: tl.constexpr,
    STAGES: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * stride
    origin, threshold, total = _filter(
        row, V, scale, closest, top_k, top_p, outside, TOP_K, TOP_P, BLOCK, PIVOTS, STAGES, SAMPLE
    )
    offsets = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        at = start + offsets
        weight = _weights(row, at, V, threshold, scale, origin)
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
    PIVOTS: tl.constexpr,
    STAGES: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * stride
    origin, threshold, total = _filter(
        row, V, scale, closest, top_k, top_p, outside, TOP_K, TOP_P, BLOCK, PIVOTS, STAGES, SAMPLE
    )
    target = tl.load(uniforms + m) * total
    # Block by block up to the one in which the target is passed.
    offsets = tl.arange(0, BLOCK)
    start = 0
    latest = 0  # the latest block with a token to choose
    before = total * 0.0
    mass = tl.sum(_weights(row, offsets, V, threshold, scale, origin), 0)
    while (before + mass <= target) & (start + BLOCK < V):
        latest = tl.where(mass > 0.0, start, latest)
        before += mass
        start += BLOCK
        mass = tl.sum(_weights(row, start + offsets, V, threshold, scale, origin), 0)
    passed = before + mass > target
    start = tl.where(passed | (mass > 0.0), start, latest)
    target = tl.where(passed, target, float("inf"))
    at = start + offsets
    weight = _weights(row, at, V, threshold, scale, origin)
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
