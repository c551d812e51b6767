"""Mamba-1's scan and its decoding operators, in plain PyTorch and as kernels, against the recurrence in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_ext.selective_scan import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.selective_scan.kernel")
pytestmark = pytest.mark.usefixtures("nan_filled")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
STORED_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SHAPES = {  # (H, G, P, N)
    "grouped": (4, 2, 8, 4),
    "one group": (3, 1, 12, 4),
    "no groups": (4, 4, 8, 8),
    "odd": (6, 2, 6, 3),
}


class Operators:
    """One implementation; a program of a kernel takes eight channels, so that at least four share each input."""

    def __init__(self, module, **config):
        for name in ("update", "verify", "fold", "ring_append"):
            setattr(self, name, self._with(getattr(module, f"selective_{name}"), config))

    @staticmethod
    def _with(function, config):
        def call(*args, **kwargs):
            own = {"BLOCK": 8, "num_warps": 1} if config and function.__name__ == "selective_ring_append" else config
            return function(*args, **kwargs, **({"config": own} if config else {}))

        return call


both = pytest.mark.parametrize(
    "operators",
    [Operators(reference), Operators(kernel, BLOCK_D=8, num_warps=1)],
    ids=["reference", "kernel"],
)


def draw(shape: tuple[int, int, int, int], batch: int, length: int, seed: int = 0, dtype=torch.float32):
    """x, dt, A, B, C, D on the device; dt as after softplus, A of the size of mamba-ssm's."""
    heads, groups, headdim, d_state = shape
    random = torch.Generator().manual_seed(seed)
    pieces, channels = headdim // d_state, heads * headdim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(DEVICE, dtype)

    dt = torch.nn.functional.softplus(torch.randn(batch, length, channels, generator=random) - 1.0)
    A = -torch.rand(channels, d_state, generator=random) * 4 - 0.1
    return (
        normal(batch, length, groups, headdim),
        dt.to(DEVICE),
        A.to(DEVICE),
        normal(batch, length, groups, pieces, d_state),
        normal(batch, length, heads, pieces, d_state),
        torch.randn(channels, generator=random).to(DEVICE),
    )


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, by Frobenius norm; NaN anywhere makes it NaN, which no bound holds."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32).clone()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# The scan of training and prefill.


def test_definition_written_out():
    heads, groups, headdim, d_state = SHAPES["one group"][0], 1, 12, 4
    x, dt, A, B, C, D = (t.double() for t in draw(SHAPES["one group"], 1, 3))
    ys, _ = reference.selective_scan_sequential(x, dt, A, B, C, D)
    for h in range(heads):
        for p in range(headdim):
            d, group, piece = h * headdim + p, h // (heads // groups), p // d_state
            state = torch.zeros(d_state, dtype=torch.float64, device=DEVICE)
            for t in range(3):
                state = torch.exp(A[d] * dt[0, t, d]) * state + dt[0, t, d] * x[0, t, group, p] * B[0, t, group, piece]
                wanted = C[0, t, h, piece] @ state + D[d] * x[0, t, group, p]
                torch.testing.assert_close(ys[0, t, h, p], wanted)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("length", [1, 15, 16, 50])
