"""`reference` in Triton: one program per token, which reads its rows of logits twice and writes the gradient once.

Pass 1 sums what the losses need: weights 2^((logit − origin) / τ · log2 e) of both distributions and their expected
difference, each about an origin, the largest of the first logits. Where that is much too small for the rest, the pass
is repeated about the maximum: no sum is rescaled on the way and lanes do not wait for each other. Pass 2 writes the
gradient where the student's logits were; its reads find what pass 1 left in the L2 cache as long as the rows under way
on all multiprocessors fit there, so programs are large and few. Jensen-Shannon alone needs a pass in between: its value
takes both normalised distributions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_ext.vocabulary_loss.reference import Divergence, check_divergence

LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
LARGE = tl.constexpr(2.0**100)
SMALLEST_BLOCK = 128


def launch_config(vocabulary: int) -> dict:
    """BLOCK: logits of a row worked on at a time, 8 a thread; STAGES: blocks under way.

    The fastest of 27 on an H200 at 4096 × 49152 in bfloat16, for both losses (LOG.md).
    """
    block = max(SMALLEST_BLOCK, min(8192, triton.next_power_of_2(vocabulary)))
    return {"BLOCK": block, "STAGES": 1, "num_warps": max(1, block // 256)}


def divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    gradient: bool = True,
    *,
    config: dict | None = None,
) -> Tensor:
    """See `reference.divergence_`. Losses are float32."""
    check_divergence(kind, temperature, labels, ce_weight)
    tokens, vocabulary = student_logits.shape
    assert teacher_logits.shape == student_logits.shape and weights.shape == (tokens,)
    assert student_logits.stride(1) == teacher_logits.stride(1) == 1
    losses = torch.empty(tokens, dtype=torch.float32, device=student_logits.device)
    if tokens:
        _divergence_kernel[(tokens,)](
            student_logits,
            teacher_logits,
            labels.contiguous() if labels is not None and ce_weight else None,
            weights.contiguous(),
            losses,
            vocabulary,
            student_logits.stride(0),
            teacher_logits.stride(0),
            float(temperature),
            float(ce_weight),
            KIND=kind,
            CE=bool(ce_weight),
            TEMPERED=temperature != 1.0,
            GRADIENT=gradient,
            **(launch_config(vocabulary) | (config or {})),
        )
    return losses


def cross_entropy_(
    logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool = True, *, config: dict | None = None
) -> Tensor:
    """See `reference.cross_entropy_`. Losses are float32."""
    tokens, vocabulary = logits.shape
    assert weights.shape == labels.shape == (tokens,) and logits.stride(1) == 1
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits,
            labels.contiguous(),
            weights.contiguous(),
            losses,
            vocabulary,
            logits.stride(0),
            GRADIENT=gradient,
            **(launch_config(vocabulary) | (config or {})),
        )
    return losses


@triton.jit
def _load(row, at, V):
    return tl.load(row + at, mask=at < V, other=LOWEST).to(tl.float32)


@triton.jit
def _clear(row, V, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        at = start + offsets
        tl.store(row + at, tl.zeros([BLOCK], row.dtype.element_ty), mask=at < V)


@triton.jit
def _maximum(row, V, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, V, BLOCK):
        top = tl.maximum(top, _load(row, start + offsets, V))
    return tl.max(top, 0)


@triton.jit
def _mass(row, V, origin, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Σ e^(logit − origin)."""
    offsets = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        mass += tl.exp2((_load(row, start + offsets, V) - origin) * LOG2_E)
    return tl.sum(mass, 0)


