from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from corpora.recall import recall_texts
from corpora.shards import Shard
from evals.head import EvaluationError
from hybrid import HybridForCausalLM, attention_layers, load_pretrained, save_pretrained
from steps import init_from_attention, layer_scores
from steps.config import InitConfig, InitStageConfig, LayerScoresStageConfig
from steps.layer_scores import attention_of, passes, rank, training_blocks
from tests.corpora import tiny
from tests.steps import tiny_stages

START = InitConfig(tokens=256, batch_size=2, seq_len=64)
RESTORE = LayerScoresStageConfig(method="restore", sequences=5, seq_len=72, init=START, batch_size=2)
RECALL = LayerScoresStageConfig(method="recall", sequences=3, pairs=6, init=START, batch_size=2)
NEEDED = 1


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> dict[str, Path]:
    """The attention of layer 1 says something; that of the two others next to nothing."""
    folders = tiny_stages.upstream(tmp_path_factory.mktemp("upstream"))
    teacher = load_pretrained(folders["teacher"])
    with torch.no_grad():
        for number, block in enumerate(teacher.blocks):
            block.self_attn.o_proj.weight.mul_(4.0 if number == NEEDED else 0.01)
    save_pretrained(teacher, folders["teacher"].with_name("changed"), tokenizer_from=folders["teacher"])
    return folders | {"teacher": folders["teacher"].with_name("changed")}


@pytest.fixture(scope="module")
def models(upstream) -> tuple[HybridForCausalLM, HybridForCausalLM]:
    """Teacher, and the student without attention that its layers are tried in."""
    context = tiny_stages.context(Path())
    teacher = load_pretrained(upstream["teacher"])
    student = init_from_attention.build(START, teacher, (), "copy", context.seed)
    init_from_attention.calibrate(START, teacher, student, upstream, context)
    return teacher, student


def run(config, upstream, out):
    return layer_scores.run(config, upstream, out, tiny_stages.context(out))


def composed(teacher, student, kept):
    """A model of its own with the weights of both, made without `attention_of`."""
    weights = dict(student.named_parameters())
    weights |= {n: p for n, p in teacher.named_parameters() if n.startswith(tuple(f"model.layers.{i}." for i in kept))}
    model = HybridForCausalLM(replace(student.config, attention_layers=tuple(kept)))
    names = {name for name, _ in model.named_parameters()}
    model.load_state_dict({n: p for n, p in weights.items() if n in names})
    return model


# The ranking, on losses that are given


def losses(worth, redundant=()):
    """A loss that falls by worth[i] if layer i keeps its attention; of redundant ones only the first kept counts."""
    asked = []

    def of(kept):
        asked.append(kept)
        counted = set(kept) - set(sorted(set(redundant) & kept)[1:])
        return [np.full(3, 10.0 - sum(worth[i] for i in counted)), np.full(1, 10.0 - sum(worth[i] for i in counted))]

    of.asked = asked
    return of


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("rounds", [1, 2, 4, 9])
def test_ranking_by_what_each_layer_is_worth(forward, rounds):
    given = losses([1.0, 5.0, -2.0, 3.0])
    scores = rank(given, 4, rounds, forward=forward)
    assert [s.layer for s in scores] == [1, 3, 0, 2]
    assert [s.score for s in scores] == pytest.approx([5.0, 3.0, 1.0, -2.0])
    assert [s.se for s in scores] == pytest.approx([0.0] * 4, abs=1e-9)
    assert len(given.asked) == passes(4, rounds) == {1: 5, 2: 8, 4: 14, 9: 14}[rounds]
    rounds_taken = [s.round for s in scores]
    assert rounds_taken == sorted(rounds_taken, reverse=not forward)


def test_a_second_round_sees_what_the_first_made_superfluous():
    given = losses([1.0, 5.0, 4.9, 3.0], redundant=(1, 2))
    assert [s.layer for s in rank(given, 4, 1, forward=True)] == [1, 2, 3, 0]
    assert [s.layer for s in rank(given, 4, 4, forward=True)] == [1, 3, 0, 2]
    # With all attention in place either of the two seems superfluous; once one has gone, the other is not.
    assert [s.layer for s in rank(given, 4, 1, forward=False)] == [3, 0, 1, 2]
    assert [s.layer for s in rank(given, 4, 4, forward=False)] == [1, 3, 0, 2]


# The stage


