import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import BYTE_VOCAB, byte_tokenizer, subject_of, tiny

from corpora.shards import Shard, ShardError
from evals import needle, rows
from evals.head import EvaluationError
from evals.stats import compare
from steps.config import NeedleConfig

# A token is a byte here, so the question alone has 220 of them.
CONFIG = NeedleConfig(lengths=[600, 1200], depths=[0.0, 0.5, 1.0], seeds=4, answer_tokens=8)
LINES = [f"In {1900 + i} we counted {i} boats near Lisbon. Was it {i * 7}? It rained on day {i}." for i in range(60)]
TEXT = " ".join(LINES)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = byte_tokenizer()
    documents = [
        np.array(tokenizer(t)["input_ids"], np.uint32) for t in ("\n".join(LINES[:20]), "\n\n".join(LINES[20:]))
    ]
    Shard.of(documents, ["a", "b"]).save(folder / "natural.npz")
    return replace(subject_of(tiny(1, (1,), BYTE_VOCAB), None, folder), tokenizer=tokenizer)


def haystack_of(question) -> tuple[str, str]:
    """What precedes the needle and what follows it."""
    found = re.search(r"for it\.\n\n(.*?)The magic number of (\w+) is (\d+)\.(.*)\n\nWhat is the", question.text, re.S)
    assert found is not None and found[3] == question.number and question.text.count(question.number) == 1
    assert f"What is the magic number of {found[2]}?" in question.text and question.text.count(found[2]) == 2
    return found[1], found[4]


@pytest.mark.parametrize("haystack", ["natural", "words"])
def test_prompts_fill_their_length_and_hold_the_needle_at_its_depth(subject, haystack):
    config = NeedleConfig(**(CONFIG.model_dump() | {"haystack": haystack}))
    asked = needle.questions(subject, config)
    assert [(q.length, q.depth, q.seed) for q in asked] == [
        (n, d, s) for n in (600, 1200) for d in (0.0, 0.5, 1.0) for s in range(4)
    ]
    for question in asked:
        size = len(question.prompt) + config.answer_tokens
        assert question.length - needle.LONGEST_SENTENCE - 2 < size <= question.length
        rendered = subject.tokenizer.decode(question.prompt)
        assert rendered == f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        before, after = haystack_of(question)
        share = len(before) / len(before + after)
        assert abs(share - question.depth) * len(before + after) <= needle.LONGEST_SENTENCE / 2 + 2
    assert len({q.number for q in asked}) == len(asked)


def test_a_natural_haystack_is_the_corpus_in_its_order(subject):
    for question in needle.questions(subject, CONFIG):
        for part in haystack_of(question):
            assert part.strip() in f"{TEXT} {TEXT}"


def test_a_haystack_does_not_name_the_needles_city(subject):
    config = NeedleConfig(**(CONFIG.model_dump() | {"lengths": [600], "depths": [0.5], "seeds": 150}))
    of_lisbon = [q for q in needle.questions(subject, config) if "magic number of Lisbon" in q.text]
    assert of_lisbon
    for question in of_lisbon:
        before, after = haystack_of(question)
        assert "Lisbon" not in before + after and "It rained" in before + after


def test_questions_depend_on_the_seed_alone(subject):
    other_model = replace(subject, model=tiny(5, (0,), BYTE_VOCAB), name="student", batch_size=7)
    assert needle.questions(subject, CONFIG) == needle.questions(other_model, CONFIG)
    other_seed = needle.questions(replace(subject, seed=1), CONFIG)
    assert not {q.text for q in other_seed} & {q.text for q in needle.questions(subject, CONFIG)}
    fewer = NeedleConfig(**(CONFIG.model_dump() | {"lengths": [1200], "depths": [0.5], "seeds": 2}))
    assert needle.questions(subject, fewer) == [
        q for q in needle.questions(subject, CONFIG) if q.length == 1200 and q.depth == 0.5 and q.seed < 2
    ]


def reader_of(last: int, tokenizer):
    """In place of `replies`: answers what a model that remembers `last` tokens can."""

    def answer(model, prompts, new_tokens, batch_size, context, progress):
        assert all(len(p) + new_tokens <= context for p in prompts)
        texts = [tokenizer.decode(p[-last:]) for p in prompts]
        found = [re.search(r"magic number of \w+ is (\d+)\.", text) for text in texts]
        progress(1.0)
        return [tokenizer(f"It is {f[1]}." if f else "I do not know.")["input_ids"] for f in found]

    return answer


