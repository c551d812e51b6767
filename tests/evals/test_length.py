from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import subject_of, tiny

from corpora.shards import Shard, ShardError
from evals import length, rows
from evals.head import EvaluationError, Head
from evals.stats import compare
from steps.config import LengthConfig

# Documents of so many tokens, named by them; training length 32, so 20 times it is 640.
SIZES = [700, 90, 300, 1, 150]
CONFIG = LengthConfig(documents=4, last_tokens=20, last_documents=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    Shard.of([rng.integers(3, 61, n).astype(np.uint32) for n in SIZES], map(str, SIZES)).save(folder / "natural.npz")
    return folder


@pytest.fixture(scope="module")
def found(student, corpus):
    return length.measure(subject_of(student, None, corpus), CONFIG)


def by_hand(model, tokens) -> np.ndarray:
    """−ln p of tokens[1:], float64, the whole text read at once."""
    logits = model(torch.tensor(np.asarray(tokens, np.int64))[None])[0].double()
    targets = torch.tensor(tokens[1:].astype(np.int64))
    return torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none").numpy()


def document(corpus, size) -> np.ndarray:
    return Shard.load(corpus / "natural.npz").document(SIZES.index(size))[:640]


@pytest.mark.parametrize("piece", [1, 7, 49, 98, 8192])
@pytest.mark.parametrize("first", [1, 7, 8, 30, 49])
def test_reading_by_pieces_is_reading_at_once(student, monkeypatch, piece, first):
    monkeypatch.setattr(length, "PIECE", piece)
    tokens = np.random.default_rng(1).integers(3, 61, (2, 50))
    nll = length.read_nll(student, Head(student), tokens, first)
    np.testing.assert_allclose(nll, [by_hand(student, row)[first - 1 :] for row in tokens], atol=2e-5)


def test_the_curve_is_by_position_in_documents_of_their_own(student, corpus, found):
    curve = found.summary["curve"]
    assert [(c["from"], c["to"]) for c in curve] == [
        (1, 4),
        (4, 8),
        (8, 16),
        (16, 32),
        (32, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 640),
    ]
    assert [c["documents"] for c in curve] == [4, 4, 4, 4, 4, 4, 3, 2, 1]
    assert [c["n"] for c in curve][-4:] == [64 * 3 + 26, 128 * 2 + 22, 256 + 44, 128]
    for bucket in curve:
        by_document = [by_hand(student, document(corpus, n))[bucket["from"] - 1 : bucket["to"] - 1] for n in SIZES]
        assert bucket["nll"] == pytest.approx(np.concatenate(by_document).mean(), abs=1e-5)
        means = [d.mean() for d in by_document if len(d)]
        if bucket["to"] <= 64:  # all documents weigh the same here
            assert bucket["se"] == pytest.approx(np.std(means, ddof=1) / 2, rel=1e-3)
    assert curve[-1]["se"] is None, "one document tells nothing of the spread between documents"


def test_every_context_is_scored_on_the_same_tokens(student, corpus, found):
    last = found.summary["last"]
    assert [(c["context"], c["documents"], c["n"]) for c in last] == [(c, 3, 60) for c in (8, 16, 32, 64, 128)]
    for line in last:
        values = []
        for size in (700, 300, 150):
            tokens = document(corpus, size)[128 - line["context"] : 148]
            values.append(by_hand(student, tokens)[-20:])
        assert line["nll"] == pytest.approx(np.concatenate(values).mean(), abs=1e-5)


def test_too_few_long_documents_leave_the_curve(student, corpus):
    config = LengthConfig(documents=4, last_tokens=20, last_documents=5)
    assert length.measure(subject_of(student, None, corpus), config).summary["last"] == []


def test_records_are_of_documents_and_are_compared(teacher, student, corpus, found):
    frame = rows.table(found.records, "student")
    part = frame[frame.benchmark == "length"]
    assert part.n.sum() == sum(c["n"] for c in found.summary["curve"]) == sum(min(n, 640) - 1 for n in SIZES)
    assert set(part.cluster) == {"700", "300", "150", "90"}
    total = sum(c["nll"] * c["n"] for c in found.summary["curve"])
    assert (part.score * part.n).sum() == pytest.approx(total)
    assert set(frame[frame.benchmark == "length_last"]["item"]) == {
        f"{d}@{c}" for d in (700, 300, 150) for c in (8, 16, 32, 64, 128)
    }
    other = rows.table(length.measure(subject_of(teacher, None, corpus), CONFIG).records, "teacher")
    assert compare(other, frame, "length", "nll", 0.02, higher_is_better=False)["clusters"] == 4


def test_records_of_other_documents_or_training_lengths_do_not_match(student, corpus, found):
    subject = replace(subject_of(student, None, corpus), train_length=64)
    other = length.measure(subject, replace_config(last_tokens=24)).records
    hashes = {r["item"]: r["item_hash"] for r in found.records}
    shared = [r for r in other if r["benchmark"] == "length_last" and r["item"] in hashes]
    assert shared and all(r["item_hash"] != hashes[r["item"]] for r in shared)


def replace_config(**changes) -> LengthConfig:
    return LengthConfig(**(CONFIG.model_dump() | changes))


def test_progress_ends_at_one(student, corpus):
    told = []
    length.measure(subject_of(student, None, corpus, lambda share, phrase: told.append((share, phrase))), CONFIG)
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert told[0][1].startswith("640 tokens nll ")


def test_what_cannot_be_measured_is_said(student, corpus, tmp_path):
    with pytest.raises(ShardError, match=r"natural\.npz"):
        length.measure(subject_of(student, None, tmp_path), CONFIG)
    Shard.of([np.zeros(1, np.uint32)], ["short"]).save(tmp_path / "natural.npz")
    with pytest.raises(EvaluationError, match=r"none of 1 documents .* corpus\.natural_text"):
        length.measure(subject_of(student, None, tmp_path), CONFIG)
    broken = tiny(0, (0,))
    broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        length.measure(subject_of(broken, None, corpus), CONFIG)