@triton.jit
def _sums(
    student, teacher, V, student_origin, teacher_origin, sharpness,
    KIND: tl.constexpr, UNTEMPERED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ 2^(sharpness · (logit − origin)) of student and teacher, Σ e^(logit − origin) of the student (UNTEMPERED), and
    the weighted sum of the logits' difference, of which forward and reverse KL are made."""
    offsets = tl.arange(0, BLOCK)
    student_mass = tl.zeros([BLOCK], tl.float32)
    teacher_mass = tl.zeros([BLOCK], tl.float32)
    untempered_mass = tl.zeros([BLOCK], tl.float32)
    difference = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        s = _load(student, start + offsets, V) - student_origin
        t = _load(teacher, start + offsets, V) - teacher_origin
        student_weight = tl.exp2(s * sharpness)
        teacher_weight = tl.exp2(t * sharpness)
        student_mass += student_weight
        teacher_mass += teacher_weight
        if KIND == "forward":
            difference += teacher_weight * (t - s)
        if KIND == "reverse":
            difference += student_weight * (s - t)
        if UNTEMPERED:
            untempered_mass += tl.exp2(s * LOG2_E)
    return tl.sum(student_mass, 0), tl.sum(teacher_mass, 0), tl.sum(untempered_mass, 0), tl.sum(difference, 0)


@triton.jit
def _middle(log_p, log_q):
    """log((p + q) / 2)."""
    top = tl.maximum(log_p, log_q)
    return top + tl.log(1.0 + tl.exp(tl.minimum(log_p, log_q) - top)) - LN_2


@triton.jit
def _divergence_kernel(
    student, teacher, labels, weights, losses, V, student_stride, teacher_stride, temperature, ce_weight,
    KIND: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    student += m * student_stride
    teacher += m * teacher_stride
    weight = tl.load(weights + m)
    if weight == 0.0:
        tl.store(losses + m, 0.0)
        if GRADIENT:
            _clear(student, V, BLOCK)
        return
    UNTEMPERED: tl.constexpr = CE and TEMPERED
    offsets = tl.arange(0, BLOCK)
    sharpness = LOG2_E / temperature
    student_origin = tl.max(_load(student, offsets, V), 0)
    teacher_origin = tl.max(_load(teacher, offsets, V), 0)
    student_mass, teacher_mass, untempered_mass, difference = _sums(
        student, teacher, V, student_origin, teacher_origin, sharpness, KIND, UNTEMPERED, BLOCK, STAGES
    )
    if tl.maximum(tl.maximum(student_mass, teacher_mass), untempered_mass) > LARGE:
        student_origin = _maximum(student, V, BLOCK)
        teacher_origin = _maximum(teacher, V, BLOCK)
        student_mass, teacher_mass, untempered_mass, difference = _sums(
            student, teacher, V, student_origin, teacher_origin, sharpness, KIND, UNTEMPERED, BLOCK, STAGES
        )
    log_student_mass = tl.log(student_mass)
    log_teacher_mass = tl.log(teacher_mass)
    own = 0.0  # what is subtracted from the student's log ratio in the gradient
    if KIND == "forward":
        value = difference / (teacher_mass * temperature) + log_student_mass - log_teacher_mass
    elif KIND == "reverse":
        value = difference / (student_mass * temperature) + log_teacher_mass - log_student_mass
        own = value
    else:
        from_student = tl.zeros([BLOCK], tl.float32)
        from_teacher = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            log_q = (_load(student, start + offsets, V) - student_origin) / temperature - log_student_mass
            log_p = (_load(teacher, start + offsets, V) - teacher_origin) / temperature - log_teacher_mass
            log_m = _middle(log_p, log_q)
            from_student += tl.exp(log_q) * (log_q - log_m)
            from_teacher += tl.exp(log_p) * (log_p - log_m)
        own = tl.sum(from_student, 0)
        value = 0.5 * (own + tl.sum(from_teacher, 0))
    loss = value * temperature * temperature
    label = -1
    if CE:
        label = tl.load(labels + m).to(tl.int32)
        log_mass = tl.log(untempered_mass) if UNTEMPERED else log_student_mass
        loss += ce_weight * (log_mass - (tl.load(student + label).to(tl.float32) - student_origin))
    tl.store(losses + m, loss)
    if GRADIENT:
        rate = weight * temperature
        ce_rate = weight * ce_weight
        student_rate = 1.0 / student_mass
        teacher_rate = 1.0 / teacher_mass
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + offsets
            s = _load(student, at, V) - student_origin
            t = _load(teacher, at, V) - teacher_origin
            q = tl.exp2(s * sharpness) * student_rate
            if KIND == "forward":
                grad = q - tl.exp2(t * sharpness) * teacher_rate
            elif KIND == "reverse":
                grad = q * ((s - t) / temperature + (log_teacher_mass - log_student_mass) - own)
            else:
                log_q = s / temperature - log_student_mass
                log_p = t / temperature - log_teacher_mass
                grad = 0.5 * q * (log_q - _middle(log_p, log_q) - own)
            grad *= rate
            if CE:
                q1 = tl.exp2(s * LOG2_E) / untempered_mass if UNTEMPERED else q
                grad += ce_rate * (q1 - tl.where(at == label, 1.0, 0.0))
            tl.store(student + at, grad.to(student.dtype.element_ty), mask=at < V)


@triton.jit
def _cross_entropy_kernel(
    logits, labels, weights, losses, V, stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * stride
    weight = tl.load(weights + m)
    if weight == 0.0:
        tl.store(losses + m, 0.0)
        if GRADIENT:
            _clear(row, V, BLOCK)
        return
    offsets = tl.arange(0, BLOCK)
    origin = tl.max(_load(row, offsets, V), 0)
    mass = _mass(row, V, origin, BLOCK, STAGES)
    if mass > LARGE:
        origin = _maximum(row, V, BLOCK)
        mass = _mass(row, V, origin, BLOCK, STAGES)
    label = tl.load(labels + m).to(tl.int32)
    tl.store(losses + m, tl.log(mass) - (tl.load(row + label).to(tl.float32) - origin))
    if GRADIENT:
        rate = weight / mass
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + offsets
            grad = tl.exp2((_load(row, at, V) - origin) * LOG2_E) * rate - tl.where(at == label, weight, 0.0)
            tl.store(row + at, grad.to(row.dtype.element_ty), mask=at < V)