@pytest.mark.parametrize("segment", [1, 10**9], ids=["many segments", "one segment"])
def test_scan_is_the_recurrence(monkeypatch, shape, length, segment):
    monkeypatch.setattr(reference, "SEGMENT_NUMBERS", segment)
    given = draw(shape, 2, length)
    state = torch.randn(2, *given[2].shape, device=DEVICE)
    seq_idx = torch.zeros(2, length, dtype=torch.int32, device=DEVICE)
    seq_idx[0, length // 3 :] = 1
    seq_idx[1, length // 2 :] += 1
    seq_idx[1, length - 1 :] += 1
    for packing in (None, seq_idx):
        y, end = reference.selective_scan(*given, packing, state)
        exact_y, exact_end = reference.selective_scan_sequential(*given, packing, state)
        assert error(y, exact_y) < 2e-6
        assert error(end, exact_end) < 2e-6
        assert end.dtype == torch.float32


@pytest.mark.parametrize("segment", [1, 10**9], ids=["many segments", "one segment"])
def test_gradients_of_the_scan(monkeypatch, segment):
    monkeypatch.setattr(reference, "SEGMENT_NUMBERS", segment)
    given = [*draw(SHAPES["grouped"], 2, 37), torch.randn(2, 32, 4, device=DEVICE)]
    seq_idx = torch.zeros(2, 37, dtype=torch.int32, device=DEVICE)
    seq_idx[0, 20:] = 1
    gradients = []
    for scan, dtype in ((reference.selective_scan, torch.float32), (reference.selective_scan_sequential, torch.double)):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        y, end = scan(*leaves[:6], seq_idx, leaves[6])
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        gradients.append(torch.autograd.grad((y * weights).sum() + end.square().sum(), leaves))
    for name, ours, exact in zip(["x", "dt", "A", "B", "C", "D", "state"], *gradients, strict=True):
        assert error(ours, exact) < 1e-5, name


def test_packed_documents_are_read_as_if_alone():
    x, dt, A, B, C, D = draw(SHAPES["grouped"], 1, 40)
    boundaries = (0, 1, 18, 33, 40)
    seq_idx = torch.zeros(1, 40, dtype=torch.int32, device=DEVICE)
    for boundary in boundaries[1:-1]:
        seq_idx[:, boundary:] += 1
    y, end = reference.selective_scan(x, dt, A, B, C, D, seq_idx)
    alone = []
    for begin, stop in zip(boundaries, boundaries[1:], strict=False):
        part = slice(begin, stop)
        y_part, last = reference.selective_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        alone.append(y_part)
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-6)


def test_steps_of_no_time_change_nothing():
    x, dt, A, B, C, D = draw(SHAPES["grouped"], 2, 20)
    dt[1, 13:] = 0
    _, end = reference.selective_scan(x, dt, A, B, C, D)
    _, wanted = reference.selective_scan(x[1:, :13], dt[1:, :13], A, B[1:, :13], C[1:, :13], D)
    torch.testing.assert_close(end[1:], wanted, rtol=0, atol=1e-7)


# Decoding token by token.


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update(operators, shape, dtype):
    x, dt, A, B, C, D = draw(shape, 4, 1, dtype=dtype)
    dt[3] = 0
    slots = ints(3, -1, 0, 5)
    state = torch.randn(7, *A.shape, device=DEVICE).to(dtype)
    before = state.clone()
    y = operators.update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, slots)
    assert y.dtype == dtype and not y[1].any()
    live = [0, 2, 3]
    own = [3, 0, 5]
    exact_y, exact_end = reference.selective_scan_sequential(
        *(t[live] for t in (x, dt)), A, *(t[live] for t in (B, C)), D, None, before[own]
    )
    assert error(y[live], exact_y[:, 0]) < TOLERANCE[dtype]
    assert error(state[own], exact_end) < STORED_TOLERANCE[dtype]
    untouched = [1, 2, 4, 5, 6]  # and dt = 0 is the identity, to the bit
    assert torch.equal(bits(state[untouched]), bits(before[untouched]))


@both
def test_update_reads_views_of_a_projection(operators):
    heads, groups, headdim, d_state = SHAPES["grouped"]
    given = draw(SHAPES["grouped"], 4, 1)
    x, dt, A, B, C, D = given
    projected = torch.cat([t[:, 0].flatten(1) for t in (x, B, C)], dim=1)
    sections = (groups * headdim, groups * headdim, heads * headdim)
    x_view, B_view, C_view = projected.split(sections, dim=1)
    states = [torch.ones(4, *A.shape, device=DEVICE) for _ in range(2)]
    y = operators.update(states[0], x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    from_views = operators.update(
        states[1], x_view.view_as(x[:, 0]), dt[:, 0], A, B_view.view_as(B[:, 0]), C_view.view_as(C[:, 0]), D
    )
    assert error(y, reference.selective_scan_sequential(*given, None, torch.ones_like(states[0]))[0][:, 0]) < 2e-6
    assert torch.equal(y, from_views) and torch.equal(*states)


@both
def test_only_padding(operators):
    x, dt, A, B, C, D = draw(SHAPES["grouped"], 2, 1)
    state = torch.randn(2, *A.shape, device=DEVICE)
    rings = new_rings(SHAPES["grouped"], 2, 4)
    before = [bits(t) for t in (state, *rings)]
    slots, cursors = ints(-1, -1), (ints(3, 1), ints(1, 1))
    assert not operators.update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, slots).any()
    operators.ring_append(x, B, dt, *rings, cursors[0], slots)
    assert not operators.verify(state, *rings, C, A, D, *cursors, slots, 2).any()
    operators.fold(state, *rings, A, *cursors, slots)
    for t, as_before in zip((state, *rings), before, strict=True):
        assert torch.equal(bits(t), as_before)


# Windows over a ring.


