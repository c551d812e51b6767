"""Losses and their gradients against numbers made by hand and against float64 autograd over whole logits."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from corpora.preferences import PreferencePair, collate
from hybrid import load_pretrained
from steps import losses
from steps.losses import align_loss, ce_loss, dpo_loss, kl_loss, sequence_log_probability
from tests.hybrid import tiny_hybrid

B, L, D, V = 3, 7, 6, 11
KINDS = ("forward", "reverse", "jsd")
CHUNKS = (1, 4, 13, 512)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> SimpleNamespace:
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(9)) < 0.6
    mask[:, 0], mask[1, 3] = True, False
    assert mask.sum() not in (B * L, 4, 13)
    return SimpleNamespace(
        hidden=draw(B, L, D, seed=1),
        head=draw(V, D, seed=2),
        teacher=draw(B, L, 5, seed=3),
        teacher_head=draw(V, 5, seed=4),
        labels=torch.randint(V, (B, L), generator=torch.Generator().manual_seed(5)),
        mask=mask,
    )


@pytest.fixture(params=[True, False], ids=["left out", "weight 0"])
def left_out(request, monkeypatch) -> bool:
    """Tokens that do not count, as on a CPU and as on a GPU."""
    monkeypatch.setattr(losses, "_leaves_out", lambda device: request.param)
    return request.param


def exact_divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """By the definition, over probabilities, in float64."""
    q, p = (log_softmax(t.double() / temperature, -1).exp() for t in (student, teacher))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    middle = (p + q) / 2
    value = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, middle) + kl(q, middle)) / 2}[kind]
    return value * temperature**2


def compare(ours, exact, *leaves: Tensor, tolerance: float = 1e-5) -> None:
    """Value and gradients, scaled by an upstream factor, of ours on float32 leaves and of exact on float64 ones."""
    low = [t.clone().requires_grad_() for t in leaves]
    high = [t.double().requires_grad_() for t in leaves]
    value, wanted = ours(*low), exact(*high)
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad((1.7 * value).sum(), low), torch.autograd.grad((1.7 * wanted).sum(), high)
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert b.abs().max() > 0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# Alignment


def test_align_by_hand():
    target = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    assert align_loss(torch.zeros(1, 2, 2), target) == 1.0
    assert align_loss(target, target) == 0.0
    output = torch.tensor([[[3.0, 3.0], [2.0, 5.0]]])  # squared errors 1 and 4, energies 25 and 25
    assert align_loss(output, target) == pytest.approx(5 / 50)
    assert align_loss(output, target, torch.tensor([[True, False]])) == pytest.approx(1 / 25)
    assert align_loss(output, torch.zeros(1, 2, 2)).isfinite()


@pytest.mark.parametrize("masked", [False, True])
def test_align_gradient(batch, masked):
    mask = batch.mask if masked else None
    target = draw(B, L, D, seed=7)

    def exact(output):
        kept = torch.ones(B, L, 1) if mask is None else mask[..., None]
        return ((output - target) ** 2 * kept).sum() / (target.double() ** 2 * kept).sum()

    compare(lambda output: align_loss(output, target, mask), exact, batch.hidden)


# KL and cross entropy through the head


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("kind", "temperature", "ce_weight"), [("forward", 1, 0), ("reverse", 2, 0.3), ("jsd", 0.7, 1)]
)
def test_kl_loss(batch, kind, temperature, ce_weight, chunk, left_out):
    def ours(hidden, head):
        return kl_loss(
            hidden,
            head,
            batch.teacher,
            batch.teacher_head,
            batch.mask,
            kind,
            temperature,
            batch.labels,
            ce_weight,
            chunk,
        )

    def exact(hidden, head):
        student = (hidden @ head.T)[batch.mask]
        teacher = (batch.teacher.double() @ batch.teacher_head.double().T)[batch.mask]
        nll = -log_softmax(student, -1).gather(1, batch.labels[batch.mask][:, None])
        return exact_divergence(student, teacher, kind, temperature).mean() + ce_weight * nll.mean()

    compare(ours, exact, batch.hidden, batch.head, tolerance=3e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ce_loss(batch, chunk, left_out):
    def exact(hidden, head):
        return -log_softmax((hidden @ head.T)[batch.mask], -1).gather(1, batch.labels[batch.mask][:, None]).mean()

    compare(lambda h, w: ce_loss(h, w, batch.labels, batch.mask, chunk), exact, batch.hidden, batch.head)


def test_ce_by_hand():
    """Uniform over four tokens costs ln 4, whatever the masked positions hold."""
    hidden = torch.zeros(1, 3, 2)
    hidden[0, 2] = 100.0
    loss = ce_loss(hidden, torch.eye(4, 2), torch.tensor([[0, 3, 1]]), torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(math.log(4))


def test_a_tied_head_gets_both_gradients(batch):
    """The output head is the embedding that made the hidden states."""
    tokens = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(6))

    def ours(weight):
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
        return ce_loss(hidden, weight, batch.labels, batch.mask, 4)

    def exact(weight):
        logits = torch.tanh(weight[tokens]) @ weight.T
        return -log_softmax(logits[batch.mask], -1).gather(1, batch.labels[batch.mask][:, None]).mean()

    compare(ours, exact, batch.head)


def test_a_frozen_head_costs_no_gradient(batch, left_out):
    hidden = batch.hidden.requires_grad_()
    ce_loss(hidden, batch.head, batch.labels, batch.mask, 4).backward()
    assert batch.head.grad is None
    assert hidden.grad[batch.mask].abs().min() > 0
    assert hidden.grad[~batch.mask].abs().max() == 0
    frozen = batch.hidden.detach()
    head = batch.head.requires_grad_()
    ce_loss(frozen, head, batch.labels, batch.mask, 4).backward()
    assert head.grad.abs().max() > 0


def test_the_teacher_gets_no_gradient(batch):
    teacher, teacher_head = batch.teacher.requires_grad_(), batch.teacher_head.requires_grad_()
    kl_loss(batch.hidden.requires_grad_(), batch.head, teacher, teacher_head, batch.mask).backward()
    assert teacher.grad is None
    assert teacher_head.grad is None


def test_no_gradient_wanted(batch, monkeypatch):
    """Then none is computed."""

    def without_gradient(logits, labels, weights, gradient):
        assert not gradient
        return cross_entropy_(logits, labels, weights, gradient)

    cross_entropy_ = losses.cross_entropy_
    wanted = ce_loss(batch.hidden, batch.head, batch.labels, batch.mask)
    monkeypatch.setattr(losses, "cross_entropy_", without_gradient)
    with torch.no_grad():
        value = ce_loss(batch.hidden, batch.head.requires_grad_(), batch.labels, batch.mask)
    assert not value.requires_grad
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(batch, kind, left_out):
    """Numerical derivatives in float64, through chunks, masks and both uses of the student's logits."""
    hidden, head = (t.double().requires_grad_() for t in (batch.hidden[:2, :3], batch.head))
    teacher = batch.teacher[:2, :3].double(), batch.teacher_head.double()
    labels, mask = batch.labels[:2, :3], batch.mask[:2, :3].clone()
    mask[1, 1] = False

    def distilled(hidden, head):
        return kl_loss(hidden, head, *teacher, mask, kind, 1.7, labels, 0.4, chunk=2)

    def log_probability(hidden, head):
        return sequence_log_probability(hidden, head, labels, mask, chunk=2)

    assert torch.autograd.gradcheck(distilled, (hidden, head))
    assert torch.autograd.gradcheck(log_probability, (hidden, head))


