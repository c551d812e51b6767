from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import subject_of

from corpora.shards import Shard
from evals import fidelity
from evals.fidelity import Block
from evals.head import EvaluationError
from steps.config import BenchmarkConfig


def documents(lengths: list[int], vocab: int = 61) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, n).astype(np.uint32) for n in lengths]


def shard(path: Path, lengths: list[int]) -> Path:
    Shard.of(documents(lengths), [f"d{i}" for i in range(len(lengths))]).save(path)
    return path


def by_hand(model: torch.nn.Module, block: Block) -> torch.Tensor:
    """Log-probabilities (T, V) in float64 of the scored tokens, from the model's full logits, one document alone."""
    tokens = torch.tensor(block.tokens.astype(np.int64))[None]
    return model(tokens)[0].double().log_softmax(-1)[block.first - 1 : -1]


def test_scores_equal_float64_by_hand_for_unequal_documents(teacher, student):
    lengths = [37, 5, 150, 2, 64]
    blocks = [
        Block(f"b{i}", f"d{i // 2}", d, 1 + i % 2) for i, d in enumerate(documents(lengths)) if len(d) > 1 + i % 2
    ]
    scores = fidelity.token_scores(student, blocks, teacher, batch_size=2)
    assert [s.block.item for s in scores] == [b.item for b in blocks]
    for block, score in zip(blocks, scores, strict=True):
        p, q = by_hand(teacher, block), by_hand(student, block)
        targets = torch.tensor(block.tokens[block.first :].astype(np.int64))[:, None]
        np.testing.assert_allclose(score.kl, (p.exp() * (p - q)).sum(-1).numpy(), atol=2e-5)
        np.testing.assert_allclose(score.nll, -q.gather(-1, targets)[:, 0].numpy(), atol=2e-5)
        np.testing.assert_allclose(score.teacher_nll, -p.gather(-1, targets)[:, 0].numpy(), atol=2e-5)
        np.testing.assert_array_equal(score.top1, (p.argmax(-1) == q.argmax(-1)).double().numpy())


def test_chunks_do_not_show(teacher, student, monkeypatch):
    blocks = [Block("b", "d", documents([100])[0])]
    whole = fidelity.token_scores(student, blocks, teacher)[0]
    monkeypatch.setattr(fidelity, "chunk_tokens", lambda device: 7)
    chunked = fidelity.token_scores(student, blocks, teacher)[0]
    np.testing.assert_allclose(chunked.kl, whole.kl, atol=1e-6)
    assert len(chunked.kl) == 99


def test_a_model_does_not_diverge_from_itself(teacher):
    scores = fidelity.token_scores(teacher, [Block("b", "d", documents([50])[0])], teacher)
    summary = fidelity.summarise(scores)
    assert summary["kl_mean"] == summary["kl_p99"] == 0.0
    assert summary["top1"] == summary["ppl_ratio"] == 1.0


def test_stored_teacher_states_give_the_same(teacher, student):
    blocks = [Block(f"b{i}", f"d{i}", d) for i, d in enumerate(documents([20, 33, 9]))]
    stored = fidelity.hidden_states(teacher, blocks, batch_size=2)
    assert [tuple(s.shape) for s in stored] == [(20, 24), (33, 24), (9, 24)]
    a = fidelity.token_scores(student, blocks, teacher, teacher_hidden=stored)
    b = fidelity.token_scores(student, blocks, teacher)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.kl, y.kl, atol=1e-6)


def test_summary_of_hand_made_scores():
    def scores(document: str, nll: list[float], teacher: list[float], kl: list[float], top1: list[float]):
        block = Block(document, document, np.zeros(len(nll) + 1, np.uint32))
        return fidelity.TokenScores(block, *(np.array(v) for v in (nll, teacher, kl, top1)))

    found = fidelity.summarise(
        [
            scores("a", [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3], [1, 0, 1]),
            scores("b", [2.0], [1.0], [0.4], [0]),
        ]
    )
    assert found["kl_mean"] == pytest.approx(0.25)
    assert found["kl_p50"] == pytest.approx(0.25)
    assert found["top1"] == 0.5
    assert found["ppl"] == pytest.approx(np.exp(2.0))
    assert found["ppl_ratio"] == pytest.approx(np.exp(1.0))
    assert (found["tokens"], found["documents"]) == (4, 2)
    # Cluster residuals ±(0.6 − 3·0.25): √(2/1 · 2 · 0.15²) / 4
    assert found["kl_se"] == pytest.approx(np.sqrt(4) * 0.15 / 4)