def new_rings(shape: tuple[int, int, int, int], slots: int, ring: int, dtype=torch.float32) -> list[Tensor]:
    """x, B and dt, all NaN."""
    heads, groups, headdim, _ = shape
    sizes = ((groups, headdim), (groups, headdim), (heads * headdim,))
    dtypes = (dtype, dtype, torch.float32)
    return [
        torch.full((slots, ring, *size), float("nan"), device=DEVICE, dtype=t)
        for size, t in zip(sizes, dtypes, strict=True)
    ]


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("window", "ring", "offset", "tokens"),
    [(1, 2, 0, 1), (5, 10, 0, 5), (5, 10, 3, 2), (3, 9, 0, 2), (3, 9, 1, 2)],
    ids=str,
)
def test_verify(operators, shape, window, ring, offset, tokens):
    """History from none to all the ring holds, at positions that wrap; outputs of every row, states where due."""
    histories = sorted({0, max(0, ring - 2 * window), min(ring - 2 * window + 1, ring - window), ring - window})
    lengths = ints(*(n + 17 for n in histories), 4)
    folded = ints(*(17 for _ in histories), 4)
    rows = len(histories)
    x, dt, A, B, C, D = draw(shape, rows, ring)
    state = torch.randn(rows + 1, *A.shape, device=DEVICE)
    rings = new_rings(shape, rows + 1, ring)
    starts = []
    for row, history in enumerate(histories):
        is_due = history + 2 * window > ring
        if is_due and offset:  # an earlier call of the round has stored the history
            starts.append(history)
        else:
            starts.append(0)
        for p in range(starts[row], history + offset + tokens):
            for target, source in zip(rings, (x, B.flatten(3), dt), strict=True):
                target[row, (17 + p) % ring] = source[row, p]
    before = state.clone()
    slots = ints(*reversed(range(rows)), -1)
    C_window = torch.zeros(rows + 1, tokens, *C.shape[2:], device=DEVICE)
    for b, row in enumerate(reversed(range(rows))):
        C_window[b] = C[row, histories[row] + offset : histories[row] + offset + tokens]
    before_rings = [bits(r) for r in rings]
    y = operators.verify(state, *rings, C_window, A, D, lengths, folded, slots, window, offset)
    assert not y[-1].any()
    for b, row in enumerate(reversed(range(rows))):
        first = histories[row] + offset
        read = slice(starts[row], first + tokens)
        inputs = (x[row, None, read], dt[row, None, read], A, B[row, None, read], C[row, None, read], D)
        exact, _ = reference.selective_scan_sequential(*inputs, None, before[row, None])
        assert error(y[b], exact[0, -tokens:]) < 2e-6
        if offset == 0 and histories[row] + 2 * window > ring:
            old = slice(0, histories[row])
            inputs = (x[row, None, old], dt[row, None, old], A, B[row, None, old], C[row, None, old], D)
            assert error(state[row], reference.selective_scan_sequential(*inputs, None, before[row, None])[1][0]) < 2e-6
        else:
            assert torch.equal(state[row], before[row])
    assert torch.equal(state[-1], before[-1])
    for r, as_before in zip(rings, before_rings, strict=True):
        assert torch.equal(bits(r), as_before)


@both
def test_append_writes_its_positions_and_no_other(operators):
    shape, ring = SHAPES["grouped"], 5
    x, dt, _, B, _, _ = draw(shape, 3, 2)
    rings = new_rings(shape, 4, ring)
    operators.ring_append(x, B, dt, *rings, ints(3, 0, 0, 7), ints(3, -1, 0), 1)
    wanted = new_rings(shape, 4, ring)
    for target, source in zip(wanted, (x, B.flatten(3), dt), strict=True):
        target[3, [3, 4]] = source[0]
        target[0, [4, 0]] = source[2]
    for ours, exact in zip(rings, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)


class Decoder:
    """Three texts in five slots, a round at a time, beside the state of each in float64."""

    def __init__(self, operators, window, ring, dtype=torch.float32, state_dtype=torch.float32):
        self.operators, self.window, self.ring, self.dtype = operators, window, ring, dtype
        self.shape = SHAPES["grouped"]
        _, _, self.A, _, _, self.D = draw(self.shape, 1, 1)
        self.state = torch.zeros(5, *self.A.shape, device=DEVICE, dtype=state_dtype)
        self.rings = new_rings(self.shape, 5, ring, dtype)
        self.lengths, self.folded = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
        self.exact = torch.zeros(5, *self.A.shape, device=DEVICE, dtype=torch.float64)
        self.seed = 0

    def restart(self, slot: int) -> None:
        self.state[slot] = 0
        self.exact[slot] = 0
        self.lengths[slot] = 0
        self.folded[slot] = 0

    def forget_the_dead(self) -> None:
        """NaN in every ring slot that holds no token of the history."""
        for slot in range(5):
            kept = [p % self.ring for p in range(int(self.folded[slot]), int(self.lengths[slot]))]
            dead = [i for i in range(self.ring) if i not in kept]
            for r in self.rings:
                r[slot, dead] = float("nan")

    def round(self, slots: list[int], calls: list[int], accepted: list[int]) -> tuple[Tensor, Tensor]:
        """Read sum(calls) tokens in that many calls and keep accepted[b] of them; (y, exact y) of the live rows."""
        self.seed += 1
        x, dt, A, B, C, D = draw(self.shape, len(slots), sum(calls), self.seed, self.dtype)
        A, D = self.A, self.D
        self.forget_the_dead()
        idle = [s for s in range(5) if s not in slots]
        before = [bits(t[idle]) for t in (self.state, *self.rings)]
        ys, offset = [], 0
        for count in calls:
            part = slice(offset, offset + count)
            rows = ints(*slots)
            self.operators.ring_append(x[:, part], B[:, part], dt[:, part], *self.rings, self.lengths, rows, offset)
            ys.append(
                self.operators.verify(
                    self.state, *self.rings, C[:, part], A, D, self.lengths, self.folded, rows, self.window, offset
                )
            )
            offset += count
        for t, as_before in zip((self.state, *self.rings), before, strict=True):
            assert torch.equal(bits(t[idle]), as_before)

        y, exact = torch.cat(ys, dim=1), []
        for b, slot in enumerate(slots):
            if slot < 0:
                assert not y[b].any()
                continue
            row = slice(b, b + 1)
            inputs = (x[row], dt[row], A, B[row], C[row], D)
            exact.append(reference.selective_scan_sequential(*inputs, None, self.exact[slot, None])[0])
            keep = slice(0, accepted[b])
            if accepted[b]:
                inputs = (x[row, keep], dt[row, keep], A, B[row, keep], C[row, keep], D)
                self.exact[slot] = reference.selective_scan_sequential(*inputs, None, self.exact[slot, None])[1][0]
            if self.lengths[slot] - self.folded[slot] + 2 * self.window > self.ring:
                self.folded[slot] = self.lengths[slot]
            self.lengths[slot] += accepted[b]
        return y[[s >= 0 for s in slots]], torch.cat(exact)


