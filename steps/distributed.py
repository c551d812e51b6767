"""Training on several processes, one for each GPU, of one host or of more: FSDP2 by blocks, and what a process must
know of the others.

Every function also works where there is one process and no process group, and then costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hybrid import HybridForCausalLM
from steps.config import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long processes wait for one that works alone, as process 0 does while it makes preference pairs. A process that
dies is noticed at once by torchrun, which ends the others."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The processes that torchrun started as one group: NCCL on GPUs, gloo on CPUs. On a GPU, a process may see only
    its own."""
    own = torch.device("cuda", 0) if device == "cuda" else None
    dist.init_process_group("nccl" if own else "gloo", timeout=TIMEOUT, device_id=own)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: T) -> T:
    """Process 0's value, on all; the others' is not looked at. It must be picklable and small."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(value: Tensor) -> Tensor:
    """Mean over the processes, without a gradient."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def own_rows(rows: int) -> slice:
    """Which of a micro-batch's rows are this process's. Raises ConfigError where they cannot be shared equally."""
    share, rest = divmod(rows, world_size())
    if rest or not share:
        raise ConfigError(
            f"batch_size / accumulation is {rows}, which {world_size()} processes cannot share equally: "
            f"make it a multiple of {world_size()}, or change `processes` or `gpu` of the stage's resources"
        )
    return slice(rank() * share, (rank() + 1) * share)


def shard(model: HybridForCausalLM, called: Sequence[nn.Module] = ()) -> None:
    """Spread the weights over the processes, in place (FSDP2, 2304.11277): a block's are whole only while it runs.

    called: the modules that are called from outside, where that is not `model.hidden` or `model.mixing`; then only they
    are spread. Weights keep their type, and products run under autocast as on one process, so the losses are the same.
    Until the backward pass that follows `model.hidden`, or for good where none does, `model.lm_head_weight` is whole.
    """
    mesh = init_device_mesh(model.device.type, (world_size(),))
    for module in called or model.blocks:
        fully_shard(module, mesh=mesh)
    if not called:
        fully_shard(model, mesh=mesh)
        for name in ("hidden", "mixing"):
            register_fsdp_forward_method(model, name)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, spread or not; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor | None) -> None:
    """Give `target`, spread or not, the value that process 0 has; the others' is not looked at."""
    if isinstance(target, DTensor):
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if value is not None and rank() == 0:
            whole.copy_(value)
        target.to_local().copy_(distribute_tensor(whole, target.device_mesh, target.placements).to_local())
    elif value is not None:
        target.copy_(value)


def gathered(model: HybridForCausalLM) -> HybridForCausalLM | None:
    """The model with whole weights on process 0, None on the others; one that was never spread is returned itself."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        return model if rank() == 0 else None
    for module in sharded:
        module.reshard()
    weights: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        whole = full(parameter.detach())
        if rank() == 0:
            weights[name] = whole
    if rank() != 0:
        return None
    with torch.device("meta"):
        plain = HybridForCausalLM(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.inv_freq = model.inv_freq
    return plain.requires_grad_(False).eval()
