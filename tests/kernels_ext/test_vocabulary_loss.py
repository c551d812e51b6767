"""Losses and the gradients written over the logits against their definition in float64 and its autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from kernels_ext.vocabulary_loss import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.vocabulary_loss.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("forward", "reverse", "jsd")
# Triton's interpreter truncates to bfloat16 where a GPU rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
BOTH = pytest.mark.parametrize("ops", [reference, kernel], ids=["reference", "kernel"])


def draw(*shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def exact_divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """By the definition, over float64 log-probabilities."""
    log_q, log_p = (log_softmax(t.double() / temperature, -1) for t in (student, teacher))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    value = {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p)}.get(kind)
    return (0.5 * (kl(log_p, middle) + kl(log_q, middle)) if value is None else value) * temperature**2


def compare(run, exact, logits: Tensor, weights: Tensor) -> None:
    """run(logits) → losses, in place; exact(float64 logits) → losses."""
    before = logits.clone()
    check(run(logits), logits, exact, before, weights)


def check(losses: Tensor, gradient: Tensor, exact, logits: Tensor, weights: Tensor, tolerance: float = 2e-5) -> None:
    """Losses and weighted gradient against exact(float64 logits) → losses; tokens of weight 0 come out as zeros."""
    leaf = logits.double().requires_grad_()
    wanted = exact(leaf).masked_fill(weights == 0, 0.0)
    (wanted_gradient,) = torch.autograd.grad((wanted * weights.double()).sum(), leaf)
    assert losses.dtype == torch.float32 and losses.shape == weights.shape
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    rtol, atol = tolerance + ROUNDING[gradient.dtype], tolerance * wanted_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=rtol, atol=atol)
    assert not gradient[weights == 0].any()


# 4099 does not fill its block; 1000 with blocks of 256 takes four passes of the loop.
SHAPES = [(1, 1000, 256), (5, 1000, 256), (3, 4099, None), (2, 7, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "vocabulary", "block"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_divergence(ops, kind, tokens, vocabulary, block, dtype, nan_filled):
    student, teacher = (draw(tokens, vocabulary, seed=seed, dtype=dtype) for seed in (1, 2))
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    config = {"config": {"BLOCK": block}} if ops is kernel and block else {}
    compare(
        lambda logits: ops.divergence_(logits, teacher, weights, kind, **config),
        lambda logits: exact_divergence(logits, teacher, kind, 1.0),
        student,
        weights,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_temperature_and_cross_entropy(ops, kind, temperature):
    """The cross entropy is at temperature 1 whatever that of the divergence; teacher and student of other types."""
    tokens, vocabulary = 4, 300
    teacher = draw(tokens, vocabulary, seed=2, dtype=torch.bfloat16)
    labels = torch.tensor([0, 299, 17, 128], device=DEVICE)
    weights = torch.tensor([0.5, 1.0, 0.25, 2.0], device=DEVICE)
    compare(
        lambda logits: ops.divergence_(logits, teacher, weights, kind, temperature, labels, 0.3),
        lambda logits: (
            exact_divergence(logits, teacher, kind, temperature) + 0.3 * cross_entropy(logits, labels, reduction="none")
        ),
        draw(tokens, vocabulary, seed=1),
        weights,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "vocabulary", "block"), SHAPES)
@BOTH
def test_cross_entropy(ops, tokens, vocabulary, block, dtype, nan_filled):
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    config = {"config": {"BLOCK": block}} if ops is kernel and block else {}
    compare(
        lambda logits: ops.cross_entropy_(logits, labels, weights, **config),
        lambda logits: cross_entropy(logits, labels, reduction="none"),
        draw(tokens, vocabulary, seed=1, dtype=dtype),
        weights,
    )


@pytest.mark.parametrize("kind", (*KINDS, "cross entropy"))
@BOTH
def test_tokens_of_weight_zero(ops, kind):
    """NaN logits and labels that are none do not get out of them; views into wider rows are served."""
    wide = torch.full((4, 333), float("nan"), device=DEVICE)
    student, teacher = wide[:, 5:305], draw(4, 300, seed=2)
    student.copy_(draw(4, 300, seed=1))
    student[1], teacher[3] = float("nan"), float("nan")
    labels = torch.tensor([3, -100, 299, 10**6], device=DEVICE)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0], device=DEVICE)
    counted = weights > 0
    compared = student[counted].clone()
    if kind == "cross entropy":
        losses = ops.cross_entropy_(student, labels, weights)
        alone = ops.cross_entropy_(compared, labels[counted], weights[counted])
    else:
        losses = ops.divergence_(student, teacher, weights, kind, 1.0, labels, 0.5)
        alone = ops.divergence_(compared, teacher[counted], weights[counted], kind, 1.0, labels[counted], 0.5)
    assert alone.min() > 0.1
    torch.testing.assert_close(losses[counted], alone)
    torch.testing.assert_close(student[counted], compared)
    assert not losses[~counted].any() and not student[~counted].any()
    assert wide[:, :5].isnan().all() and wide[:, 305:].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the kernel's first pass, which it repeats
@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_logits_far_apart(ops, kind):
    """The largest logits come late, after origins that are too small for them, and student and teacher disagree."""
    student, teacher = (draw(3, 700, seed=seed, scale=1.0) for seed in (1, 2))
    student[0, 600], teacher[0, 300] = 60.0, 60.0
    student[1, :256] -= 60.0
    teacher[1, 256:] += 300.0
    student[2], teacher[2] = student[2] - 60.0, teacher[2] + 60.0
    labels = torch.tensor([5, 600, 0], device=DEVICE)
    weights = torch.ones(3, device=DEVICE)
    config = {"config": {"BLOCK": 256}} if ops is kernel else {}
    compare(
        lambda logits: ops.divergence_(logits, teacher, weights, kind, 0.5, labels, 0.1, **config),
        lambda logits: (
            exact_divergence(logits, teacher, kind, 0.5) + 0.1 * cross_entropy(logits, labels, reduction="none")
        ),
        student.clone(),
        weights,
    )
    compare(
        lambda logits: ops.cross_entropy_(logits, labels, weights, **config),
        lambda logits: cross_entropy(logits, labels, reduction="none"),
        100 * student,
        weights,
    )


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_by_hand(ops, kind):
    """p = (1/2, 1/2), q = (1/4, 3/4); at temperature 2 logits twice as large have the same p and q and 4 times the
    loss."""
    middle = (3 / 8, 5 / 8)
    value = {
        "forward": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "reverse": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
        "jsd": 0.5 * sum(0.5 * math.log(0.5 / m) for m in middle)
        + 0.5 * sum(q * math.log(q / m) for q, m in zip((0.25, 0.75), middle, strict=True)),
    }[kind]
    student, teacher = torch.tensor([[0.0, math.log(3)]], device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert ops.divergence_(2 * student, 2 * teacher, one, kind, 2.0).item() == pytest.approx(4 * value, rel=1e-5)
    assert ops.divergence_(student, teacher, one, kind).item() == pytest.approx(value, rel=1e-5)
    if kind == "forward":
        torch.testing.assert_close(student, torch.tensor([[-0.25, 0.25]], device=DEVICE))


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_no_divergence_from_itself(ops, kind):
    """Not even where the logits differ by a constant."""
    teacher = draw(4, 500, seed=1, scale=3.0)
    student = teacher + 8.0
    losses = ops.divergence_(student, teacher, torch.ones(4, device=DEVICE), kind)
    assert losses.abs().max() < 5e-6
    assert student.abs().max() < 1e-6


@BOTH
def test_losses_alone(ops):
    """Without gradient the logits stay."""
    student, teacher = (draw(3, 200, seed=seed) for seed in (1, 2))
    labels, weights = torch.tensor([1, 2, 3], device=DEVICE), torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    before = student.clone()
    losses = ops.divergence_(student, teacher, weights, gradient=False)
    nll = ops.cross_entropy_(student, labels, weights, gradient=False)
    torch.testing.assert_close(student, before, rtol=0, atol=0)
    torch.testing.assert_close(losses, ops.divergence_(student.clone(), teacher, weights))
    torch.testing.assert_close(nll, ops.cross_entropy_(student, labels, weights))


@BOTH
def test_no_tokens(ops):
    nothing = torch.empty(0, 9, device=DEVICE)
    assert ops.divergence_(nothing, nothing, nothing[:, 0]).shape == (0,)
    assert ops.cross_entropy_(nothing, nothing[:, 0].long(), nothing[:, 0]).shape == (0,)


@BOTH
def test_errors(ops):
    student, weights = torch.zeros(1, 2, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="'sideways': expected forward, reverse or jsd"):
        ops.divergence_(student, student, weights, "sideways")
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        ops.divergence_(student, student, weights, temperature=0.0)
    with pytest.raises(ValueError, match="ce_weight needs labels"):
        ops.divergence_(student, student, weights, ce_weight=0.5)


def test_blocks_are_powers_of_two_no_larger_than_needed():
    for vocabulary in (2, 1000, 32000, 49152, 128256):
        config = kernel.launch_config(vocabulary)
        assert config["BLOCK"].bit_count() == config["num_warps"].bit_count() == 1
        assert 128 <= config["BLOCK"] < max(2 * vocabulary, 129)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_full_size(kind):
    """bfloat16 logits of a real vocabulary against float64, and the same bits twice."""
    student, teacher = (draw(2048, 49152, seed=seed, scale=4.0, dtype=torch.bfloat16) for seed in (1, 2))
    labels = torch.randint(49152, (2048,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    weights = (torch.rand(2048, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.7) / 1500
    first, second = student.clone(), student.clone()
    losses = kernel.divergence_(first, teacher, weights, kind, 2.0, labels, 0.5)
    again = kernel.divergence_(second, teacher, weights, kind, 2.0, labels, 0.5)
    assert torch.equal(losses, again) and torch.equal(first, second)
    for start in range(0, 2048, 256):
        rows = slice(start, start + 256)
        check(
            losses[rows],
            first[rows],
            lambda logits, rows=rows: (
                exact_divergence(logits, teacher[rows], kind, 2.0)
                + 0.5 * cross_entropy(logits, labels[rows], reduction="none")
            ),
            student[rows],
            weights[rows],
        )