@both
@pytest.mark.parametrize(("window", "ring"), [(3, 6), (2, 7)])
def test_rounds_of_any_acceptance(operators, window, ring):
    """66 rounds: K and the number of calls change, none to all are accepted, the rows' slots change places, a slot is
    used again as it was left, a history is folded before it is due."""
    decoder = Decoder(operators, window, ring)
    random = torch.Generator().manual_seed(0)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=random))

    ours, exact = [], []
    for i in range(66):
        tokens = 1 + below(window)
        first = 1 + below(tokens)
        calls = [tokens] if i % 3 else [n for n in (first, tokens - first) if n]
        accepted = [[below(tokens + 1) for _ in range(3)], [0] * 3, [tokens] * 3][min(2, below(5))]
        y, wanted = decoder.round([[4, 0, -1], [0, 2, 4], [2, -1, 0]][below(3)], calls, accepted)
        ours.append(y.flatten())
        exact.append(wanted.flatten())
        if i % 20 == 19:
            decoder.restart(0)
        if i % 25 == 10:
            decoder.forget_the_dead()
            untouched = decoder.state[[0, 1, 3]].clone()
            operators.fold(decoder.state, *decoder.rings, decoder.A, decoder.lengths, decoder.folded, ints(4, -1, 2))
            decoder.folded[[2, 4]] = decoder.lengths[[2, 4]]
            assert torch.equal(decoder.state[[0, 1, 3]], untouched)
            assert error(decoder.state[[2, 4]], decoder.exact[[2, 4]]) < 2e-6
    assert decoder.lengths.max() > 2 * ring, "the rings never wrapped"
    assert error(torch.cat(ours), torch.cat(exact)) < 2e-6


@both
def test_rounds_in_bfloat16(operators):
    decoder = Decoder(operators, 3, 8, torch.bfloat16, torch.bfloat16)
    results = [decoder.round([1, 3, -1], [3], [i % 4, 3 - i % 3, 1]) for i in range(8)]
    ours, exact = (torch.cat(r) for r in zip(*results, strict=True))
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) < 1e-2


@both
def test_impossible_windows_are_refused(operators):
    shape = SHAPES["grouped"]
    x, dt, A, B, C, D = draw(shape, 1, 3)
    state, cursor, slots = torch.zeros(1, *A.shape, device=DEVICE), ints(0), ints(0)
    rings = new_rings(shape, 1, 8)
    with pytest.raises(ValueError, match="3 tokens at offset 2 .* window of 4: raise the window"):
        operators.verify(state, *rings, C, A, D, cursor, cursor, slots, 4, 2)
    with pytest.raises(ValueError, match="ring of 8 slots .* windows of 5: raise the ring"):
        operators.verify(state, *rings, C, A, D, cursor, cursor, slots, 5)
    with pytest.raises(ValueError, match="3 tokens .* ring of 2 slots"):
        operators.ring_append(x, B, dt, *new_rings(shape, 1, 2), cursor, slots)
    with pytest.raises(ValueError, match="n_heads 4 is not a multiple of n_kv_heads 3"):
        operators.update(state, x[:, 0].repeat(1, 2, 1)[:, :3], dt[:, 0], A, B[:, 0], C[:, 0], D)
