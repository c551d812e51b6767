"""Decoding state of a hybrid model: fixed buffers, two cursors per slot, roll-back by not advancing one of them.

Everything is addressed by a token's absolute position. Keys and values of position p lie at index p; the
convolution's inputs at index p mod R of a ring; the SSM inputs (x and B after the convolution, dt after softplus) at
index p mod L of another. The SSM state is a checkpoint after `folded` tokens, and what lies between `folded` and
`lengths` is replayed from the ring whenever a window of tokens is read. Reading a window therefore changes nothing
that a shorter window would need: to keep n of its tokens is to add n to `lengths`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid.config import HybridConfig

if TYPE_CHECKING:
    from hybrid.model import HybridForCausalLM

RING = 32
"""Slots of the SSM ring, at least: the longer, the rarer the state is written; 16 to 32 fill a tensor core's tile."""


@dataclass
class Cursors:
    """Of one batch of slots, shared by all layers and by a draft model that reads the same tokens.

    lengths (S,) int32: tokens that are part of the text. folded (S,) int32: how many of them the SSM states hold.
    """

    lengths: Tensor
    folded: Tensor

    @classmethod
    def zeros(cls, slots: int, device: torch.device | str) -> Cursors:
        return cls(*(torch.zeros(slots, dtype=torch.int32, device=device) for _ in range(2)))


@dataclass
class KVCache:
    """Keys and values of one attention layer: (S, G, M, P). Entries at and after a row's length are never read.

    slots (B,) int64: of the rows that `append` and `first` speak of; None is all of them in order.
    """

    k: Tensor
    v: Tensor
    slots: Tensor | None = None

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Keep k and v (B, G, L, P) of tokens at positions (B, L) int64."""
        slots = torch.arange(len(k), device=k.device) if self.slots is None else self.slots
        for kept, new in ((self.k, k), (self.v, v)):
            kept[slots[:, None], :, positions] = new.transpose(1, 2).to(kept.dtype)

    def first(self, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, width, P) of the first positions."""
        slots = slice(None) if self.slots is None else self.slots
        return self.k[slots, :, :width], self.v[slots, :, :width]


@dataclass
class SSMCache:
    """State of one Mamba layer.

    state: (S, H, P, N) for Mamba-2, (S, d_inner, N) for Mamba-1, float32 or bfloat16.
    conv: (S, R, channels), R = d_conv − 1 + window.
    ring_x, ring_B: (S, L, G, P) and (S, L, G, N); ring_dt: (S, H, L) float32, (S, L, d_inner) for Mamba-1. None where
    tokens are only ever read one by one, each written into the state at once, and no mixer has a window.
    A: the layer's negative decays in float32, (H,) or (d_inner, N), as they were when the cache was last reset.
    """

    state: Tensor
    conv: Tensor
    A: Tensor
    ring_x: Tensor | None = None
    ring_B: Tensor | None = None
    ring_dt: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """The tokens that a prefill appends: counts (B,) of them, at and after positions `start` (B,); both int64."""

    start: Tensor
    counts: Tensor

    def live(self, length: int) -> Tensor:
        """(B, length) bool: which of a right-padded row's tokens are to be appended."""
        return torch.arange(length, device=self.counts.device) < self.counts[:, None]

    def inputs_before(self, ring: Tensor, count: int) -> Tensor:
        """(B, count, C): what the ring holds of the tokens before `start`, zeros before the text."""
        positions = self.start[:, None] + torch.arange(-count, 0, device=ring.device)
        index = (positions % ring.shape[1])[..., None].expand(-1, -1, ring.shape[2])
        return torch.where(positions[..., None] >= 0, ring.gather(1, index), 0)

    def keep_inputs(self, ring: Tensor, inputs: Tensor, count: int) -> None:
        """Store the last `count` inputs of the appended text; `inputs` begins with as many before `start`."""
        back = torch.arange(count, device=ring.device)
        index = (self.counts[:, None] + back)[..., None].expand(-1, -1, inputs.shape[2])
        positions = (self.start + self.counts)[:, None] + back - count
        slots = (positions % ring.shape[1])[..., None].expand_as(index)
        ring.scatter_(1, slots, inputs.gather(1, index))


