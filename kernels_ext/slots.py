"""In-place writes to the slots of a cache that leave padding rows alone, without asking the device which rows those
are."""

from __future__ import annotations

import torch
from torch import Tensor


def writing_rows(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which row of the batch each row is to write, and where: (source (B,), slot (B,), live (B,) bool).

    slots (B,): cache slot of each row, −1 for padding. A live row writes its own data. A padding row repeats what the
    first live row writes, which changes nothing; where no row is live, all of them get slot 0 and live = False, and are
    to write back what is there already.
    """
    live = slots >= 0
    first = live.to(torch.int32).argmax()
    source = torch.where(live, torch.arange(len(slots), device=slots.device), first)
    return source, slots[source].clamp(min=0).long(), live[source]
