"""The Triton scan and its gradients against the recurrence written token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels_ext.ssd.reference import ssd_sequential
from tests.kernels_ext.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = interpreted("kernels_ext.ssd.scan_kernel")
TOLERANCE = 1e-4 if DEVICE == "cpu" else 1e-3  # tensor cores multiply float32 as three products of TensorFloat-32


@pytest.fixture(autouse=True)
def poisoned(nan_filled):
    """What a kernel forgets to write is NaN."""


def problem(
    length: int,
    heads: int,
    groups: int,
    headdim: int,
    d_state: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> dict[str, Tensor]:
    """x, B and C are slices of one tensor of that type, as a convolution gives them, dt is a view, the rest float32."""
    random = torch.Generator().manual_seed(length + heads)
    widths = groups * headdim, groups * d_state, heads * d_state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device)

    x, B, C = normal(batch, length, sum(widths)).to(dtype).split(widths, dim=-1)
    return {
        "x": x.unflatten(-1, (groups, headdim)),
        "dt": torch.nn.functional.softplus(normal(batch, heads, length) - 1).transpose(1, 2),
        "A": -torch.exp(normal(heads)),
        "B": B.unflatten(-1, (groups, d_state)),
        "C": C.unflatten(-1, (heads, d_state)),
        "D": normal(heads),
        "initial_state": normal(batch, heads, headdim, d_state),
    }


def documents(length: int, *boundaries: tuple[int, ...]) -> Tensor:
    """(B, L) document numbers from 3 on; row b changes document at each of boundaries[b]."""
    seq_idx = torch.full((len(boundaries), length), 3, dtype=torch.int32)
    for row, changes in enumerate(boundaries):
        for change in changes:
            seq_idx[row, change:] += 1
    return seq_idx.to(DEVICE)


def outputs_and_gradients(
    scan, arguments: dict[str, Tensor | None], dtype: torch.dtype | None = None, final: bool = True
) -> dict[str, Tensor]:
    """y, final state and the gradients of a fixed random functional of both, or of y alone, in float64."""
    given, leaves = {}, {}
    for name, t in arguments.items():
        if t is not None and t.is_floating_point():
            t = t.detach().to(dtype or t.dtype).requires_grad_()
            leaves[name] = t
        given[name] = t
    y, state = scan(**given)
    random = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    for t in (y, state) if final else (y,):
        loss = loss + (t.double() * torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    both = {"y": y, "final_state": state, **dict(zip(leaves, gradients, strict=True))}
    return {name: t.detach().double() for name, t in both.items()}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the size of each result, or to one where it should vanish."""
    assert ours.keys() == exact.keys()
    sizes = {name: t.norm() if t.any() else torch.ones(()) for name, t in exact.items()}
    return {name: ((ours[name] - t).norm() / sizes[name]).item() for name, t in exact.items()}


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    found = errors(ours, exact)
    assert all(error < tolerance for error in found.values()), found


def assert_exact(arguments: dict[str, Tensor | None], final: bool = True) -> None:
    ours = outputs_and_gradients(kernel.ssd_scan, arguments, final=final)
    assert_close(ours, outputs_and_gradients(ssd_sequential, arguments, torch.float64, final))


@pytest.mark.parametrize(
    "length, heads, groups, headdim, d_state",
    [(1, 2, 1, 16, 16), (37, 4, 2, 32, 16), (64, 3, 3, 16, 16), (130, 4, 2, 16, 32)],
)
def test_the_recurrence(length, heads, groups, headdim, d_state):
    assert_exact(problem(length, heads, groups, headdim, d_state))


def test_without_what_is_optional():
    assert_exact({**problem(70, 2, 1, 16, 16), "initial_state": None, "D": None}, final=False)