def test_clustered_error_of_equal_documents_is_that_of_their_means():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=10) + shift for shift in rng.normal(size=8)]
    means = np.array([v.mean() for v in values])
    expected = means.std(ddof=1) / np.sqrt(8)
    assert fidelity.clustered_error(values, list("abcdefgh")) == pytest.approx(expected)
    assert fidelity.clustered_error(values, ["a"] * 8) is None


def test_by_position_averages_each_stretch_over_its_tokens():
    def scores(first: int, values: list[float], kl: float | None) -> fidelity.TokenScores:
        nll = np.array(values)
        other = None if kl is None else np.full(len(nll), kl)
        block = Block("b", "d", np.zeros(first + len(values), np.uint32), first)
        return fidelity.TokenScores(block, nll, other, other, other)

    # Stretches begin at 1, 2, 4, 5 and 8 and the last one ends where the longest block does.
    found = fidelity.by_position([scores(1, [8.0, 1.0, 3.0], 0.5), scores(4, [4.0, 5.0, 6.0, 7.0, 9.0], 0.25)])
    assert [(f["from"], f["to"], f["nll"], f["n"]) for f in found] == [
        (1, 2, 8.0, 1), (2, 4, 2.0, 2), (4, 5, 4.0, 1), (5, 8, 6.0, 3), (8, 9, 9.0, 1),
    ]  # fmt: skip
    assert [f["kl"] for f in found] == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert set(found[0]) == {"from", "to", "kl", "kl_se", "nll", "teacher_nll", "top1", "n", "documents"}
    assert {(f["kl_se"], f["documents"]) for f in found} == {(None, 1)}
    alone = fidelity.by_position([scores(5, [2.0, 4.0], None)])
    assert alone == [{"from": 5, "to": 7, "nll": 3.0, "n": 2, "documents": 1}]


def test_the_error_at_a_position_counts_the_documents_that_reach_it():
    def scores(document: str, first: int, kl: list[float]) -> fidelity.TokenScores:
        values = np.array(kl)
        block = Block(f"{document}@{first}", document, np.zeros(first + len(kl), np.uint32), first)
        return fidelity.TokenScores(block, values, values, values, values)

    found = fidelity.by_position(
        [scores("a", 1, [1.0, 2.0, 4.0]), scores("b", 1, [3.0, 6.0, 2.0]), scores("a", 1, [9.0]), scores("c", 2, [7.0])]
    )
    assert [(f["from"], f["n"], f["documents"]) for f in found] == [(1, 3, 2), (2, 5, 3)]
    one, two = ([np.array(v) for v in values] for values in ([[1.0], [3.0], [9.0]], [[2.0, 4.0], [6.0, 2.0], [7.0]]))
    assert found[0]["kl_se"] == fidelity.clustered_error(one, ["a", "b", "a"])
    assert found[1]["kl_se"] == fidelity.clustered_error(two, ["a", "b", "c"])


def test_by_position_adds_up_to_the_summary(teacher, student):
    blocks = [Block(f"b{i}", f"d{i}", d, 1 + 7 * i) for i, d in enumerate(documents([120, 64, 33]))]
    scores = fidelity.token_scores(student, blocks, teacher)
    whole, parts = fidelity.summarise(scores), fidelity.by_position(scores)
    assert sum(p["n"] for p in parts) == whole["tokens"]
    assert all(a["to"] <= b["from"] for a, b in zip(parts, parts[1:], strict=False))
    for name, total in (("kl", whole["kl_mean"]), ("top1", whole["top1"]), ("nll", np.log(whole["ppl"]))):
        assert sum(p["n"] * p[name] for p in parts) / whole["tokens"] == pytest.approx(total)


def test_every_text_of_the_corpus_is_measured(teacher, student, tmp_path):
    shard(tmp_path / "held_out.npz", [30, 8, 50])
    shard(tmp_path / "natural.npz", [70, 25])
    config = BenchmarkConfig(held_out_conversations=2, seq_len=32, skip_positions=10, natural_tokens=60)
    said: list[tuple[float, str]] = []
    subject = subject_of(student, teacher, tmp_path, lambda share, phrase: said.append((share, phrase)))
    found = fidelity.measure(subject, config)
    assert list(found.summary) == ["held_out", "natural"]
    blocks = fidelity.conversation_blocks(tmp_path / "held_out.npz", 2, 32, 10)
    expected = fidelity.token_scores(student, blocks, teacher, batch_size=2)
    assert found.summary["held_out"] == fidelity.summarise(expected) | {"by_position": fidelity.by_position(expected)}
    assert found.records[: 3 * len(blocks)] == fidelity.score_records(expected, "held_out")
    assert {r["benchmark"] for r in found.records} == {"held_out", "natural"}
    assert [share for share, _ in said] == [0.5, 1.0]
    assert said[0][1] == f"held_out ppl {found.summary['held_out']['ppl']:.3g}"
    only = fidelity.measure(subject, config.model_copy(update={"natural_tokens": 0}))
    assert list(only.summary) == ["held_out"]