def test_a_model_that_forgets_is_seen_to_forget(subject, monkeypatch):
    told = []
    subject = replace(subject, progress=lambda share, phrase: told.append((share, phrase)))
    monkeypatch.setattr(needle, "replies", reader_of(900, subject.tokenizer))
    found = needle.measure(subject, CONFIG)
    assert [(c["length"], c["depth"], c["k"], c["n"]) for c in found.summary["cells"]] == [
        (600, 0.0, 4, 4),
        (600, 0.5, 4, 4),
        (600, 1.0, 4, 4),
        (1200, 0.0, 0, 4),
        (1200, 0.5, 4, 4),
        (1200, 1.0, 4, 4),
    ]
    assert found.summary["effective_length"] == 600
    assert {k: found.summary[k] for k in ("haystack", "seeds", "lengths", "depths")} == {
        "haystack": "natural",
        "seeds": 4,
        "lengths": [600, 1200],
        "depths": [0.0, 0.5, 1.0],
    }
    frame = rows.table(found.records, "teacher")
    assert set(frame.cluster) == {f"{n}/{d}" for n in (600, 1200) for d in ("0", "0.5", "1")}
    missed = frame[frame.score == 0]
    assert set(missed["item"]) == {f"1200/0/{s}" for s in range(4)} and set(missed.response) == {"I do not know."}
    assert frame.prompt.str.fullmatch(r"…[\s\S]{200,}What is the magic number of \w+\? Answer [a-z ]+\.").all()
    assert told == [
        (pytest.approx(1 / 3), "needles"),
        (1.0, "12/12 needles in 600 tokens"),
        (1.0, "8/12 needles in 1200 tokens"),
    ]

    monkeypatch.setattr(needle, "replies", reader_of(1200, subject.tokenizer))
    better = rows.table(needle.measure(subject, CONFIG).records, "student")
    line = compare(frame, better, "needle", "found", 0.02)
    assert (line["n"], line["clusters"], line["flips_up"], line["flips_down"]) == (24, 6, 4, 0)


def test_a_model_answers_through_the_engine(subject):
    """Whatever a random model says, it is what it says to each prompt alone."""
    config = NeedleConfig(**(CONFIG.model_dump() | {"lengths": [300, 330], "seeds": 2}))
    found = needle.measure(subject, config)
    alone = needle.measure(replace(subject, batch_size=1), config)
    assert found == alone
    assert len(found.records) == 12 and any(r["response"] for r in found.records)
    assert found.summary["effective_length"] is None and {c["k"] for c in found.summary["cells"]} == {0}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1234567", True),
        ("The magic number of Oslo is 1234567.", True),
        ("It is 1,234,567, of course", True),
        ("2, 1234567 and 3", True),
        ("1,1234567", True),
        ("12345678", False),
        ("123456", False),
        ("1,234,5678", False),
        ("one million", False),
        ("", False),
    ],
)
def test_only_the_exact_number_counts(answer, right):
    assert needle.is_found("1234567", answer) is right


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((1.0, 0.9, 0.5), 512), ((1.0, 0.5, 1.0), 256), ((0.5, 1.0, 1.0), None), ((0.85, 0.85, 0.85), 1024), ((), None)],
)
def test_the_effective_length_counts_all_shorter_ones(shares, expected):
    cells = [
        {"length": length, "depth": depth, "k": round(share * 20) + side, "n": 20}
        for length, share in zip((256, 512, 1024), shares, strict=False)
        for depth, side in (((0.0, -1), (1.0, 1)) if share < 1 else ((0.0, 0), (1.0, 0)))
    ]
    assert needle.effective_length(cells, 0.85) == expected


def test_what_cannot_be_measured_is_said(subject, tmp_path):
    with pytest.raises(EvaluationError, match=r"drop 128 from benchmark\.needle\.lengths"):
        needle.measure(subject, NeedleConfig(lengths=[128]))
    with pytest.raises(EvaluationError, match=r"corpus\.natural_text .* benchmark\.needle\.haystack"):
        needle.measure(subject, NeedleConfig(lengths=[600, 20_000]))
    with pytest.raises(ShardError, match=r"natural\.npz"):
        needle.measure(replace(subject, corpus=tmp_path), CONFIG)
    assert needle.questions(replace(subject, corpus=tmp_path), NeedleConfig(lengths=[600], haystack="words"))


@pytest.mark.parametrize("leaf", ["lengths", "depths"])
def test_axes_of_the_grid_are_ordered(leaf):
    with pytest.raises(ValueError, match="the smallest first"):
        NeedleConfig(**{leaf: [1, 1]})
    assert not NeedleConfig().enabled and NeedleConfig(lengths=[512]).enabled