@pytest.mark.parametrize(
    "boundaries",
    [((20,), (100,)), ((64,), (128,)), ((63, 64, 65), (1,)), ((64, 128), (129,)), ((), (5, 6, 7, 70, 127))],
    ids=["inside", "on an edge", "beside an edge", "every edge", "many"],
)
def test_documents_do_not_leak(boundaries):
    arguments = {**problem(130, 2, 1, 16, 16), "seq_idx": documents(130, *boundaries)}
    assert_exact(arguments)
    y, _ = kernel.ssd_scan(**arguments)
    others = {name: arguments[name].clone() for name in ("x", "B", "C")}
    for row, changes in enumerate(boundaries):
        for t in others.values():
            t[row, : max(changes, default=0)] += 0.5
    other, _ = kernel.ssd_scan(**{**arguments, **others})
    for row, changes in enumerate(boundaries):
        last = max(changes, default=0)
        assert torch.equal(other[row, last:], y[row, last:]), "another past gives the same bits"


def test_dt_zero_leaves_the_state():
    """At some tokens, and at all."""
    arguments = problem(70, 2, 1, 16, 16)
    arguments["dt"][:, 10:66] = 0.0
    assert_exact(arguments)
    arguments["dt"].zero_()
    assert_exact(arguments)
    _, state = kernel.ssd_scan(**arguments)
    assert torch.equal(state, arguments["initial_state"])


def test_strong_decays():
    """dt·A down to −20 a token, −1280 a chunk, among tokens that hardly decay."""
    arguments = problem(130, 2, 1, 16, 16)
    arguments["A"] = torch.tensor([-20.0, -2.0], device=DEVICE)
    arguments["dt"] = torch.ones(2, 130, 2, device=DEVICE)
    assert_exact(arguments)
    arguments["dt"][:, ::3] = 1e-3
    assert_exact(arguments)


def test_two_halves_are_the_whole():
    """From the first half's final state, gradients flowing back through it."""
    arguments = problem(100, 2, 1, 16, 16)

    def halves(x, dt, A, B, C, D, initial_state):
        ys, state = [], initial_state
        for part in (slice(37), slice(37, None)):
            y, state = kernel.ssd_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    exact = outputs_and_gradients(ssd_sequential, arguments, torch.float64)
    assert_close(outputs_and_gradients(halves, arguments), exact)