class HybridCache:
    """Buffers for `slots` sequences of up to max_length tokens; `reset` makes them ready for a model.

    dtype: of keys, values and, unless mixer_dtype names another, of the mixers' inputs.
    window: the most tokens that one round reads without committing them (K + 1); 1 keeps no ring. ring: L, see
    `ring_slots`. cursors: those of the model whose draft this cache belongs to. `fresh` says that nothing was read yet;
    `rope` holds cos and sin by position, (max_length, P / 2) float32.
    """

    def __init__(
        self,
        config: HybridConfig,
        slots: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        mixer_dtype: torch.dtype | None = None,
        window: int = 1,
        ring: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        cursors: Cursors | None = None,
    ) -> None:
        self.config = config
        self.max_length = max_length
        self.window = window
        self.ring = ring_slots(config, window) if ring is None else ring
        if config.mixer_window and self.ring < window + config.mixer_window:
            raise ValueError(
                f"a ring of {self.ring} slots is too short for windows of {window} tokens (K + 1) whose mixers see "
                f"{config.mixer_window} tokens: ring must be at least {window + config.mixer_window}"
            )
        if window > 1 and self.ring < 2 * window:
            raise ValueError(
                f"a ring of {self.ring} slots is too short for windows of {window} tokens (K + 1): "
                f"ring must be at least {2 * window}"
            )
        self.cursors = Cursors.zeros(slots, device) if cursors is None else cursors
        self.fresh = True
        self.rope: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.layers: list[KVCache | SSMCache] = []
        attention = set(config.attention_layers)
        inputs = dtype if mixer_dtype is None else mixer_dtype

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(slots, *shape, device=device, dtype=dtype)

        for layer in range(config.n_layers):
            if layer in attention:
                shape = (config.n_kv_heads, max_length, config.head_dim)
                self.layers.append(KVCache(zeros(*shape), zeros(*shape)))
                continue
            mamba1 = config.mixer == "mamba1"
            cache = SSMCache(
                zeros(*state_shape(config), dtype=state_dtype),
                zeros(config.d_conv - 1 + window, config.conv_channels, dtype=inputs),
                torch.zeros(state_shape(config) if mamba1 else config.n_heads, device=device),
            )
            if window > 1 or config.mixer_window:
                cache.ring_x = zeros(self.ring, config.scan_groups, config.head_dim, dtype=inputs)
                cache.ring_B = zeros(self.ring, config.scan_groups, config.head_dim, dtype=inputs)
                times = (self.ring, config.d_inner) if mamba1 else (config.n_heads, self.ring)
                cache.ring_dt = zeros(*times, dtype=torch.float32)
            self.layers.append(cache)

    @property
    def slots(self) -> int:
        return self.cursors.lengths.shape[0]

    def reset(self, model: HybridForCausalLM) -> None:
        """Forget every sequence and take the model's decays, which training may have changed. Rings and keys keep stale
        entries, which no cursor reaches."""
        self.fresh = True
        for cursor in (self.cursors.lengths, self.cursors.folded):
            cursor.zero_()
        for block, layer in zip(model.blocks, self.layers, strict=True):
            if isinstance(layer, SSMCache):
                layer.state.zero_()
                layer.A.copy_(block.mamba.A)

    def opened(self, slots: Tensor) -> HybridCache:
        """A fresh cache of as many rows as slots (B,) int64, to read new texts into: it writes keys and values to these
        slots at once and holds the rest itself until `keep`. What it reads is text: nothing waits in a ring."""
        rows, device = len(slots), self.cursors.lengths.device
        opened = object.__new__(HybridCache)
        opened.__dict__.update(self.__dict__)
        opened.fresh, opened.window = True, 1
        opened.cursors = Cursors.zeros(rows, device)
        opened.layers = [
            replace(layer, slots=slots) if isinstance(layer, KVCache) else self._emptied(layer, rows)
            for layer in self.layers
        ]
        return opened

    def _emptied(self, layer: SSMCache, rows: int) -> SSMCache:
        emptied = SSMCache(_zeros(layer.state, rows), _zeros(layer.conv, rows), layer.A)
        if self.config.mixer_window:  # the ring's last tokens are part of a text that was read
            assert layer.ring_x is not None and layer.ring_B is not None
            emptied.ring_x, emptied.ring_B = _zeros(layer.ring_x, rows), _zeros(layer.ring_B, rows)
        return emptied

    def keep(self, opened: HybridCache, slots: Tensor) -> None:
        """Take what was read with `opened(slots)` for these slots' text."""
        self.fresh = False
        for cursor in (self.cursors.lengths, self.cursors.folded):
            cursor[slots] = opened.cursors.lengths
        for ours, theirs in zip(self.layers, opened.layers, strict=True):
            if isinstance(ours, SSMCache) and isinstance(theirs, SSMCache):
                for name, tensor in vars(theirs).items():
                    if tensor is not None and name != "A":
                        getattr(ours, name)[slots] = tensor

    def bytes(self) -> dict[str, int]:
        """Bytes held, by kind: keys and values, SSM states, convolution inputs, SSM rings."""
        sizes = {"kv": 0, "ssm": 0, "conv": 0, "ring": 0}
        for layer in self.layers:
            for name, tensor in vars(layer).items():
                if tensor is not None and name not in ("A", "slots"):
                    kind = {"k": "kv", "v": "kv", "state": "ssm", "conv": "conv"}.get(name, "ring")
                    sizes[kind] += tensor.numel() * tensor.element_size()
        return sizes


def _zeros(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros(rows, *like.shape[1:])


def state_shape(config: HybridConfig) -> tuple[int, ...]:
    """Of one sequence in one layer: (H, P, N) for Mamba-2, (d_inner, N) for Mamba-1."""
    if config.mixer == "mamba1":
        return config.d_inner, config.state_size
    return config.n_heads, config.head_dim, config.state_size


def ring_slots(config: HybridConfig, window: int) -> int:
    """Ring length for windows of `window` tokens.

    A Mamba-2 state is 200 times as large as a token's inputs, so it is written as rarely as RING slots allow; a Mamba-1
    state 14 times, and replaying costs it a pass over the state each token, so its ring is folded every round.
    """
    if config.mixer == "mamba1":
        return 2 * window
    needed = max(2 * window, window + config.mixer_window)
    return max(RING, 1 << (needed - 1).bit_length())


def cache_bytes(config: HybridConfig, batch: int, context: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes of plain decoding's state by kind: keys and values grow with the context, the rest does not. SSM states are
    float32."""
    n_attention, n_mamba = len(config.attention_layers), len(config.mamba_layers)
    state = math.prod(state_shape(config))
    return {
        "kv": batch * n_attention * 2 * config.n_kv_heads * config.head_dim * context * itemsize,
        "ssm": batch * n_mamba * state * 4,
        "conv": batch * n_mamba * config.d_conv * config.conv_channels * itemsize,
        "ring": batch * n_mamba * _ring_bytes(config, itemsize) if config.mixer_window else 0,
    }


def _ring_bytes(config: HybridConfig, itemsize: int) -> int:
    return ring_slots(config, 1) * (2 * config.d_xb * itemsize + 4 * config.n_heads)