def test_what_does_not_count_changes_nothing(batch, left_out):
    """Neither its hidden states nor its labels, which may be none."""

    def run(hidden, labels):
        hidden, head = hidden.clone().requires_grad_(), batch.head.clone().requires_grad_()
        value = kl_loss(hidden, head, batch.teacher, batch.teacher_head, batch.mask, labels=labels, ce_weight=1.0)
        value = value + sequence_log_probability(hidden, head, labels, batch.mask).sum()
        value.backward()
        return value.detach(), hidden.grad, head.grad

    other = torch.where(batch.mask[..., None], batch.hidden, 1e4)
    labels = torch.where(batch.mask, batch.labels, -100)
    for ours, wanted in zip(run(other, labels), run(batch.hidden, batch.labels), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_empty_masks_and_missing_labels_are_refused(batch):
    nothing = torch.zeros_like(batch.mask)
    with pytest.raises(ValueError, match="mask is empty"):
        ce_loss(batch.hidden, batch.head, batch.labels, nothing)
    with pytest.raises(ValueError, match="mask is empty"):
        kl_loss(batch.hidden, batch.head, batch.teacher, batch.teacher_head, nothing)
    with pytest.raises(ValueError, match="mask is empty"):
        sequence_log_probability(batch.hidden, batch.head, batch.labels, nothing)
    with pytest.raises(ValueError, match="ce_weight needs labels"):
        kl_loss(batch.hidden, batch.head, batch.teacher, batch.teacher_head, batch.mask, ce_weight=0.5)


def test_empty_masks_where_the_host_does_not_look(batch, monkeypatch):
    monkeypatch.setattr(losses, "_leaves_out", lambda device: False)
    nothing = torch.zeros_like(batch.mask)
    assert ce_loss(batch.hidden, batch.head, batch.labels, nothing).isnan()
    assert kl_loss(batch.hidden, batch.head, batch.teacher, batch.teacher_head, nothing).isnan()
    assert not sequence_log_probability(batch.hidden, batch.head, batch.labels, nothing).any()


# Sequences and preferences


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sequence_log_probability(batch, chunk, left_out):
    batch.mask[1] = False  # a row of which nothing counts

    def exact(hidden, head):
        picked = log_softmax(hidden @ head.T, -1).gather(2, batch.labels[..., None])[..., 0]
        return (picked * batch.mask).sum(1)

    def ours(hidden, head):
        value = sequence_log_probability(hidden, head, batch.labels, batch.mask, chunk)
        assert value[1] == 0
        return value * torch.tensor([1.0, 2.0, -3.0])  # rows must not be mixed up

    compare(ours, lambda *leaves: exact(*leaves) * torch.tensor([1.0, 2.0, -3.0]), batch.hidden, batch.head)


def test_dpo_by_hand():
    """Margins (−1 + 2) − (−4 + 3) = 2 and 0 at β = 1/2: −ln σ(1) and ln 2."""
    loss, margin = dpo_loss(*(torch.tensor(t) for t in ([-1.0, -5.0], [-4.0, -6.0], [-2.0, -5.0], [-3.0, -6.0])), 0.5)
    assert margin.tolist() == [2.0, 0.0]
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_dpo_gradient():
    """∂/∂log π(y_w) = −β σ(−β·margin) / pairs, and its opposite for y_l."""
    policy = [draw(4, seed=i).requires_grad_() for i in range(2)]
    reference = [draw(4, seed=i) for i in (2, 3)]
    loss, margin = dpo_loss(*policy, *reference, 0.3)
    chosen, rejected = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(chosen, -0.3 * torch.sigmoid(-0.3 * margin) / 4)
    torch.testing.assert_close(rejected, -chosen)
    assert not margin.requires_grad


def test_dpo_is_trls(tmp_path):
    """Their loss with their own masks and log-probabilities, on transformers' Llama; ours on the same weights."""
    from transformers import LlamaForCausalLM
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    for name, seed in (("policy", 1), ("reference", 2)):
        torch.manual_seed(seed)
        theirs = tiny_hybrid.llama(tmp_path / name)
        with torch.no_grad():
            theirs.model.norm.weight.copy_(1 + 0.2 * draw(48, seed=seed))
        theirs.save_pretrained(tmp_path / name)
    pairs = [
        PreferencePair((5, 6, 7), (8, 9, 10, 11), (12,), "a"),
        PreferencePair((20, 21), (22, 23), (24, 25, 26), "b"),
        PreferencePair((30,), (31,), (32, 33), "c"),
    ]
    batch = collate(pairs, pad_id=0)

    policy, reference = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "reference"))
    add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(reference)
    accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        beta=0.2,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss_mask = torch.from_numpy(batch.loss_mask)
    # theirs marks the reply's tokens, ours the positions that predict them
    completion = torch.cat([torch.zeros(6, 1), loss_mask[:, :-1]], dim=1).long()
    inputs = {
        "input_ids": torch.from_numpy(batch.tokens),
        "attention_mask": 1 - torch.from_numpy(batch.seq_idx).long(),
        "completion_mask": completion,
    }
    wanted = DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    wanted.backward()

    ours = load_pretrained(tmp_path / "policy").requires_grad_()
    other = load_pretrained(tmp_path / "reference")
    arrays = [torch.from_numpy(a) for a in (batch.tokens, batch.seq_idx, batch.targets)]
    chosen, rejected, ref_chosen, ref_rejected = (
        half
        for model in (ours, other)
        for half in sequence_log_probability(
            model.hidden(*arrays[:2]), model.lm_head_weight, arrays[2], loss_mask, 3
        ).chunk(2)
    )
    loss, margin = dpo_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), 0.2)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert abs(loss.item() - math.log(2)) > 0.01, "the models differ"
    assert 0.2 * margin.mean().item() == pytest.approx(trainer._metrics["eval"]["rewards/margins"][0], rel=1e-4)
    gradients = dict(ours.named_parameters())
    for name, p in policy.named_parameters():
        if name in gradients:
            scale = p.grad.abs().max().item()
            torch.testing.assert_close(gradients[name].grad, p.grad, rtol=1e-3, atol=1e-4 * scale)