def test_any_strides():
    """Last dimensions that are not contiguous, a broadcast ∂y, A and D."""
    arguments = problem(40, 2, 1, 16, 16)
    for name in ("x", "B", "C", "initial_state"):
        arguments[name] = arguments[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    arguments["A"], arguments["D"] = (torch.full((1,), v, device=DEVICE).expand(2) for v in (-0.5, 0.3))
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    kernel.ssd_scan(**leaves)[0].sum().backward()
    exact = {name: t.detach().double().requires_grad_() for name, t in arguments.items()}
    ssd_sequential(**exact)[0].sum().backward()
    assert_close({n: t.grad.double() for n, t in leaves.items()}, {n: t.grad for n, t in exact.items()})


def test_only_the_final_state_is_used():
    arguments = problem(70, 2, 1, 16, 16)

    def state_alone(scan, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in arguments.items()}
        loss = scan(**leaves)[1].square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return {name: t.double() for name, t in zip(leaves, gradients, strict=True)}

    assert_close(state_alone(kernel.ssd_scan, torch.float32), state_alone(ssd_sequential, torch.float64))


def test_half_precision_keeps_the_state_in_float32():
    arguments = problem(70, 2, 1, 16, 16, dtype=torch.bfloat16)
    exact = outputs_and_gradients(ssd_sequential, arguments, torch.float64)
    assert_close(outputs_and_gradients(kernel.ssd_scan, arguments), exact, tolerance=1.5e-2)
    y, state = kernel.ssd_scan(**arguments)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("optional", [True, False])
def test_the_operator_is_registered_rightly(optional):
    """Shapes, strides and types without data, no hidden mutation or aliasing, gradients under torch.compile."""
    arguments = problem(37, 2, 1, 16, 16)
    tensors = [arguments[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")]
    if optional:
        rest = arguments["D"].requires_grad_(), documents(37, (5,), (36,)), arguments["initial_state"].requires_grad_()
    else:
        rest = None, None, None
    torch.library.opcheck(torch.ops.mamballama.ssd_scan, (*tensors, *rest))


def test_what_fits():
    def fits(headdim: int, d_state: int, heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> bool:
        x, B, C = torch.empty(1, 5, 2, headdim), torch.empty(1, 5, 2, d_state), torch.empty(1, 5, heads, d_state)
        return kernel.fits(x.to(dtype), B.to(dtype), C.to(dtype))

    assert fits(64, 64) and fits(16, 128) and fits(128, 128) and fits(64, 64, dtype=torch.float32)
    assert not fits(80, 64) and not fits(64, 256) and not fits(8, 64)
    assert not fits(64, 64, heads=3)
    assert not fits(64, 128, dtype=torch.float32) and not fits(64, 64, dtype=torch.float16)
    x, B = torch.empty(1, 5, 2, 16), torch.empty(1, 5, 2, 16)
    assert not kernel.fits(x, B, B.bfloat16())
    arguments = problem(5, 2, 1, 16, 16) | {"x": torch.zeros(2, 5, 1, 24, device=DEVICE)}
    with pytest.raises(ValueError, match=r"x \(2, 5, 1, 24\) torch.float32.*call ssd_chunked for others"):
        kernel.ssd_scan(**arguments)


def test_small_batches_have_smaller_tiles():
    rows = [kernel.launch_config("states", batch, 9, 64, 64, 2)["BLOCK_P"] for batch in (1, 8, 64)]
    assert rows == sorted(rows) and rows[0] < rows[-1]
    assert all(size >= 16 and size.bit_count() == 1 for size in rows)
    assert kernel.launch_config("states", 64, 32, 128, 128, 2)["BLOCK_P"] <= 64


class Mixing(nn.Module):
    """What is around the scan in a mixer: slices of one tensor go in, and only y is used."""

    def __init__(self, scan, heads: int, groups: int, headdim: int, d_state: int) -> None:
        super().__init__()
        self.scan, self.shapes = scan, ((groups, headdim), (groups, d_state), (heads, d_state))
        self.A_log = nn.Parameter(torch.rand(heads))
        self.D = nn.Parameter(torch.ones(heads))

    def forward(self, inputs: Tensor, dt: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        parts = torch.sin(inputs).split([a * b for a, b in self.shapes], dim=-1)
        x, B, C = (part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True))
        y, _ = self.scan(x, torch.nn.functional.softplus(dt), -torch.exp(self.A_log), B, C, self.D, seq_idx)
        return y.flatten(-2) * 2


def compiled_like_eager(mixing: Mixing, inputs: Tensor, dt: Tensor, seq_idx: Tensor, backend: str) -> list[float]:
    """Relative differences of the outputs and gradients of a module and of its compiled form."""
    results = []
    for module in (torch.compile(mixing, fullgraph=True, dynamic=False, backend=backend), mixing):
        leaves = inputs.detach().requires_grad_(), dt.detach().requires_grad_()
        y = module(*leaves, seq_idx)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [*leaves, *mixing.parameters()])])
    return [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results, strict=True)]


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    mixing = Mixing(kernel.ssd_scan, 4, 2, 16, 16).to(DEVICE)
    inputs, dt = torch.randn(2, 37, 128, device=DEVICE), torch.randn(2, 37, 4, device=DEVICE)
    found = compiled_like_eager(mixing, inputs, dt, documents(37, (5,), (20,)), backend="aot_eager")
    assert all(difference < 1e-6 for difference in found), found


REAL = [(32, 512, 9, 3, 64, 64), (1, 4096, 32, 8, 64, 64), (1, 1000, 32, 8, 128, 128)]  # B, L, H, G, P, N


