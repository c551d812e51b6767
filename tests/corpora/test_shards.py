from __future__ import annotations

import numpy as np
import pytest

from corpora.shards import Shard, ShardError, held_out, text_key


def make():
    documents = [np.array([1, 2, 3], np.uint32), np.array([4], np.uint32)]
    return Shard.of(documents, ["a", "längere id"], [np.array([False, True, True]), np.array([False])])


def test_save_and_load_give_the_same_shard_and_the_same_bytes(tmp_path):
    for name in ("one.npz", "two.npz"):
        make().save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = Shard.load(tmp_path / "one.npz")
    assert loaded.tokens.tolist() == [1, 2, 3, 4] and loaded.tokens.dtype == np.uint32
    assert loaded.starts.tolist() == [0, 3, 4] and loaded.starts.dtype == np.int64
    assert loaded.assistant.tolist() == [False, True, True, False]
    assert loaded.ids.tolist() == ["a", "längere id"] and len(loaded) == 2
    assert loaded.document(1).tolist() == [4]


def test_no_documents_make_an_empty_shard():
    assert len(Shard.of([], [])) == 0 and len(Shard.of([], []).tokens) == 0


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ShardError, match="there is no such shard"):
        Shard.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ShardError, match=r"x\.npz: is no token shard"):
        Shard.load(path)
    good = make()
    Shard(good.tokens, good.starts[:-1], good.assistant, good.ids).save(path)
    with pytest.raises(ShardError, match="do not fit together"):
        Shard.load(path)


def test_held_out_is_stable_under_growth_and_depends_on_the_seed():
    ids = [f"c{i}" for i in range(200)]
    chosen = {ids[i] for i in held_out(ids, 20, seed=0)}
    grown = ["new", *ids]
    assert len(chosen) == 20
    assert len(chosen - {grown[i] for i in held_out(grown, 20, seed=0)}) <= 1
    assert chosen != {ids[i] for i in held_out(ids, 20, seed=1)}


@pytest.mark.parametrize("count", [0, 3, 4])
def test_held_out_leaves_something_to_train_on(count):
    with pytest.raises(ShardError, match=f"{count} held-out conversations wanted of 3"):
        held_out(["a", "b", "c"], count, seed=0)


def test_text_key_looks_past_white_space_only():
    assert text_key("a  b\n") == text_key("a b") != text_key("a B")