# Half precision


@pytest.mark.parametrize("which", ["kl", "ce", "log-probability", "align"])
def test_autocast(batch, which, left_out):
    """Products in bfloat16, losses and gradients of float32 leaves near the exact ones."""

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        if which == "kl":
            teacher = batch.teacher, batch.teacher_head
            return kl_loss(hidden, head, *teacher, batch.mask, labels=batch.labels, ce_weight=1.0, chunk=4)
        if which == "ce":
            return ce_loss(hidden, head, batch.labels, batch.mask, 4)
        if which == "log-probability":
            return sequence_log_probability(hidden, head, batch.labels, batch.mask, 4).mean()
        return align_loss(hidden @ head.T, torch.ones(B, L, V))

    def run(autocast: bool) -> list[Tensor]:
        hidden, head = batch.hidden.clone().requires_grad_(), batch.head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(hidden, head)
        value.backward()
        assert value.dtype == hidden.grad.dtype == head.grad.dtype == torch.float32
        return [value.detach(), hidden.grad, head.grad]

    for low, exact in zip(run(True), run(False), strict=True):
        assert not torch.equal(low, exact)
        assert (low - exact).norm() / exact.norm() < 2e-2


def test_the_heads_gradient_is_summed_in_float32():
    """Over 2048 chunks, at no more than the rounding of each product."""
    hidden, labels, mask = draw(1, 2048, 4), torch.zeros(1, 2048, dtype=torch.long), torch.ones(1, 2048, dtype=bool)

    def gradient(chunk: int) -> Tensor:
        head = draw(3, 4, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            ce_loss(hidden, head, labels, mask, chunk).backward()
        return head.grad

    one, many = gradient(2048), gradient(1)
    assert (many - one).norm() / one.norm() < 5e-3


def test_half_precision_teacher_beside_a_float32_student(batch):
    low = [t.bfloat16() for t in (batch.teacher, batch.teacher_head)]
    value = kl_loss(batch.hidden, batch.head, *low, batch.mask)
    exact = kl_loss(batch.hidden, batch.head, batch.teacher, batch.teacher_head, batch.mask)
    assert value.item() == pytest.approx(exact.item(), rel=0.05)


# On a GPU


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_without_waiting_for_it():
    """KL, CE and log-probabilities with a vocabulary of 49152 against float64; the host never waits."""
    tokens, width, vocabulary = (2, 300), 576, 49152
    hidden, taught = (draw(*tokens, width, seed=seed).cuda() for seed in (1, 2))
    taught = (hidden + 0.3 * taught).bfloat16()
    head = (0.05 * draw(vocabulary, width, seed=3)).cuda()
    labels = torch.randint(vocabulary, tokens, generator=torch.Generator().manual_seed(4)).cuda()
    mask = (torch.rand(tokens, generator=torch.Generator().manual_seed(5)) < 0.6).cuda()

    def ours(hidden, head):
        with torch.autocast("cuda", torch.bfloat16):
            return (
                kl_loss(hidden, head, taught, head.detach().bfloat16(), mask, labels=labels, ce_weight=0.1, chunk=256)
                + ce_loss(hidden, head, labels, mask, 256)
                - sequence_log_probability(hidden, head, labels, mask, 256).sum() / 300
            )

    def exact(hidden, head):
        student, teacher = hidden @ head.T, taught.double() @ head.detach().bfloat16().double().T
        nll = -log_softmax(student, -1).gather(2, labels[..., None])[..., 0]
        kl = exact_divergence(student, teacher, "forward", 1.0)
        return ((kl + 1.1 * nll) * mask).sum() / mask.sum() + (nll * mask).sum() / 300

    low, high = (
        [t.clone().to(dtype).requires_grad_() for t in (hidden, head)] for dtype in (torch.float32, torch.float64)
    )
    ours(*low).backward()  # compiles
    for leaf in low:
        leaf.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = ours(*low)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = exact(*high)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-2)
    for a, b in zip(low, high, strict=True):
        assert (a.grad - b.grad).norm() / b.grad.norm() < 2e-2


@pytest.mark.gpu
def test_memory_of_a_step():
    """16384 tokens, 49152 words: less than 2 GB beyond what goes in and comes out."""
    hidden = torch.randn(32, 512, 576, device="cuda", requires_grad=True)
    head = torch.randn(49152, 576, device="cuda").mul_(0.05).requires_grad_()
    mask = torch.ones(32, 512, dtype=torch.bool, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = kl_loss(hidden, head, hidden.detach().bfloat16(), head.detach().bfloat16(), mask)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2e9
