from __future__ import annotations

import numpy as np
import pytest

from corpora.packing import PackedBlocks
from corpora.shards import Shard, ShardError


def shard_of(lengths, seed=0):
    """Documents whose tokens are all different, so that a token says where it comes from."""
    random = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end, dtype=np.uint32) for end, n in zip(ends, lengths, strict=True)]
    masks = [random.random(n) < 0.5 for n in lengths]
    return Shard.of(documents, [f"d{i}" for i in range(len(lengths))], masks)


@pytest.fixture
def shard():
    return shard_of([5, 1, 12, 3, 9, 30, 2, 7])  # 69 tokens


def test_an_epoch_uses_every_token_once_but_the_last_partial_block(shard):
    packed = PackedBlocks(shard, 8, seed=3)
    assert packed.blocks_per_epoch == 8
    for epoch in range(2):
        seen = np.concatenate([packed.batch(step, 2).tokens.ravel() for step in range(4 * epoch, 4 * epoch + 4)])
        assert len(np.unique(seen)) == 64


def test_rows_are_the_shuffled_documents_end_to_end(shard):
    packed = PackedBlocks(shard, 8, seed=3)
    stream = packed.batch(0, 8).tokens.ravel()
    order = np.random.default_rng([3, 0]).permutation(len(shard))
    assert stream.tolist() == np.concatenate([shard.document(i) for i in order])[:64].tolist()


def test_boundaries_targets_and_masks(shard):
    batch = PackedBlocks(shard, 8, seed=1).batch(0, 8)
    document = np.searchsorted(shard.starts, batch.tokens, side="right") - 1
    changes = np.concatenate([np.zeros((8, 1), bool), document[:, 1:] != document[:, :-1]], axis=1)
    assert (batch.seq_idx == np.cumsum(changes, axis=1)).all() and batch.seq_idx.dtype == np.int32
    is_last = np.isin(batch.tokens, shard.starts[1:] - 1)
    assert (batch.loss_mask == ~is_last).all()
    assert (batch.targets[batch.loss_mask] == batch.tokens[batch.loss_mask] + 1).all()
    assert (batch.targets[~batch.loss_mask] == 0).all()
    assert (batch.assistant == shard.assistant[batch.tokens]).all()
    assert (batch.assistant_loss == (batch.loss_mask & shard.assistant[batch.targets])).all()
    assert batch.documents[0] == f"d{document[0, 0]}" and len(set(batch.documents)) == len(batch.documents)
    assert {f"d{i}" for i in document.ravel()} == set(batch.documents)


def test_a_batch_depends_on_seed_and_step_alone(shard):
    fresh, used = PackedBlocks(shard, 8, seed=5), PackedBlocks(shard, 8, seed=5)
    for step in range(9):
        used.batch(step, 3)
    for step in (9, 2, 30):
        assert (fresh.batch(step, 3).tokens == used.batch(step, 3).tokens).all()
    assert (PackedBlocks(shard, 8, seed=6).batch(0, 8).tokens != fresh.batch(0, 8).tokens).any()


def test_a_batch_over_an_epochs_end_takes_both_shuffles(shard):
    packed = PackedBlocks(shard, 8, seed=2)
    both = packed.batch(1, 5)  # blocks 5, 6, 7 of epoch 0 and 0, 1 of epoch 1
    assert (both.tokens[:3] == packed.batch(0, 8).tokens[5:]).all()
    assert (both.tokens[3:] == packed.batch(1, 8).tokens[:2]).all()
    assert both.epoch == 0 and packed.batch(1, 8).epoch == 1
    assert (packed.batch(1, 8).tokens != packed.batch(0, 8).tokens).any()


def test_blocks_that_are_cut_once_come_in_another_order_later(shard):
    once, anew = (PackedBlocks(shard, 8, seed=2, cut_once=cut) for cut in (True, False))
    first = once.batch(0, 8)
    assert once.blocks_per_epoch == 8 and (first.tokens == anew.batch(0, 8).tokens).all()
    orders = [once.places(epoch, 8)[1].tolist() for epoch in (0, 1, 2)]
    assert orders[0] == list(range(8)) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3
    for epoch in (1, 2):
        batch = once.batch(epoch, 8)
        assert batch.epoch == epoch
        for name in ("tokens", "targets", "seq_idx", "loss_mask", "assistant", "assistant_loss"):
            assert (getattr(batch, name) == getattr(first, name)[orders[epoch]]).all(), name
    both = once.batch(1, 5)
    assert (both.tokens == first.tokens[[5, 6, 7, *orders[1][:2]]]).all() and both.epoch == 0


def test_empty_documents_do_no_harm():
    shard = shard_of([4, 0, 0, 5, 0, 7])
    batch = PackedBlocks(shard, 4, seed=0).batch(0, 4)
    assert sorted(batch.tokens.ravel()) == list(range(16))
    assert set(batch.documents) == {"d0", "d3", "d5"}


def test_too_few_tokens_are_refused():
    with pytest.raises(ShardError, match="10 tokens do not fill one block of 16"):
        PackedBlocks(shard_of([10]), 16, seed=0)
