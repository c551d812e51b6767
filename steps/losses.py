"""Losses as plain functions. Every reduction is a mean over the tokens (or pairs) that count; KL and CE are in nats.

Divergences and cross entropy work on hidden states and the output head, chunk by chunk: of the logits (T, V) only
`chunk` rows exist at a time, in the type of the products, and `kernels_ext.vocabulary_loss` turns them into their own
gradient in place. That becomes the gradient of the hidden states (and of the head) at once, so nothing of size T·V is
ever kept, in any precision.

Which tokens count is never asked of a GPU by the host: there all tokens go through the head, and those that do not
count weigh 0; their hidden states must be finite. On a CPU they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels_ext.dispatch import cross_entropy_, divergence_
from kernels_ext.vocabulary_loss.reference import Divergence, check_divergence

ChunkLoss = Callable[[Tensor, slice, bool], Tensor]
"""(logits of some tokens, which tokens, whether the logits are to become their gradient) → losses of the tokens."""


def align_loss(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖output − target‖² / ‖target‖² over all tokens of mask (B, L) and channels; 1.0 is what a zero output scores.

    output, target (B, L, d_model). The relative error makes layers of different scale count alike.
    """
    difference, energy = (output.float() - target.float()).pow(2), target.float().pow(2)
    if mask is not None:
        difference, energy = difference * mask[..., None], energy * mask[..., None]
    return difference.sum() / energy.sum().clamp(min=1e-12)


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

    Hidden states (B, L, d), heads (V, d); the divergence is that of `kernels_ext.vocabulary_loss.reference`, times τ².
    Where no token counts it raises ValueError on a CPU and is NaN on a GPU.
    """
    check_divergence(kind, temperature, labels, ce_weight)
    compute = _compute_type(teacher_hidden)
    weight = teacher_head.detach().to(compute)
    chunk = chunk or chunk_rows(mask.device)
    buffer = weight.new_empty(min(chunk, mask.numel()), len(weight))

    def loss(logits: Tensor, weights: Tensor, values: Sequence[Tensor], gradient: bool) -> Tensor:
        taught, *wanted = values
        teacher_logits = torch.mm(taught.to(compute), weight.T, out=buffer[: len(logits)])
        chosen = wanted[0] if wanted else None
        return divergence_(logits, teacher_logits, weights, kind, temperature, chosen, ce_weight, gradient)

    values = [teacher_hidden.detach()] + ([] if labels is None else [labels])
    return head_loss(student_hidden, student_head, mask, values, loss, chunk)


def ce_loss(hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, chunk: int | None = None) -> Tensor:
    """Mean cross entropy over the tokens of mask (B, L); labels (B, L) are already the next tokens.

    Where no token counts it raises ValueError on a CPU and is NaN on a GPU.
    """

    def loss(logits: Tensor, weights: Tensor, values: Sequence[Tensor], gradient: bool) -> Tensor:
        return cross_entropy_(logits, values[0], weights, gradient)

    return head_loss(hidden, head, mask, [labels], loss, chunk)


def head_loss(
    hidden: Tensor,
    head: Tensor,
    mask: Tensor,
    values: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor, Sequence[Tensor], bool], Tensor],
    chunk: int | None = None,
) -> Tensor:
    """Mean over the tokens of mask (B, L) of a loss of the logits hidden (B, L, d) · head (V, d)ᵀ.

    loss(logits (T, V), weights (T,), values, gradient) → (T,), not weighted, of some tokens; `values` are what it gets
    of each of (B, L, …). Unless `gradient` is false the logits become d(Σ weights · losses)/d logits; a token of weight
    0 has loss 0 and gradient 0. Where no token counts it raises ValueError on a CPU and is NaN on a GPU.
    """
    counted, hidden, *flat = _counted(mask, hidden, *values)
    weights = counted.float() / counted.sum()

    def chunk_loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        return loss(logits, weights[rows], [value[rows] for value in flat], gradient)

    chunk = chunk or chunk_rows(hidden.device)
    return _HeadLoss.apply(hidden, head, weights, chunk_loss, chunk, torch.is_grad_enabled())


def sequence_log_probability(
    hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, chunk: int | None = None
) -> Tensor:
    """Σ over the tokens of mask (B, L) of log p(label), row by row: (B,). Logits are recomputed in the backward pass.

    Where no token counts it raises ValueError on a CPU and is 0 on a GPU.
    """
    counted, hidden, labels = _counted(mask, hidden, labels)
    values = _LogProbability.apply(hidden, head, labels, counted.float(), chunk or chunk_rows(hidden.device))
    if len(values) < mask.numel():
        values = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return values.view(mask.shape).sum(1)


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


def _counted(mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """mask (B, L) and values (B, L, …) of the tokens that go through the head, flat: (T,), (T, …)."""
    if not _leaves_out(mask.device):
        return mask.flatten(), *(v.flatten(0, 1) for v in values)
    if not mask.any():
        raise ValueError("no token of the batch counts: the mask is empty")
    return mask[mask], *(v[mask] for v in values)


def _leaves_out(device: torch.device) -> bool:
    """Whether only tokens that count go through the head: choosing them makes the host wait for the device."""
    return device.type == "cpu"


def _compute_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _through_head(
    hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, chunk: int, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (T,) of the logits hidden (T, d) · weight (V, d)ᵀ, both of one type, and what gradients are wanted.

    That of the hidden states is of their type, that of the weight, a sum over chunks, at least float32; autograd casts
    them to the types of the tensors that they belong to.
    """
    total = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=total) if wants_weight else None
    buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
    losses = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows]
        logits = torch.mm(part, weight.T, out=buffer[: len(part)])
        losses.append(chunk_loss(logits, rows, wants_hidden or wants_weight))
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _add_product(grad_weight, logits.T, part)
    return torch.cat(losses), grad_hidden, grad_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, where total may be of a wider type than both."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.__version__ >= "2.10":  # before, total had to be of the factors' type
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _HeadLoss(torch.autograd.Function):
    """Σ weights · losses through a linear head, with gradients taken in the forward pass, so that a chunk's logits die
    with the chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, weights: Tensor, chunk_loss: ChunkLoss, chunk: int, gradient: bool
    ) -> Tensor:
        compute = _compute_type(hidden)
        wants_hidden, wants_head = (wanted and gradient for wanted in ctx.needs_input_grad[:2])
        losses, *ctx.grads = _through_head(
            hidden.to(compute), head.to(compute), chunk_loss, chunk, wants_hidden, wants_head
        )
        return torch.dot(losses, weights.to(losses.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = (None if grad is None else grad * grad_output for grad in ctx.grads)
        return grad_hidden, grad_head, None, None, None, None


class _LogProbability(torch.autograd.Function):
    """log p(label) of each token, and 0 where counted (T,), of zeros and ones, is 0: (T,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, counted: Tensor, chunk: int) -> Tensor:
        ctx.compute, ctx.chunk = _compute_type(hidden), chunk
        ctx.save_for_backward(hidden, head, labels, counted)
        return -_LogProbability._walk(ctx, hidden, head, labels, counted, False, False)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels, counted = ctx.saved_tensors
        _, grad_hidden, grad_head = _LogProbability._walk(
            ctx, hidden, head, labels, -grad_output * counted, *ctx.needs_input_grad[:2]
        )
        return grad_hidden, grad_head, None, None, None

    @staticmethod
    def _walk(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, *wants: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def chunk_loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
            return cross_entropy_(logits, labels[rows], weights[rows], gradient)

        return _through_head(hidden.to(ctx.compute), head.to(ctx.compute), chunk_loss, ctx.chunk, *wants)
