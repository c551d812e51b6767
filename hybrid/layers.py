"""Which layers keep their attention."""

from __future__ import annotations

from collections.abc import Sequence

_PERIOD = {"1/2": 2, "1/4": 4, "1/8": 8}


def attention_layers(
    policy: str | Sequence[int], n_layers: int, ranking: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Layer numbers for a ratio of attention kept, or the explicit list itself.

    Ratios interleave as the paper's configurations do (2408.15237 §5 and its released yaml files): the last layer of
    every period of 2, 4 or 8 stays attention, so layer 0 is always Mamba: 1/2 → 1, 3, 5, …; 1/4 → 3, 7, …; 1/8 → 7,
    15, …; 3/4, its first step on the way to 1/2, replaces 0, 4, 8, … Each keeps a part of what larger ones keep.

    ranking: all layers, the one that needs its attention most first. A ratio then keeps as many layers as it would
    interleaved, but the first of the ranking, so that smaller ratios keep a part of what larger ones keep; an explicit
    list stays as it is. Raises ValueError for a ranking of other layers than the model's.
    """
    if not isinstance(policy, str):
        return tuple(sorted(set(policy)))
    if policy == "1":
        return tuple(range(n_layers))
    if policy == "0":
        return ()
    if policy == "3/4":
        interleaved = tuple(i for i in range(n_layers) if i % 4)
    elif policy in _PERIOD:
        interleaved = tuple(range(_PERIOD[policy] - 1, n_layers, _PERIOD[policy]))
    else:
        raise ValueError(f"attention {policy!r}: expected one of 1, 3/4, {', '.join(_PERIOD)}, 0 or a list of layers")
    if ranking is None:
        return interleaved
    if sorted(ranking) != list(range(n_layers)):
        raise ValueError(f"ranking {list(ranking)}: expected each of the layers 0 to {n_layers - 1} once")
    return tuple(sorted(ranking[: len(interleaved)]))
