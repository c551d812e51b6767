"""What the teacher says of every training token, computed once and kept on disk: its likeliest successors, or draws.

The teacher is then not in memory while the student trains, and is read once however many epochs there are. Blocks are
cut once (`PackedBlocks.cut_once`), since what a teacher says of a token depends on what is before it in the block.

Legend: B rows of L tokens, T tokens, V vocabulary, k classes kept. p = softmax(teacher / τ), q = softmax(student / τ).

top_k:   ids of the k largest p_i, log p_i, and the log of the mass of all others. What is minimised is KL(p‖q) of
         distributions over k + 1 classes, all others being one. Biased: it is at most the KL over V classes, says
         nothing of how the others share their mass, and is exact for k = V alone.
samples: k draws i_1 … i_k from p and log p of each. (1/k) Σ_j (log p − log q)(i_j) is unbiased for KL(p‖q), and so is
         its gradient q − (1/k) Σ_j onehot(i_j) for q − p (2503.16870, there from draws by importance). The draws are
         systematic, one uniform number for all k: an id comes ⌊k p_i⌋ or ⌈k p_i⌉ times, which varies less than k
         independent draws.

Each id takes two bytes (four where V > 65536), each log p two.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from corpora.packing import PackedBlocks
from hybrid import HybridForCausalLM
from hybrid.compiled import compiled_blocks
from steps.config import KLConfig
from steps.distributed import own_rows
from steps.loop import BatchSource, MicroBatch, autocast
from steps.losses import head_loss
from steps.stage import Progress, StageContext
from steps.students import TokenBatch, block_batches

Kind = Literal["top_k", "samples"]

IDS, LOG_P, DONE = "ids.bin", "log_p.bin", "done"
PASS_TOKENS = 8192
"""Tokens of one pass of the teacher, at least one block: the same everywhere, so that a pass has a number."""
CHUNK = 1024
"""Tokens whose logits exist at a time, in float32."""


class TeacherCacheError(ValueError):
    """A cache that cannot be made; the message names the setting to change."""


@dataclass(frozen=True)
class CachedBatch(TokenBatch):
    """ids (B, L, k) int32 and log_p (B, L, k, or k + 1 with the others' mass) float16 besides."""

    ids: Tensor
    log_p: Tensor


class TeacherCache:
    """Arrays in `folder` that are filled block by block and then read by any number of processes."""

    def __init__(self, folder: Path, blocks: PackedBlocks, vocab_size: int, config: KLConfig, seed: int) -> None:
        kind, count = config.teacher_cache.split(":")
        self.kind: Kind = "top_k" if kind == "top_k" else "samples"
        self.k, self.temperature = int(count), config.temperature
        if self.kind == "top_k" and self.k > vocab_size:
            raise TeacherCacheError(
                f"kl_distill.teacher_cache is {config.teacher_cache}, but the vocabulary has {vocab_size} tokens"
            )
        self.folder, self.blocks, self.seed = folder, blocks, seed
        self.count = min(blocks.blocks_per_epoch, config.steps * config.batch_size)
        """Blocks that training reads."""
        self.ids = _Array(folder / IDS, (blocks.seq_len, self.k), np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        classes = self.k + (self.kind == "top_k")
        self.log_p = _Array(folder / LOG_P, (blocks.seq_len, classes), np.float16)

    @property
    def bytes(self) -> int:
        return self.count * (self.ids.block_bytes + self.log_p.block_bytes)

    @property
    def filled(self) -> int:
        """Blocks that are on the disk."""
        done = self.folder / DONE
        return int(done.read_text()) if done.is_file() else 0

    def fill(self, teacher: HybridForCausalLM, context: StageContext) -> None:
        """Compute what is not there yet. Killed at any point, it goes on from there to the same bytes."""
        first, began, free = self.filled, time.monotonic(), shutil.disk_usage(self.folder).free
        missing = self.bytes * (self.count - first) // self.count
        if missing > free:
            raise TeacherCacheError(
                f"kl_distill.teacher_cache needs {missing / 1e9:.1f} GB more in {self.folder}, which has "
                f"{free / 1e9:.1f} GB: keep fewer classes than {self.k}, or train on less"
            )
        rows = max(1, PASS_TOKENS // self.blocks.seq_len)
        with compiled_blocks(teacher), autocast(context), torch.no_grad():
            for start in range(first, self.count, rows):
                stop = min(start + rows, self.count)
                ids, log_p = self._of_blocks(teacher, start // rows, rows)
                self.ids.write(start, ids[: stop - start])
                self.log_p.write(start, log_p[: stop - start])
                part = self.folder / f"{DONE}.part"
                part.write_text(str(stop))
                part.replace(self.folder / DONE)
                rate = (stop - first) / max(time.monotonic() - began, 1e-9)
                context.progress(Progress(stop, self.count, "blocks of the teacher", rate))

    def _of_blocks(self, teacher: HybridForCausalLM, number: int, rows: int) -> tuple[Tensor, Tensor]:
        """ids and log_p, (rows, L, …) both, of the blocks of pass `number`."""
        packed = self.blocks.batch(number, rows)
        tokens, seq_idx = (torch.from_numpy(a).to(teacher.device) for a in (packed.tokens, packed.seq_idx))
        hidden = teacher.hidden(tokens, seq_idx).flatten(0, 1)
        _, places = self.blocks.places(number, rows)
        uniform = np.stack([np.random.default_rng([self.seed, block, 1]).random(tokens.shape[1]) for block in places])
        uniforms = torch.from_numpy(uniform).flatten().to(tokens.device)
        parts = []
        for start in range(0, len(hidden), CHUNK):
            logits = linear(hidden[start : start + CHUNK], teacher.lm_head_weight).float() / self.temperature
            if self.kind == "top_k":
                parts.append(likeliest(logits, self.k))
            else:
                parts.append(draws(logits, self.k, uniforms[start : start + CHUNK]))
        ids, log_p = (torch.cat(values).unflatten(0, tokens.shape) for values in zip(*parts, strict=True))
        return ids, log_p

    def batches(self, config: KLConfig) -> BatchSource:
        """Micro-batches of `CachedBatch`; of several processes each has its rows."""
        plain = block_batches(self.blocks, config)
        size = config.batch_size // config.accumulation
        rows = own_rows(size)
        ids, log_p = (array.read(self.count) for array in (self.ids, self.log_p))

        def batch(number: int) -> MicroBatch:
            made = plain(number)
            own = self.blocks.places(number, size)[1][rows]
            values = {part.name: getattr(made.data, part.name) for part in fields(made.data)}
            kept = torch.from_numpy(ids[own].astype(np.int32)), torch.from_numpy(log_p[own])
            return replace(made, data=CachedBatch(**values, ids=kept[0], log_p=kept[1]))

        return batch


@dataclass(frozen=True)
class _Array:
    """A file of blocks, one behind the other, each of `shape`."""

    path: Path
    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def block_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def write(self, block: int, values: Tensor) -> None:
        """Put blocks (n, *shape) at number `block`; they are on the disk when this returns. Unlike a mapped file, a
        full disk is an error here, not a signal."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(block * self.block_bytes)
            file.write(values.cpu().numpy().astype(self.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self, count: int) -> np.ndarray:
        """The first `count` blocks, (count, *shape), mapped."""
        return np.memmap(self.path, self.dtype, mode="r", shape=(count, *self.shape))


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids (T, k) of the largest logits (T, V), and log p (T, k + 1) of them and, last, of all others together."""
    log_p = torch.log_softmax(logits, dim=-1)
    values, ids = log_p.topk(k, dim=-1)
    others = log_p.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return ids, torch.cat([values, others], dim=-1)


def draws(logits: Tensor, k: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """k systematic draws from softmax(logits (T, V)): ids (T, k), log p of each (T, k).

    uniforms (T,) in [0, 1). Draw j is where the cumulated distribution passes (j + u) / k.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    cumulated = log_p.double().exp().cumsum(-1)
    wanted = (torch.arange(k, device=logits.device) + uniforms[:, None]) / k
    # All but the last sum, which is 1 but for rounding: whatever lies above them is the last class.
    ids = torch.searchsorted(cumulated[:, :-1].contiguous(), wanted, right=True)
    return ids, log_p.gather(1, ids)


def cached_kl_loss(
    hidden: Tensor,
    head: Tensor,
    batch: CachedBatch,
    kind: Kind,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """Mean over the tokens of batch.mask of the forward divergence to what is cached, in nats, times τ², plus ce_weight
    times the cross entropy on batch.targets. hidden (B, L, d), head (V, d)."""

    def loss(logits: Tensor, weights: Tensor, values: Sequence[Tensor], gradient: bool) -> Tensor:
        ids, log_p, labels = values
        return cached_divergence_(
            logits, ids, log_p, weights, kind, temperature, labels if ce_weight else None, ce_weight, gradient
        )

    return head_loss(hidden, head, batch.mask, [batch.ids, batch.log_p, batch.targets], loss, CHUNK)


def cached_divergence_(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    weights: Tensor,
    kind: Kind,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    gradient: bool = True,
) -> Tensor:
    """τ² · forward divergence to the cached p + ce_weight · cross entropy of each token: (T,), not weighted.

    logits (T, V) become d(Σ weights · losses)/d logits unless `gradient` is false; ids, log_p as `likeliest` and
    `draws` give them; weights (T,): a token of weight 0 has loss 0 and gradient 0; labels (T,) for the cross entropy.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids, log_p = ids.long(), log_p.to(wide.dtype)
    log_q = torch.log_softmax(wide / temperature, dim=-1)
    kept = log_q.gather(1, ids)
    if kind == "samples":
        value = (log_p - kept).mean(-1)
        grad = log_q.exp().scatter_add_(1, ids, torch.full_like(kept, -1 / ids.shape[1])) if gradient else None
    else:
        log_p = torch.log_softmax(log_p, dim=-1)  # rounded on the disk
        p, others = log_p.exp(), log_p[:, -1:]
        # Where no mass is left (k = V), there is no class of others.
        surplus = others - log_q.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        surplus = surplus.masked_fill(others == float("-inf"), float("-inf"))
        value = (p[:, :-1] * (log_p[:, :-1] - kept)).sum(-1) + (p[:, -1:] * surplus).nan_to_num(0.0).sum(-1)
        grad = None
        if gradient:
            # Among the others p is taken to share its mass as q does: q_i · p_others / q_others.
            grad = log_q.exp() - (log_q + surplus).exp()
            grad.scatter_(1, ids, kept.exp() - p[:, :-1])
    losses = value * temperature**2
    if grad is not None and temperature != 1.0:
        grad *= temperature
    if labels is not None:
        losses = losses + ce_weight * cross_entropy(wide, labels, reduction="none")
        if grad is not None:
            grad.add_(torch.softmax(wide, dim=-1), alpha=ce_weight)
            grad.scatter_add_(1, labels[:, None], grad.new_full((1, 1), -ce_weight).expand(len(grad), 1))
    unused = weights == 0
    if grad is not None:
        logits.copy_((grad * weights[:, None]).masked_fill_(unused[:, None], 0.0))
    return losses.masked_fill(unused, 0.0)
