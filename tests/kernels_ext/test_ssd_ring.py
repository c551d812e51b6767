"""One-token update, verification and fold of Mamba-2 against the recurrence written token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_ext.ssd import ring_reference
from tests.kernels_ext.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = interpreted("kernels_ext.ssd.kernel")
BOTH = pytest.mark.parametrize("ops", [ring_reference, kernel], ids=["reference", "kernel"])
FLOAT, HALF = torch.float32, torch.bfloat16
TOLERANCE = {(FLOAT, FLOAT): 2e-6, (FLOAT, HALF): 5e-3, (HALF, FLOAT): 1e-2, (HALF, HALF): 1e-2}  # (state, activations)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """`torch.empty` is full of NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))


class Stream:
    """What a layer would read and write for one token after another of each cache slot, and the state before each."""

    def __init__(
        self,
        tokens: int,
        slots: int,
        heads: int,
        groups: int,
        headdim: int,
        d_state: int,
        act: torch.dtype,
        seed: int = 0,
    ):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.x = normal(slots, tokens, groups, headdim).to(act).to(DEVICE)
        self.B = normal(slots, tokens, groups, d_state).to(act).to(DEVICE)
        self.C = normal(slots, tokens, heads, d_state).to(act).to(DEVICE)
        self.dt = torch.nn.functional.softplus(normal(slots, tokens, heads) - 1).to(DEVICE)
        self.A = -torch.exp(normal(heads)).to(DEVICE)
        self.D = normal(heads).to(DEVICE)
        self.first = normal(slots, heads, headdim, d_state).to(DEVICE)

    def recurrence(self, start: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
        """(S, tokens, H, P) outputs and (S, tokens + 1, H, P, N) states in float64, from the state `start`."""
        ratio = self.C.shape[2] // self.x.shape[2]
        x, B = (t.double().repeat_interleave(ratio, dim=2) for t in (self.x, self.B))
        states, ys = [start.double()], []
        for t in range(x.shape[1]):
            dt = self.dt[:, t, :, None, None].double()
            update = dt * x[:, t, :, :, None] * B[:, t, :, None, :]
            states.append(states[-1] * torch.exp(dt * self.A.double()[:, None, None]) + update)
            y = (states[-1] @ self.C[:, t, :, :, None].double()).squeeze(-1)
            ys.append(y if D is None else y + D.double()[:, None] * x[:, t])
        return torch.stack(ys, dim=1), torch.stack(states, dim=1)


class Rings:
    """Empty rings, full of NaN, views of wider tensors as a convolution's output would be."""

    def __init__(self, stream: Stream, slots: int, ring: int):
        _, _, groups, headdim = stream.x.shape
        d_state = stream.B.shape[-1]
        both = torch.full((slots, ring, groups, headdim + d_state), float("nan"), dtype=stream.x.dtype, device=DEVICE)
        self.x, self.B = both.split([headdim, d_state], dim=-1)
        self.dt = torch.full((slots, stream.A.shape[0], ring), float("nan"), device=DEVICE)
        self.length = ring

    def write(self, stream: Stream, slot: int, position: int, token: int) -> None:
        """Token `token` of the slot's stream at a position."""
        place = position % self.length
        self.x[slot, place] = stream.x[slot, token]
        self.B[slot, place] = stream.B[slot, token]
        self.dt[slot, :, place] = stream.dt[slot, token]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


UPDATES = [  # headdim, d_state, groups, heads, state, activations, D
    (16, 16, 2, 4, FLOAT, FLOAT, True),
    (8, 64, 1, 3, FLOAT, HALF, False),
    (24, 8, 4, 4, HALF, HALF, True),
    (32, 40, 1, 4, HALF, FLOAT, True),
]


@BOTH
@pytest.mark.parametrize("headdim, d_state, groups, heads, state_type, act, skip", UPDATES)
def test_update(ops, headdim, d_state, groups, heads, state_type, act, skip):
    """Three tokens, from strided views of one row, slots permuted, row 1 padding, row 2 with dt = 0 at token 1."""
    stream = Stream(3, 4, heads, groups, headdim, d_state, act)
    stream.dt[0, 1] = 0.0
    D = stream.D if skip else None
    state = stream.first.to(state_type)
    before = state.clone()
    exact, states = stream.recurrence(state, D)
    slots = integers(3, -1, 0)
    widths = groups * headdim, groups * d_state, heads * d_state
    for token in range(3):
        row = torch.cat([t[slots.long(), token].flatten(1) for t in (stream.x, stream.B, stream.C)], dim=1)
        x, B, C = row.split(widths, dim=1)
        x, B, C = x.unflatten(1, (groups, headdim)), B.unflatten(1, (groups, d_state)), C.unflatten(1, (heads, d_state))
        previous = state[0].clone()
        y = ops.ssd_update(state, x, stream.dt[slots.long(), token], stream.A, B, C, D, slots)
        assert y.dtype == act
        assert error(y[[0, 2]], exact[[3, 0], token]) < TOLERANCE[state_type, act]
        assert not y[1].any()
        assert torch.equal(state[0], previous) == (token == 1), "dt = 0 leaves the state as it is"
    assert error(state[[3, 0]], states[[3, 0], 3]) < (2e-6 if state_type == FLOAT else 1e-2)
    assert same_bits(state[1:3], before[1:3])


@BOTH
def test_update_without_slots(ops):
    stream = Stream(1, 3, 4, 2, 16, 16, FLOAT)
    state = stream.first.clone()
    exact, states = stream.recurrence(state, None)
    x, dt, B, C = (t[:, 0] for t in (stream.x, stream.dt, stream.B, stream.C))
    y = ops.ssd_update(state, x, dt, stream.A, B, C)
    assert error(y, exact[:, 0]) < 2e-6
    assert error(state, states[:, 1]) < 2e-6


@BOTH
@pytest.mark.parametrize("state_type", [FLOAT, HALF])
def test_padding_alone_touches_nothing(ops, state_type):
    """Nor what lies before slot 0, where a slot of −1 would lead."""
    stream = Stream(2, 3, 2, 1, 16, 16, FLOAT)
    rings = Rings(stream, 3, 6)
    rings.x.fill_(1.0), rings.B.fill_(1.0), rings.dt.fill_(1.0)
    whole = stream.first.to(state_type)
    whole[1, 0, 0, 0], whole[1, 0, 0, 1] = -0.0, float("nan")
    before = whole.clone()
    state, ring_x, ring_B, ring_dt = (t[1:] for t in (whole, rings.x, rings.B, rings.dt))
    lengths, folded, slots = integers(3, 3, 3)[1:], integers(0, 0, 0)[1:], integers(-1, -1)
    x, dt, B, C = (t[:2, 0] for t in (stream.x, stream.dt, stream.B, stream.C))
    assert not ops.ssd_update(state, x, dt, stream.A, B, C, stream.D, slots).any()
    fixed = stream.A, stream.D, lengths, folded, slots
    assert not ops.ssd_verify(state, ring_x, ring_B, ring_dt, stream.C[:2], *fixed, window=2).any()
    ops.ssd_fold(state, ring_x, ring_B, ring_dt, stream.A, lengths, folded, slots)
    assert same_bits(whole, before)


VERIFICATIONS = [  # headdim, d_state, groups, heads, tokens, offset, window, ring, state, activations, D
    (16, 16, 1, 2, 1, 0, 1, 2, FLOAT, FLOAT, True),
    (16, 16, 2, 4, 5, 0, 5, 16, FLOAT, FLOAT, True),
    (8, 8, 4, 4, 2, 1, 5, 13, FLOAT, FLOAT, False),
    (64, 16, 1, 3, 8, 0, 8, 32, FLOAT, HALF, True),
    (24, 64, 2, 2, 1, 4, 5, 16, FLOAT, HALF, True),
    (16, 64, 2, 4, 5, 0, 5, 16, HALF, HALF, False),
    (64, 64, 1, 1, 2, 0, 8, 20, HALF, FLOAT, True),
]


@BOTH
@pytest.mark.parametrize(
    "headdim, d_state, groups, heads, tokens, offset, window, ring, state_type, act, skip", VERIFICATIONS
)
def test_verify(ops, headdim, d_state, groups, heads, tokens, offset, window, ring, state_type, act, skip):
    """Rows with every kind of history: none, some, the most that is not due, the least and the most that is."""
    histories = sorted({0, 1, ring - 2 * window, ring - 2 * window + 1, ring - window})
    rows = len(histories)
    base = 3 * ring - 2  # the first position after what is folded, so that the ring wraps around
    stream = Stream(ring, rows, heads, groups, headdim, d_state, act, seed=tokens)
    state = stream.first.to(state_type)
    before = state.clone()
    D = stream.D if skip else None
    exact, states = stream.recurrence(state, D)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    slots = integers(-1, *order, -1)
    rings = Rings(stream, rows, ring)
    C = torch.ones(rows + 2, tokens, heads, d_state, dtype=act, device=DEVICE)
    due = [history + 2 * window > ring for history in histories]
    for row, slot in enumerate(order):
        history = histories[slot]
        C[row + 1] = stream.C[slot, history + offset : history + offset + tokens]
        for token in range(history + offset + tokens):
            # an earlier call of the round has folded the history, so that its ring slots are not read again
            if not (due[slot] and offset and token < history):
                rings.write(stream, slot, base + token, token)
        if due[slot] and offset:
            state[slot] = states[slot, history].to(state_type)
    at_call = state.clone()
    y = ops.ssd_verify(
        state,
        rings.x,
        rings.B,
        rings.dt,
        C,
        stream.A,
        D,
        integers(*(base + history for history in histories)),
        integers(*([base] * rows)),
        slots,
        window,
        offset,
    )
    assert y.dtype == act
    assert not y[0].any() and not y[-1].any()
    for row, slot in enumerate(order):
        first = histories[slot] + offset
        assert error(y[row + 1], exact[slot, first : first + tokens]) < TOLERANCE[state_type, act]
        if due[slot] and offset == 0:
            assert not torch.equal(state[slot], before[slot])
            assert error(state[slot], states[slot, histories[slot]]) < TOLERANCE[state_type, act]
        else:
            assert same_bits(state[slot], at_call[slot])
    assert any(due) and not all(due)


@BOTH
@pytest.mark.parametrize("state_type, act", [(FLOAT, FLOAT), (HALF, HALF)])
def test_fold(ops, state_type, act):
    histories = [0, 1, 5, 13]
    stream = Stream(13, 4, 4, 2, 24, 40, act)
    state = stream.first.to(state_type)
    before = state.clone()
    _, states = stream.recurrence(state, None)
    rings = Rings(stream, 4, 13)
    for slot, history in enumerate(histories):
        for token in range(history):
            rings.write(stream, slot, 20 + token, token)
    lengths = integers(*(20 + history for history in histories))
    arguments = state, rings.x, rings.B, rings.dt, stream.A, lengths, integers(20, 20, 20, 20)
    assert ops.ssd_fold(*arguments, integers(3, -1, 0, 2)) is None
    assert same_bits(state[:2], before[:2])
    for slot in (2, 3):
        assert error(state[slot], states[slot, histories[slot]]) < TOLERANCE[state_type, act]


@BOTH
def test_strong_decays_do_not_cancel(ops):
    """Tokens that wipe the state out beside tokens that hardly touch it: sums of log-decays reach thousands."""
    stream = Stream(32, 1, 2, 1, 16, 16, FLOAT)
    stream.dt = torch.where(torch.arange(32, device=DEVICE)[:, None] % 8 < 4, 60.0, 1e-3).expand(1, 32, 2).contiguous()
    stream.A = torch.tensor([-16.0, -4.0], device=DEVICE)
    state = stream.first.clone()
    exact, _ = stream.recurrence(state, None)
    rings = Rings(stream, 1, 32)
    for token in range(32):
        rings.write(stream, 0, token, token)
    y = ops.ssd_verify(
        state, rings.x, rings.B, rings.dt, stream.C[:, 24:], stream.A, None, integers(24), integers(0), integers(0), 8
    )
    for token in range(8):
        assert error(y[0, token], exact[0, 24 + token]) < 1e-5


class Decoder:
    """A cache whose cursors move as the engine's do, in rounds of up to `window` tokens."""

    def __init__(self, ops, stream: Stream, slots: int, ring: int, window: int):
        self.ops, self.stream, self.window = ops, stream, window
        self.rings = Rings(stream, slots, ring)
        self.state = torch.zeros_like(stream.first)
        self.lengths, self.folded = integers(*[0] * slots), integers(*[0] * slots)
        self.read = [0] * slots  # tokens of each slot's stream that are committed

    def verify(self, slots: list[int], tokens: int, offset: int) -> Tensor:
        """Write a window into the rings and verify it."""
        C = torch.zeros(len(slots), tokens, *self.stream.C.shape[2:], device=DEVICE)
        for row, slot in enumerate(slots):
            for i in range(tokens) if slot >= 0 else ():
                position, token = int(self.lengths[slot]) + offset + i, self.read[slot] + offset + i
                self.rings.write(self.stream, slot, position, token)
                C[row, i] = self.stream.C[slot, token]
        rings, stream = self.rings, self.stream
        return self.ops.ssd_verify(
            self.state,
            rings.x,
            rings.B,
            rings.dt,
            C,
            stream.A,
            stream.D,
            self.lengths,
            self.folded,
            integers(*slots),
            self.window,
            offset,
        )

    def commit(self, slots: list[int], counts: list[int]) -> None:
        for slot, count in zip(slots, counts, strict=True):
            if slot < 0:
                continue
            if int(self.lengths[slot] - self.folded[slot]) + 2 * self.window > self.rings.length:
                self.folded[slot] = self.lengths[slot]
            self.lengths[slot] += count
            self.read[slot] += count

    def fold(self, slots: list[int]) -> None:
        rings = self.rings
        arguments = self.state, rings.x, rings.B, rings.dt, self.stream.A, self.lengths, self.folded
        self.ops.ssd_fold(*arguments, integers(*slots))
        for slot in slots:
            if slot >= 0:
                self.folded[slot] = self.lengths[slot]

    def restart(self, slot: int) -> None:
        self.state[slot] = 0.0
        self.lengths[slot] = self.folded[slot] = self.read[slot] = 0


@BOTH
def test_rounds_of_any_acceptance(ops):
    """64 rounds give the recurrence: windows of other lengths, read at once or token by token, other counts for
    each row, padding rows, a forced fold and restarts on a dirty slot."""
    window, ring, slots = 5, 13, 3
    stream = Stream(240, slots, 2, 1, 8, 16, FLOAT)
    exact, states = stream.recurrence(torch.zeros_like(stream.first), stream.D)
    decoder = Decoder(ops, stream, slots, ring, window)
    random = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    folds = 0
    for round_number in range(64):
        rows = torch.randperm(slots, generator=random).tolist()
        if round_number % 4 == 3:
            rows[number(0, slots - 1)] = -1
        tokens = number(1, window)
        kind = round_number % 3
        counts = [{0: 0, 1: tokens, 2: number(0, tokens)}[kind] for _ in rows]
        expected = torch.stack([exact[slot, decoder.read[slot] : decoder.read[slot] + tokens] for slot in rows])
        state = decoder.state.clone()
        if round_number % 8 == 0:  # as a draft model reads its own tokens
            calls = [decoder.verify(rows, 1, i) for i in range(tokens)]
            y = torch.cat(calls, dim=1)
        else:
            y = decoder.verify(rows, tokens, 0)
        folds += not torch.equal(state, decoder.state)
        for row, slot in enumerate(rows):
            if slot < 0:
                assert not y[row].any()
            else:
                assert error(y[row], expected[row]) < 5e-6, (round_number, slot)
        for slot, count in zip(rows, counts, strict=True):  # what was not accepted is not read again
            for i in range(count, tokens) if slot >= 0 else ():
                place = (int(decoder.lengths[slot]) + i) % ring
                decoder.rings.x[slot, place] = decoder.rings.B[slot, place] = float("nan")
                decoder.rings.dt[slot, :, place] = float("nan")
        decoder.commit(rows, counts)
        if round_number == 30:
            decoder.fold([2, -1, 0])
            for slot in (0, 2):
                assert error(decoder.state[slot], states[slot, decoder.read[slot]]) < 5e-6
        if round_number in (10, 25):
            decoder.restart(1)
    assert folds > 10
    assert min(decoder.read) > ring, "each ring wraps around"


@BOTH
def test_errors(ops):
    stream = Stream(8, 1, 4, 2, 16, 16, FLOAT)
    rings = Rings(stream, 1, 8)
    zero = integers(0)
    fixed = stream.A, stream.D, zero, zero, zero

    def verify(tokens: int, window: int, offset: int) -> None:
        ops.ssd_verify(stream.first, rings.x, rings.B, rings.dt, stream.C[:, :tokens], *fixed, window, offset)

    with pytest.raises(ValueError, match="3 tokens at offset 2 exceed the window of 4: raise the window"):
        verify(3, 4, 2)
    with pytest.raises(ValueError, match="a ring of 8 slots is shorter than two windows of 5: raise the ring to 10"):
        verify(3, 5, 0)
    with pytest.raises(ValueError, match="3 heads cannot share 2 groups"):
        state, C = stream.first[:, :3], stream.C[:, :1, :3]
        ops.ssd_verify(state, rings.x, rings.B, rings.dt, C, *fixed, 4)
    with pytest.raises(ValueError, match="3 heads cannot share 2 groups"):
        ops.ssd_fold(stream.first[:, :3], rings.x, rings.B, rings.dt, stream.A, zero, zero, zero)
    with pytest.raises(ValueError, match="3 heads cannot share 2 groups"):
        x, dt, B, C = (t[:, 0] for t in (stream.x, stream.dt, stream.B, stream.C))
        ops.ssd_update(stream.first[:, :3], x, dt, stream.A, B, C[:, :3])


@pytest.mark.parametrize("op", ["update", "verify", "fold"])
def test_blocks_are_powers_of_two_and_shrink_for_small_batches(op):
    for batch in (1, 8, 64):
        for headdim in (8, 64, 128):
            config = kernel.launch_config(op, batch, 32, headdim, 128, 4)
            assert config["BLOCK_P"].bit_count() == 1
            assert config["BLOCK_P"] >= (8 if op == "update" else 16)
    blocks = [kernel.launch_config(op, batch, 9, 64, 64, 2)["BLOCK_P"] for batch in (1, 64)]
    assert blocks[0] < blocks[1]


def test_an_overridden_block():
    stream = Stream(1, 1, 2, 1, 32, 16, FLOAT)
    exact, _ = stream.recurrence(stream.first, None)
    x, dt, B, C = (t[:, 0] for t in (stream.x, stream.dt, stream.B, stream.C))
    y = kernel.ssd_update(stream.first.clone(), x, dt, stream.A, B, C, config={"BLOCK_P": 32})
    assert error(y, exact[:, 0]) < 2e-6
