"""Losses as plain functions. Every reduction is a mean over the tokens (or pairs) that count; KL and CE are in nats.

Divergences and cross entropy work on hidden states and the output head, chunk by chunk: of the logits (T, V) only
`chunk` rows exist at a time, and their gradient is turned into that of the hidden states (and of the head) at once, so
nothing of size T·V is ever kept, in any precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, logsigmoid
from torch.utils.checkpoint import checkpoint

Divergence = Literal["forward", "reverse", "jsd"]


def align_loss(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖output − target‖² / ‖target‖² over all tokens of mask (B, L) and channels; 1.0 is what a zero output scores.

    output, target (B, L, d_model). The relative error makes layers of different scale count alike.
    """
    difference, energy = (output.float() - target.float()).pow(2), target.float().pow(2)
    if mask is not None:
        difference, energy = difference * mask[..., None], energy * mask[..., None]
    return difference.sum() / energy.sum().clamp(min=1e-12)


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: Divergence = "forward", temperature: float = 1.0
) -> Tensor:
    """Per-token divergence (T,) between softmax(teacher / τ) = p and softmax(student / τ) = q, times τ².

    forward Σ p log(p/q), reverse Σ q log(q/p), jsd ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2. The factor τ² keeps
    gradients of one size (Hinton et al. 2015 §2). Logits (T, V) in float32.
    """
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    if kind == "forward":
        value = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    elif kind == "reverse":
        value = kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=log_p.device))
        value = 0.5 * (
            kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
            + kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
        )
    else:
        raise ValueError(f"divergence {kind!r}: expected forward, reverse or jsd")
    return value * temperature**2


def kl_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean over the tokens of mask (B, L) of the divergence, plus ce_weight times the cross entropy on labels (B, L).

    Hidden states (B, L, d), heads (V, d).
    """
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
    taught = teacher_hidden[mask]
    wanted = labels[mask] if labels is not None else None
    head = teacher_head.to(_compute_type(teacher_hidden))

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits = linear(taught[rows].to(head.dtype), head).float()
        if kind == "forward":
            loss = _ForwardKL.apply(logits, teacher_logits, temperature)
        else:
            loss = divergence(logits, teacher_logits, kind, temperature).sum()
        if ce_weight and wanted is not None:
            loss = loss + ce_weight * torch.nn.functional.cross_entropy(logits, wanted[rows], reduction="sum")
        return loss

    return _head_loss(student_hidden[mask], student_head, chunk_loss, chunk)


def ce_loss(hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, chunk: int | None = None) -> Tensor:
    """Mean cross entropy over the tokens of mask (B, L); labels (B, L) are already the next tokens."""
    wanted = labels[mask]

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, wanted[rows], reduction="sum")

    return _head_loss(hidden[mask], head, chunk_loss, chunk)


def sequence_log_probability(
    hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, chunk: int | None = None
) -> Tensor:
    """Σ over the tokens of mask of log p(label), row by row: (B,). Logits are recomputed in the backward pass."""
    flat, wanted = hidden[mask], labels[mask]
    _check_some(flat)
    head = head.to(_compute_type(hidden))
    chunk = chunk or chunk_rows(hidden.device)

    def rows_log_probability(part: Tensor, part_labels: Tensor, weight: Tensor) -> Tensor:
        logits = linear(part.to(weight.dtype), weight).float()
        return -torch.nn.functional.cross_entropy(logits, part_labels, reduction="none")

    parts = [
        checkpoint(rows_log_probability, flat[i : i + chunk], wanted[i : i + chunk], head, use_reentrant=False)
        for i in range(0, len(flat), chunk)
    ]
    row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    return torch.zeros(len(mask), device=hidden.device).index_add(0, row, torch.cat(parts))


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """−log σ(β·margin), mean over pairs (2305.18290 eq. 7; 2408.15237 eq. 4), and the margins (B,), detached.

    margin = (log π(y_w) − log ref(y_w)) − (log π(y_l) − log ref(y_l));
    every argument (B,) is a sequence log-probability.
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean(), margin.detach()


def chunk_rows(device: torch.device) -> int:
    """Tokens whose logits exist at a time: a GPU wants large products, a CPU buffers that its allocator can reuse."""
    return 4096 if device.type == "cuda" else 128


def _head_loss(
    hidden: Tensor, head: Tensor, chunk_loss: Callable[[Tensor, slice], Tensor], chunk: int | None
) -> Tensor:
    """Σ chunk_loss(logits of the rows) / T for hidden (T, d); chunk_loss returns a sum over its rows."""
    _check_some(hidden)
    return _ChunkedHead.apply(hidden, head, chunk_loss, chunk or chunk_rows(hidden.device))


def _check_some(tokens: Tensor) -> None:
    if not len(tokens):
        raise ValueError("no token of the batch counts: the mask is empty")


def _compute_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _ForwardKL(torch.autograd.Function):
    """Σ over tokens of `divergence(…, "forward")` with its gradient τ·(q − p) written down, in half the passes over the
    logits that automatic differentiation takes. Consumes the teacher's logits."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        if temperature != 1.0:
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        log_q = torch.log_softmax(student_logits, dim=-1)
        log_p = torch.log_softmax(teacher_logits, dim=-1)
        p = log_p.exp()
        value = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        ctx.gradient = log_q.exp_().sub_(p)
        ctx.temperature = temperature
        return value * temperature**2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient.mul_(grad_output * ctx.temperature), None, None


class _ChunkedHead(torch.autograd.Function):
    """Linear head and loss with gradients taken in the forward pass, so that a chunk's logits die with the chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, chunk_loss: Callable[[Tensor, slice], Tensor], chunk: int
    ) -> Tensor:
        compute = _compute_type(hidden)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        weight = head.detach().to(compute)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if wants_head else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().to(compute)
            logits = linear(part, weight).float().requires_grad_(wants_hidden or wants_head)
            with torch.enable_grad():
                loss = chunk_loss(logits, rows)
            total += loss.detach()
            if wants_hidden or wants_head:
                grad = torch.autograd.grad(loss, logits, torch.full_like(loss, 1 / len(hidden)))[0].to(compute)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ weight).to(hidden.dtype)
                if grad_head is not None:
                    grad_head += grad.T @ part
        ctx.grads = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_head = ctx.grads
        scale = grad_output
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale,
            None,
            None,
        )
