"""Documents packed into blocks of one length, addressed by step number.

Nothing is kept between batches: (seed, step) says which tokens a batch holds, so a run that was killed goes on at the
same position. An epoch is the documents in a shuffled order, cut into blocks; what is left over at its end is not used.

Shapes: B sequences of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from corpora.shards import Shard, ShardError


@dataclass(frozen=True)
class Batch:
    """One batch of packed blocks; all arrays (B, L).

    tokens:         int64.
    targets:        int64, the document's next token, also across a block's end; 0 where loss_mask is False.
    seq_idx:        int32, number of the document within the row, from 0.
    loss_mask:      bool, True where the next token belongs to the same document (so `targets` holds).
    assistant:      bool, True where the token itself is part of a reply.
    assistant_loss: bool, True where loss_mask holds and the target is part of a reply: what SFT scores.
    documents:      ids of the documents in the batch, in order of appearance.
    epoch:          epoch of the batch's first block, from 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    seq_idx: np.ndarray
    loss_mask: np.ndarray
    assistant: np.ndarray
    assistant_loss: np.ndarray
    documents: tuple[str, ...]
    epoch: int


class PackedBlocks:
    """Endless batches of a shard in blocks of `seq_len`; each epoch shuffles the documents anew from (seed, epoch).

    cut_once: the blocks of the first epoch are those of all; later epochs shuffle blocks, not documents, so that what
    is known of a block stays true.
    """

    def __init__(self, shard: Shard, seq_len: int, seed: int, cut_once: bool = False):
        self.shard, self.seq_len, self.seed, self.cut_once = shard, seq_len, seed, cut_once
        self.blocks_per_epoch = len(shard.tokens) // seq_len
        if not self.blocks_per_epoch:
            raise ShardError(
                f"{len(shard.tokens)} tokens do not fill one block of {seq_len}; add data or shorten seq_len"
            )
        self._lengths = np.diff(shard.starts)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of optimiser step `step` (from 0): blocks step·B … step·B + B − 1 of the endless stream."""
        epochs, places = self.places(step, batch_size)
        cuts = np.zeros_like(epochs) if self.cut_once else epochs
        parts = [self._blocks(int(e), places[cuts == e]) for e in np.unique(cuts)]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        tokens, targets, seq_idx, loss_mask, assistant, assistant_loss, documents = joined
        order = documents.ravel()
        appearing = order[np.sort(np.unique(order, return_index=True)[1])]
        ids = tuple(str(i) for i in self.shard.ids[appearing])
        return Batch(tokens, targets, seq_idx, loss_mask, assistant, assistant_loss, ids, int(epochs[0]))

    def places(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch (B,) of each block of the batch, and which block (B,) of that epoch it is; of the first, if blocks are
        cut once."""
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), self.blocks_per_epoch)
        if self.cut_once:
            for epoch in np.unique(epochs[epochs > 0]):
                order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks_per_epoch)
                places[epochs == epoch] = order[places[epochs == epoch]]
        return epochs, places

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of documents (n,) and where each begins in the epoch's stream, with its end (n+1,)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard))
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(self._lengths[order], out=starts[1:])
        return order, starts

    def _blocks(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of a Batch for blocks `numbers` of one epoch, and (B, L) which document each token belongs to."""
        order, starts = self._epoch(epoch)
        position = numbers[:, None] * self.seq_len + np.arange(self.seq_len)  # (B, L) in the epoch's stream
        slot = np.searchsorted(starts, position, side="right") - 1  # (B, L) place in the order; empty documents skipped
        document = order[slot]
        source = self.shard.starts[document] + position - starts[slot]  # (B, L) in the shard
        loss_mask = position + 1 < starts[slot + 1]
        following = np.where(loss_mask, source + 1, 0)
        starts_document = np.zeros(slot.shape, np.int32)
        starts_document[:, 1:] = slot[:, 1:] != slot[:, :-1]
        return (
            self.shard.tokens[source].astype(np.int64),
            np.where(loss_mask, self.shard.tokens[following], 0).astype(np.int64),
            np.cumsum(starts_document, axis=1, dtype=np.int32),
            loss_mask,
            self.shard.assistant[source],
            self.shard.assistant[following] & loss_mask,
            document,
        )
