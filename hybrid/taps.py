"""What an attention layer takes and gives, recorded while the teacher runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hybrid.model import HybridForCausalLM


@contextmanager
def attention_taps(teacher: HybridForCausalLM, layers: Iterable[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inside the block, every pass of the teacher leaves layer → (normed input, attention output), both (B, L,
    d_model)."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def recorder(layer: int):
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen[layer] = (args[0].detach(), output.detach())

        return record

    handles = [teacher.blocks[i].self_attn.register_forward_hook(recorder(i)) for i in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