def test_restore_finds_the_layer_whose_attention_does_the_work(upstream, tmp_path):
    summary = run(RESTORE, upstream, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == summary
    best, *others = summary["layers"]
    assert summary["ranking"][0] == best["layer"] == NEEDED
    assert sorted(summary["ranking"]) == [0, 1, 2]
    assert best["score"] > 20 * max(abs(s["score"]) for s in others)
    assert 0 < best["score"] <= summary["start"] and best["se"] > 0
    assert (summary["texts"], summary["passes"]) == (5, 4)
    assert run(RESTORE, upstream, tmp_path)["layers"] == summary["layers"]


def test_restore_by_hand(upstream, models, tmp_path):
    teacher, student = models
    summary = run(RESTORE, upstream, tmp_path)

    def kl(kept):
        model, values = composed(teacher, student, kept), []
        for block in training_blocks(upstream["corpus"] / "train.npz", 5, 72, seed=3):
            text = torch.from_numpy(block.tokens.astype(np.int64))[None]
            log_p, log_q = (log_softmax(m(text)[0, 39:-1].double(), -1) for m in (teacher, model))
            values.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(values)

    start = kl(())
    assert (summary["start"], summary["tokens"]) == (pytest.approx(start.mean().item(), rel=1e-4), len(start))
    for s in summary["layers"]:
        assert s["score"] == pytest.approx((start - kl((s["layer"],))).mean().item(), rel=1e-3, abs=1e-6)


def test_recall_by_hand(upstream, models, tmp_path):
    teacher, student = models
    summary = run(RECALL, upstream, tmp_path)
    texts = recall_texts(tiny.tokenizer(), 3, 6, seed=3)

    def nll(kept):
        model, values = composed(teacher, student, kept), []
        for text in texts:
            tokens = torch.from_numpy(text.tokens)
            log_q = log_softmax(model(tokens[None])[0].double(), -1)
            values += [-log_q[at - 1, tokens[at]] for at in np.flatnonzero(text.asked)]
        return torch.stack(values)

    start = nll((0, 1, 2))
    assert (summary["start"], summary["tokens"]) == (pytest.approx(start.mean().item(), rel=1e-5), 18)
    for s in summary["layers"]:
        without = nll(tuple({0, 1, 2} - {s["layer"]}))
        assert s["score"] == pytest.approx((without - start).mean().item(), rel=1e-3, abs=1e-5)
    assert [s["score"] for s in summary["layers"]] == sorted((s["score"] for s in summary["layers"]), reverse=True)


def test_half_precision_gives_the_same_first_layer(upstream, tmp_path):
    summary = layer_scores.run(RESTORE, upstream, tmp_path, tiny_stages.context(tmp_path, "bfloat16"))
    assert summary["ranking"][0] == NEEDED


def test_a_borrowed_layer_is_given_back(models):
    teacher, student = models
    own = list(student.blocks)
    with attention_of(student, teacher, {0, 2}) as model:
        assert [b.is_attention for b in model.blocks] == [True, False, True]
    assert list(student.blocks) == own


def test_only_training_documents_are_read_in_an_order_of_the_seed(upstream):
    shard = upstream["corpus"] / "train.npz"
    documents = {str(name): Shard.load(shard).document(i) for i, name in enumerate(Shard.load(shard).ids)}
    blocks = training_blocks(shard, 5, 72, seed=3)
    for block in blocks:
        assert block.tokens.tolist() == documents[block.document][:72].tolist()
    assert [b.item for b in blocks] == [b.item for b in training_blocks(shard, 9, 72, seed=3)][:5]
    assert [b.item for b in blocks] != [b.item for b in training_blocks(shard, 5, 72, seed=4)]
    with pytest.raises(EvaluationError, match="none of 12 documents has more than 40 tokens"):
        training_blocks(shard, 5, 40, seed=3)


# What is made of the ranking


def init(upstream, folder, attention, ranking=None):
    inputs = dict(upstream)
    if ranking:
        (folder / "scores").mkdir(exist_ok=True)
        (folder / "scores" / "scores.json").write_text(json.dumps({"method": "restore", "ranking": ranking}))
        inputs["layer_scores"] = folder / "scores"
    config = InitStageConfig(**START.model_dump(exclude={"measure_paper"}), measure_paper=False, attention=attention)
    return init_from_attention.run(config, inputs, folder, tiny_stages.context(folder))


def test_a_variant_keeps_the_first_of_the_ranking_and_says_so(upstream, tmp_path):
    summary = init(upstream, tmp_path, "1/2", [2, 0, 1])
    assert summary["attention_layers"] == [2]
    assert load_pretrained(tmp_path).config.attention_layers == (2,)
    assert summary["layer_choice"] == {"method": "restore", "ranking": [2, 0, 1]}


def test_without_scores_ratios_interleave(upstream, tmp_path):
    summary = init(upstream, tmp_path, "1/2")
    assert (summary["attention_layers"], summary["layer_choice"]) == ([1], None)


def test_one_ranking_serves_every_budget():
    ranking = np.random.default_rng(0).permutation(30).tolist()
    half, quarter, eighth = (set(attention_layers(ratio, 30, ranking)) for ratio in ("1/2", "1/4", "1/8"))
    assert eighth < quarter < half and eighth == set(ranking[:3])
    assert [len(kept) for kept in (half, quarter, eighth)] == [15, 7, 3]
    for listed in ("0", "1", [4, 2]):
        assert attention_layers(listed, 30, ranking) == attention_layers(listed, 30)
