"""How many bytes the decoding kernels must move: pure Python, no torch.

Counted is what a kernel has to read and write at least once: states, cached inputs, C and y, and per launch the
constants A and D. Activations are counted at their own width, dt, A and D in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MixerShape:
    """What the mixer of one layer keeps and moves for one row of the batch, in elements."""

    state: int
    """Elements of the SSM state."""
    cached: int
    """x and B of one token, as the ring holds them."""
    dt: int
    """Steps of one token, float32."""
    C: int
    y: int
    constants: int
    """A and D, float32, read once per launch."""

    def token_bytes(self, activation_bytes: int = 2) -> int:
        """Raw inputs x, B and dt of one token of one row: what the ring caches."""
        return self.cached * activation_bytes + 4 * self.dt


def mamba2_shape(heads: int, groups: int, headdim: int, d_state: int) -> MixerShape:
    """Mamba-2 with x and B shared by the heads of a group and one C, dt, A and D per head."""
    return MixerShape(
        state=heads * headdim * d_state,
        cached=groups * (headdim + d_state),
        dt=heads,
        C=heads * d_state,
        y=heads * headdim,
        constants=2 * heads,
    )


def mamba1_shape(heads: int, groups: int, headdim: int, d_state: int) -> MixerShape:
    """Mamba-1 with d_inner = heads·headdim channels, x and B shared by the heads of a group, dt and A per channel."""
    d_inner = heads * headdim
    return MixerShape(
        state=d_inner * d_state,
        cached=2 * groups * headdim,
        dt=d_inner,
        C=d_inner,
        y=d_inner,
        constants=d_inner * (d_state + 1),
    )


def update_bytes(shape: MixerShape, batch: int = 1, state_bytes: int = 4, activation_bytes: int = 2) -> float:
    """One-token update of one layer: the state read and written, x, B, dt and C read, y written."""
    token = shape.token_bytes(activation_bytes) + (shape.C + shape.y) * activation_bytes
    return batch * (2 * shape.state * state_bytes + token) + 4 * shape.constants


def verify_bytes(
    shape: MixerShape,
    batch: int,
    tokens: int,
    history: float,
    due: float,
    state_bytes: int = 4,
    activation_bytes: int = 2,
) -> float:
    """Verification of `tokens` window tokens from the checkpoint and the ring, one layer:

        batch·(state·(1 + due) + (history + tokens)·(x, B, dt) + tokens·(C + y)) + constants

    `history`: committed tokens that are in the ring only; `due`: share of the rounds that write the state (0 or 1 for
    one launch, means over rounds are as good, the formula is linear). Writing the window's inputs into the ring is the
    convolution's traffic: `append_bytes`.
    """
    rings = (history + tokens) * shape.token_bytes(activation_bytes)
    window = tokens * (shape.C + shape.y) * activation_bytes
    return batch * (shape.state * state_bytes * (1 + due) + rings + window) + 4 * shape.constants


def append_bytes(shape: MixerShape, batch: int, tokens: int, activation_bytes: int = 2) -> float:
    """Writing x, B and dt of `tokens` window tokens into the rings of one layer."""
    return batch * tokens * shape.token_bytes(activation_bytes)


def snapshot_bytes(
    shape: MixerShape, batch: int, tokens: int, state_bytes: int = 4, activation_bytes: int = 2
) -> float:
    """Verification that writes one full state per token (the scheme of vLLM), one layer: one state read, T written."""
    token = shape.token_bytes(activation_bytes) + (shape.C + shape.y) * activation_bytes
    return batch * ((1 + tokens) * shape.state * state_bytes + tokens * token) + 4 * shape.constants


def states_moved(moved_bytes: float, shape: MixerShape, batch: int = 1, state_bytes: int = 4) -> float:
    """Bytes of one layer's launch in units of its batch's states."""
    return moved_bytes / (batch * shape.state * state_bytes)


@dataclass(frozen=True)
class FoldSchedule:
    """How often a ring is folded in the long run, and how long its history is then."""

    due: float
    """Share of the rounds that fold."""
    history: float
    """Mean history, in tokens, of the rounds that do not fold; 0 if every round does."""
    history_due: float
    """The same of the rounds that do; 0 if none does."""

    @property
    def mean_history(self) -> float:
        return self.due * self.history_due + (1 - self.due) * self.history


def fold_schedule(window: int, ring: int, committed: int | Sequence[int]) -> FoldSchedule:
    """Follow the cursors of one row: a round folds if history + 2·window > ring, and then commits its tokens.

    `committed`: tokens that a round commits, or one number per round, repeated for ever. Averages are taken over one
    period of the schedule. ValueError if the ring is shorter than two windows.
    """
    steps = [committed] if isinstance(committed, int) else list(committed)
    if ring < 2 * window:
        raise ValueError(f"ring of {ring} slots, window of {window} tokens: raise the ring to {2 * window} or more")
    if not steps or min(steps) < 0 or max(steps) > window:
        raise ValueError(f"committed tokens {steps}: expected between 0 and the window's {window}")
    histories: list[int] = []  # before each round
    first_seen: dict[tuple[int, int], int] = {}
    history = 0
    while (place := (history, len(histories) % len(steps))) not in first_seen:
        first_seen[place] = len(histories)
        histories.append(history)
        history = steps[place[1]] + (0 if history + 2 * window > ring else history)
    period = histories[first_seen[place] :]
    due = [h for h in period if h + 2 * window > ring]
    rest = [h for h in period if h + 2 * window <= ring]
    return FoldSchedule(
        due=len(due) / len(period),
        history=sum(rest) / len(rest) if rest else 0.0,
        history_due=sum(due) / len(due) if due else 0.0,
    )
