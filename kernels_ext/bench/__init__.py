"""`python -m kernels_ext.bench`: every kernel checked against its reference, then timed on the GPU there is.

Importing this needs no GPU: the byte formulas are plain Python and used by the speculative profile too.
"""

from kernels_ext.bench.timing import Timing, copy_bandwidth, time_graph
from kernels_ext.bench.traffic import (
    FoldSchedule,
    MixerShape,
    append_bytes,
    fold_schedule,
    mamba1_shape,
    mamba2_shape,
    snapshot_bytes,
    states_moved,
    update_bytes,
    verify_bytes,
)

__all__ = [
    "FoldSchedule",
    "MixerShape",
    "Timing",
    "append_bytes",
    "copy_bandwidth",
    "fold_schedule",
    "mamba1_shape",
    "mamba2_shape",
    "snapshot_bytes",
    "states_moved",
    "time_graph",
    "update_bytes",
    "verify_bytes",
]