def real_problem(batch: int, length: int, heads: int, groups: int, headdim: int, d_state: int) -> dict[str, Tensor]:
    arguments = problem(length, heads, groups, headdim, d_state, batch, torch.bfloat16)
    del arguments["initial_state"]
    edges = [tuple(range(97 + row, length, 301)) for row in range(batch)]
    return {**arguments, "seq_idx": documents(length, *edges)}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes_in_half_precision(shape):
    arguments = real_problem(*shape)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in arguments.items()}
    ours = outputs_and_gradients(kernel.ssd_scan, arguments, final=False)
    assert_close(ours, outputs_and_gradients(in_float64, exact, final=False), tolerance=1.5e-2)


def in_float64(x, dt, A, B, C, D, seq_idx):
    """The recurrence in float64 by one chunk a step: a loop over tokens would take minutes."""
    ratio, (batch, length, _, headdim) = C.shape[2] // x.shape[2], x.shape
    x, B = (t.repeat_interleave(ratio, dim=2) for t in (x, B))
    state = x.new_zeros(batch, C.shape[2], headdim, B.shape[-1])
    previous, ys = seq_idx[:, 0], []
    for first in range(0, length, 128):
        part = slice(first, first + 128)
        document, now = seq_idx[:, part], dt[:, part]
        log_decay = torch.cumsum(now * A, dim=1)  # (B, Q, H)
        same = (document[:, :, None] == document[:, None, :]).tril()[..., None]  # (B, Q, Q, 1)
        span = (log_decay[:, :, None] - log_decay[:, None, :]).masked_fill(~same, float("-inf"))
        weights = torch.einsum("bthn,bshn->btsh", C[:, part], B[:, part]) * torch.exp(span) * now[:, None]
        entering = torch.exp(log_decay) * (document == previous[:, None])[..., None]
        y = torch.einsum("btsh,bshp->bthp", weights, x[:, part])
        ys.append(y + torch.einsum("bhpn,bthn,bth->bthp", state, C[:, part], entering) + D[:, None] * x[:, part])
        previous = document[:, -1]
        leaving = torch.exp(log_decay[:, -1:] - log_decay) * (document == previous[:, None])[..., None] * now
        added = torch.einsum("bsh,bshp,bshn->bhpn", leaving, x[:, part], B[:, part])
        state = state * entering[:, -1, :, None, None] + added
    return torch.cat(ys, dim=1), state


def test_the_float64_form_is_the_recurrence():
    """The measure of the GPU test below is itself measured."""
    arguments = problem(300, 4, 2, 8, 8, device="cpu")
    del arguments["initial_state"]
    arguments["seq_idx"] = documents(300, (128, 200), (1,)).cpu()
    exact = outputs_and_gradients(ssd_sequential, arguments, torch.float64)
    assert_close(outputs_and_gradients(in_float64, arguments, torch.float64), exact, tolerance=1e-10)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    arguments = real_problem(*REAL[0])
    first, second = (outputs_and_gradients(kernel.ssd_scan, arguments) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.gpu
def test_like_mamba_ssm():
    pytest.importorskip("mamba_ssm")
    from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm

    arguments = real_problem(4, 512, 9, 3, 64, 64)
    ours, theirs = (outputs_and_gradients(scan, arguments, final=False) for scan in (kernel.ssd_scan, ssd_mamba_ssm))
    assert_close(ours, theirs, tolerance=2e-2)


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    torch.manual_seed(0)
    mixing = Mixing(kernel.ssd_scan, 9, 3, 64, 64).cuda()
    inputs = torch.randn(2, 512, 960, device="cuda", dtype=torch.bfloat16)
    dt = torch.randn(2, 512, 9, device="cuda")
    found = compiled_like_eager(mixing, inputs, dt, documents(512, (100,), (64, 300)), backend="inductor")
    assert all(difference < 2e-2 for difference in found), found


@pytest.mark.gpu
def test_memory_of_training_is_what_goes_in_and_out():
    """No state and nothing repeated outlives the forward pass."""
    arguments = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in real_problem(*REAL[0]).items()}
    before = torch.cuda.memory_allocated()
    y, state = kernel.ssd_scan(**arguments)
    assert torch.cuda.memory_allocated() - before <= 1.05 * (y.nbytes + state.nbytes)
