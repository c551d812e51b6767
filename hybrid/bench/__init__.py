"""`python -m hybrid.bench`: decoding and speculation of whole models, checked and then timed on the GPU there is.

Importing this needs no GPU: the arithmetic is plain Python and used by the speculative profile too.
"""

from hybrid.bench.arithmetic import (
    break_even,
    floor_bytes,
    predicted_speedup,
    round_parts,
    tokens_per_round,
    weight_bytes,
)

__all__ = ["break_even", "floor_bytes", "predicted_speedup", "round_parts", "tokens_per_round", "weight_bytes"]
