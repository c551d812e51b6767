"""Losses over a vocabulary that turn the logits they are given into their own gradient, in place.

Legend: T tokens, V vocabulary. p = softmax(teacher / τ), q = softmax(student / τ). Arithmetic is in float32 whatever
the logits' type (in float64 for float64); losses are in nats. A token of weight 0 has loss 0 and gradient 0, and
neither its logits nor its label are looked at.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]


def divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    gradient: bool = True,
) -> Tensor:
    """τ² · divergence + ce_weight · cross entropy of each token: (T,), not weighted.

    forward Σ p log(p/q), reverse Σ q log(q/p), jsd ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2; the factor τ² keeps
    gradients of one size (Hinton et al. 2015 §2). The cross entropy is at temperature 1.

    student_logits (T, V) become d(Σ weights · losses)/d student_logits, in their own type, unless `gradient` is false;
    teacher_logits (T, V) of any type; weights (T,) float32; labels (T,) int64, needed where ce_weight is not 0.
    Raises ValueError as `check_divergence`.
    """
    check_divergence(kind, temperature, labels, ce_weight)
    log_q, log_p = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    nll = grad_ce = None
    if ce_weight and labels is not None:
        log_q1 = log_q if temperature == 1.0 else _log_softmax(student_logits, 1.0)
        nll, grad_ce = _cross_entropy(log_q1, labels, weights, gradient)
    if kind == "forward":
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q))
        grad = log_q.exp_().sub_(p) if gradient else None
    elif kind == "reverse":
        q, ratio = log_q.exp(), log_q.sub_(log_p)
        value = torch.linalg.vecdot(q, ratio)
        grad = q.mul_(ratio.sub_(value[:, None])) if gradient else None
    else:
        log_m = torch.logaddexp(log_p, log_q).sub_(torch.tensor(2.0).log())
        p, q, ratio = log_p.exp(), log_q.exp(), log_q.sub_(log_m)
        own = torch.linalg.vecdot(q, ratio)
        value = 0.5 * (torch.linalg.vecdot(p, log_p.sub_(log_m)) + own)
        grad = q.mul_(ratio.sub_(own[:, None])).mul_(0.5) if gradient else None
    losses = value * temperature**2
    if grad is not None and temperature != 1.0:
        grad *= temperature
    if nll is not None:
        losses = losses + ce_weight * nll
        if grad is not None and grad_ce is not None:
            grad.add_(grad_ce, alpha=ce_weight)
    return _finish(student_logits, grad, losses, weights)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool = True) -> Tensor:
    """−log softmax(logits) at the labels: (T,), not weighted.

    logits (T, V) become d(Σ weights · losses)/d logits, in their own type, unless `gradient` is false; labels (T,)
    int64; weights (T,) float32.
    """
    losses, grad = _cross_entropy(_log_softmax(logits, 1.0), labels, weights, gradient, consume=True)
    return _finish(logits, grad, losses, weights)


def check_divergence(kind: str, temperature: float, labels: Tensor | None, ce_weight: float) -> None:
    """ValueError for what is no divergence, and for a cross entropy without labels."""
    if kind not in get_args(Divergence):
        raise ValueError(f"divergence {kind!r}: expected forward, reverse or jsd")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight needs labels: give them, or set ce_weight, which is {ce_weight}, to 0")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _cross_entropy(
    log_q: Tensor, labels: Tensor, weights: Tensor, gradient: bool, consume: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Losses (T,) and q − onehot(label), which takes the place of log q if that may be consumed."""
    at = labels.where(weights != 0, 0)[:, None]
    losses = -log_q.gather(1, at)[:, 0]
    if not gradient:
        return losses, None
    grad = log_q.exp_() if consume else log_q.exp()
    return losses, grad.scatter_add_(1, at, grad.new_full((1, 1), -1.0).expand_as(at))


def _finish(logits: Tensor, grad: Tensor | None, losses: Tensor, weights: Tensor) -> Tensor:
    unused = weights == 0
    if grad is not None:
        torch.mul(grad, weights[:, None], out=logits)
        logits[unused] = 0.0
    return losses.masked_fill(unused, 0.0)
