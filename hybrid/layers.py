"""Which layers keep their attention."""

from __future__ import annotations

from collections.abc import Sequence

_PERIOD = {"1/2": 2, "1/4": 4, "1/8": 8}


def attention_layers(policy: str | Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Layer numbers for a ratio of attention kept, or the explicit list itself.

    Ratios interleave as the paper's configurations do (2408.15237 §5 and its released yaml files): the last layer of
    every period of 2, 4 or 8 stays attention, so layer 0 is always Mamba: 1/2 → 1, 3, 5, …; 1/4 → 3, 7, …; 1/8 → 7,
    15, …
    """
    if not isinstance(policy, str):
        return tuple(sorted(set(policy)))
    if policy == "1":
        return tuple(range(n_layers))
    if policy == "0":
        return ()
    if policy not in _PERIOD:
        raise ValueError(f"attention {policy!r}: expected one of 1, {', '.join(_PERIOD)}, 0 or a list of layers")
    period = _PERIOD[policy]
    return tuple(range(period - 1, n_layers, period))
