"""mamba-ssm's Triton chunked scan behind the signature of `ssd_chunked`. Needs CUDA and an installed mamba-ssm."""

from __future__ import annotations

from torch import Tensor


def ssd_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """See `reference.ssd_chunked`. The kernel wants one x per head and as many B as C, so both are repeated here."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    ratio = C.shape[2] // x.shape[2]
    y, state = mamba_chunk_scan_combined(
        x.repeat_interleave(ratio, dim=2),
        dt,
        A.float(),
        B.repeat_interleave(ratio, dim=2),
        C,
        chunk_size,
        D=None if D is None else D.float(),
        seq_idx=None if seq_idx is None else seq_idx.int().contiguous(),
        initial_states=initial_state,
        return_final_states=True,
    )
    return y, state