def test_teacher_alone_has_perplexity_only(teacher):
    scores = fidelity.token_scores(teacher, [Block("b", "d", documents([30])[0])])
    assert set(fidelity.summarise(scores)) == {"ppl", "tokens", "documents"}
    assert [r["metric"] for r in fidelity.score_records(scores, "held_out")] == ["nll"]


def test_conversation_blocks_cut_skip_and_count(tmp_path):
    path = shard(tmp_path / "held_out.npz", [30, 8, 50, 40])
    blocks = fidelity.conversation_blocks(path, 2, seq_len=32, skip=10)
    assert [(b.document, len(b.tokens), b.first) for b in blocks] == [("d0", 30, 10), ("d2", 32, 10)]
    assert fidelity.conversation_blocks(path, 1, 32, 0)[0].first == 1
    with pytest.raises(EvaluationError, match="lower skip_positions"):
        fidelity.conversation_blocks(path, 2, 32, 60)


def test_text_blocks_take_every_document_before_going_deeper(tmp_path):
    path = shard(tmp_path / "natural.npz", [100, 25, 1, 70])
    blocks = fidelity.text_blocks(path, 150, seq_len=40)
    assert [(b.item, len(b.tokens)) for b in blocks] == [
        ("d0@0", 40), ("d1@0", 25), ("d3@0", 40), ("d0@40", 40), ("d3@40", 5),
    ]  # fmt: skip
    assert sum(len(b.tokens) for b in blocks) == 150
    whole = documents([100, 25, 1, 70])[0]
    np.testing.assert_array_equal(blocks[3].tokens, whole[40:80])


def test_broken_output_is_refused(teacher, student):
    class Broken(torch.nn.Module):
        lm_head_weight = student.lm_head_weight

        def hidden(self, tokens):
            return student.hidden(tokens).index_fill(1, torch.tensor([5]), float("nan"))

    with pytest.raises(EvaluationError, match="b7: scores are not finite"):
        fidelity.token_scores(Broken(), [Block("b7", "d", documents([30])[0])], teacher)


def test_hash_tells_text_and_scored_range_apart():
    a, b = documents([10, 10])
    assert Block("x", "d", a).hash == Block("y", "e", a.astype(np.int64)).hash
    assert len({Block("x", "d", a).hash, Block("x", "d", b).hash, Block("x", "d", a, 2).hash}) == 3


def test_quick_fidelity_is_the_summary_of_the_first_documents(teacher, student, tmp_path):
    path = shard(tmp_path / "held_out.npz", [30, 40, 50])
    found = fidelity.quick_fidelity(teacher, student, path, documents=2, seq_len=32, skip=4)
    blocks = fidelity.conversation_blocks(path, 2, 32, 4)
    whole = fidelity.summarise(fidelity.token_scores(student, blocks, teacher))
    assert found == {"kl": pytest.approx(whole["kl_mean"]), "top1": whole["top1"]}
    stored = fidelity.hidden_states(teacher, blocks, 4)
    again = fidelity.quick_fidelity(teacher, student, path, 2, 32, 4, teacher_hidden=stored)
    assert again["kl"] == pytest.approx(found["kl"], abs=1e-6)


def test_autocast_around_a_measurement_does_not_coarsen_it(teacher, student):
    blocks = [Block("b", "d", documents([40])[0])]
    stored = fidelity.hidden_states(teacher, blocks, 1)
    hidden = fidelity.hidden_states(student, blocks, 1)[0]

    class Frozen(torch.nn.Module):
        lm_head_weight = student.lm_head_weight

        def hidden(self, tokens):
            return hidden[None]

    plain = fidelity.token_scores(Frozen(), blocks, teacher, teacher_hidden=stored)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fidelity.token_scores(Frozen(), blocks, teacher, teacher_hidden=stored)[0]
    np.testing.assert_array_equal(inside.kl, plain.kl)
