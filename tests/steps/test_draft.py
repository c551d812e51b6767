"""The draft stage on tiny models: what it is made of, what it learns from, what it refuses, and that a kill leaves no
trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from corpora.packing import PackedBlocks
from corpora.preferences import prompts
from corpora.shards import Shard
from hybrid import load_pretrained, save_pretrained
from hybrid.drafts import TOKENS, load_draft
from hybrid.init_map import from_attention
from stage_store import Checkpoints, Store
from steps import draft
from steps.config import DraftConfig
from steps.draft import DraftError
from tests.corpora import tiny
from tests.hybrid import tiny_hybrid
from tests.steps import tiny_stages

STEPS = 9
CONFIG = DraftConfig(
    kind="layers:[0, 2]",
    conversations=7,
    max_tokens=40,
    generation_batch=3,
    steps=STEPS,
    batch_size=2,
    seq_len=61,
    mixer_lr=3e-3,
    rest_lr=3e-3,
    warmup=0.2,
    checkpoint_every=2,
)
FEATURES = CONFIG.model_copy(update={"kind": "features:[2]"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A student of four layers of which 1 and 2 keep attention, and a corpus."""
    root = tmp_path_factory.mktemp("upstream")
    made = tiny_stages.upstream(root)
    tiny.save_llama(root / "teacher", num_hidden_layers=4, initializer_range=0.2)
    student = from_attention(load_pretrained(root / "teacher"), (1, 2))
    save_pretrained(student, root / "student", tokenizer_from=root / "teacher")
    return {"corpus": made["corpus"], "student": root / "student"}


def run(inputs, folder: Path, config=CONFIG, compute="float32", **more: Any) -> tuple[dict[str, Any], Path]:
    out = folder / f"out{len(list(folder.iterdir()))}"
    out.mkdir()
    return draft.run(config, inputs, out, tiny_stages.context(folder, compute, **more)), out


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("made"))


# Of the student's own layers


def test_shrink_keeps_the_named_layers_bit_for_bit():
    student = tiny_hybrid.model(tie_word_embeddings=False)  # attention in layers 1 and 3
    small = draft.shrink(student, (0, 1, 3))
    assert (small.config.n_layers, small.config.attention_layers) == (3, (1, 2))
    given, kept = dict(student.named_parameters()), dict(small.named_parameters())
    for name, weight in kept.items():
        for new, old in ((2, 3), (1, 1), (0, 0)):
            if name.startswith(f"model.layers.{new}."):
                name = name.replace(f"layers.{new}.", f"layers.{old}.")
                break
        assert torch.equal(weight, given[name]), name
        assert weight.data_ptr() != given[name].data_ptr(), "training the draft must not move the student"
    x = tiny_hybrid.tokens(2, 9)
    same = draft.shrink(student, range(4))
    assert torch.equal(same(x), student(x))


@pytest.mark.parametrize("mixer", [{}, {"mixer": "mamba1", "d_state": 4}], ids=["mamba-2", "mamba-1"])
def test_branches_may_begin_smaller(mixer):
    """Each mixer and each MLP adds a quarter of what it would add to the same stream."""
    student = tiny_hybrid.model(**mixer)
    for layer in (0, 1):  # Mamba and attention
        whole, small = (draft.shrink(student, (layer,), branch_scale=scale) for scale in (1.0, 0.25))
        x, seen = tiny_hybrid.tokens(2, 9), []
        for model in (whole, small):
            stream, mixing = model._embedded(x), model.mixing(x, None, (0,))[0][1]
            hidden = model.blocks[0].post_attention_layernorm(stream + mixing)
            seen.append((mixing, model.blocks[0].mlp(hidden), whole.blocks[0].mlp(hidden)))
        torch.testing.assert_close(seen[1][0], 0.25 * seen[0][0])
        torch.testing.assert_close(seen[1][1], 0.25 * seen[1][2])
    assert torch.equal(student(x), tiny_hybrid.model(**mixer)(x)), "the student stays as it is"


def test_layers_that_the_student_does_not_have(inputs, tmp_path):
    with pytest.raises(DraftError, match=r"names layers \[4, 9\], but the student has 4, 0 to 3"):
        run(inputs, tmp_path, CONFIG.model_copy(update={"kind": "layers:[0,4,9]"}))


def test_leaves_a_draft_that_loads(inputs, made):
    summary, out = made
    model = load_pretrained(out)
    assert (model.config.n_layers, model.config.attention_layers) == (2, (1,))
    assert (out / "tokenizer.json").read_bytes() == (inputs["student"] / "tokenizer.json").read_bytes()
    assert summary["kind"] == CONFIG.kind
    assert summary["parameters"] == summary["trained_parameters"] == sum(p.numel() for p in model.parameters())
    json.dumps(summary, allow_nan=False)


def test_learns_from_the_students_own_answers(inputs, made):
    """Every document is an opening of the corpus and the student's reply to it; greedy ones are recomputed in full."""
    summary, out = made
    text = Shard.load(out / draft.TEXT)
    student = load_pretrained(inputs["student"])
    known = dict(prompts(Shard.load(inputs["corpus"] / "train.npz"), 256))
    greedy = 0
    for index, name in enumerate(text.ids):
        mask = text.assistant[text.starts[index] : text.starts[index + 1]]
        tokens = text.document(index).astype(np.int64)
        prompt, reply = tokens[~mask].tolist(), tokens[mask].tolist()
        assert tuple(prompt) == known[str(name)] and 1 <= len(reply) <= 40
        read = torch.tensor([[*prompt, *reply]])
        greedy += student(read)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == reply
    assert greedy == round(0.5 * 7)
    assert len(set(text.ids)) == len(text) == summary["text"]["conversations"] == 7
    assert summary["text"]["tokens"] == len(text.tokens)
    assert summary["text"]["reply_tokens"] == text.assistant.sum() > 7


def test_temperature_0_makes_every_answer_greedy(inputs, tmp_path):
    config = CONFIG.model_copy(update={"temperature": 0.0, "greedy_share": 0.0, "steps": 1})
    _, one = run(inputs, tmp_path, config)
    other = CONFIG.model_copy(update={"greedy_share": 1.0, "steps": 1})
    _, two = run(inputs, tmp_path, other)
    assert (one / draft.TEXT).read_bytes() == (two / draft.TEXT).read_bytes()


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_first_loss_by_hand(inputs, made, tmp_path, kind):
    """Divergence from the student, on questions and answers alike."""
    summary, out = made
    if kind != "forward":
        summary, out = run(inputs, tmp_path, CONFIG.model_copy(update={"loss": kind, "steps": 1}))
    batch = PackedBlocks(Shard.load(out / draft.TEXT), 61, 3).batch(0, 2)
    text, seq_idx, mask = (torch.from_numpy(a) for a in (batch.tokens, batch.seq_idx, batch.loss_mask))
    student = load_pretrained(inputs["student"])
    log_p, log_q = (log_softmax(m(text, seq_idx)[mask].double(), -1) for m in (student, draft.shrink(student, (0, 2))))
    if kind == "reverse":
        log_p, log_q = log_q, log_p
    assert summary["loss_first"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


def test_features_by_hand(inputs, tmp_path):
    """Features are read one token later and never across documents, and projections that are zero change nothing."""
    student = load_pretrained(inputs["student"])
    small = draft.shrink(student, (2,), reads_features=True)
    assert torch.equal(small(tiny_hybrid.tokens(2, 9)), draft.shrink(student, (2,))(tiny_hybrid.tokens(2, 9)))
    torch.nn.init.normal_(small.feature_proj.weight, std=0.3)
    summary, out = run(inputs, tmp_path, FEATURES.model_copy(update={"steps": 1, "passes": 1}))
    batch = PackedBlocks(Shard.load(out / draft.TEXT), 61, 3).batch(0, 2)
    text, seq_idx = torch.from_numpy(batch.tokens), torch.from_numpy(batch.seq_idx)
    given = draft.shifted(student.residual(text, seq_idx), seq_idx)
    for row in range(2):
        for number in seq_idx[row].unique():
            places = (seq_idx[row] == number).nonzero()[:, 0]
            alone = text[row, places][None]
            own = torch.nn.functional.pad(student.residual(alone), (0, 0, 1, 0))[:, :-1]
            torch.testing.assert_close(given[row, places], own[0], rtol=1e-4, atol=1e-4)
            both = small.residual(text, seq_idx, features=given)[row, places]
            torch.testing.assert_close(both, small.residual(alone, features=own)[0], rtol=1e-4, atol=1e-4)
    mask = torch.from_numpy(batch.loss_mask)
    log_p, log_q = (log_softmax(m(text, seq_idx)[mask].double(), -1) for m in (student, draft.shrink(student, (2,))))
    assert summary["loss_first"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


def test_features_may_be_added_as_they_are(inputs, tmp_path):
    """`identity`: with each token the draft reads its embedding and the feature over the feature's root mean square."""
    student = load_pretrained(inputs["student"])
    small = draft.shrink(student, (2,), True, "identity")
    text = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))
    features = draft.shifted(student.residual(text), None)
    normed = features * (features.pow(2).mean(-1, keepdim=True) + student.config.rms_norm_eps).rsqrt()
    plain = draft.shrink(student, (2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_embedded", lambda tokens: student._embedded(tokens) + normed)
        torch.testing.assert_close(small.residual(text, features=features), plain.residual(text), rtol=1e-4, atol=1e-4)
    starts = [
        run(inputs, tmp_path, FEATURES.model_copy(update={"steps": 1, **changes}))[0]["start"]["kl"]
        for changes in ({}, {"feature_init": "identity"}, {"branch_scale": 0.1})
    ]
    assert len({round(kl, 2) for kl in starts}) == 3, "the stage passes both on"


def test_features_bring_it_nearer_to_the_student(inputs, tmp_path):
    (with_them, out), (without, _) = (
        run(inputs, tmp_path, FEATURES.model_copy(update={"kind": kind, "steps": 30}))
        for kind in ("features:[2]", "layers:[2]")
    )
    assert load_pretrained(out).config.reads_features
    assert with_them["start"]["kl"] == pytest.approx(without["start"]["kl"], rel=1e-4), "projections begin as zeros"
    assert with_them["held_out"]["kl"] < 0.98 * without["held_out"]["kl"]


def test_comes_nearer_to_the_student(made):
    summary, _ = made
    assert summary["held_out"]["kl"] < 0.9 * summary["start"]["kl"]
    assert summary["held_out"]["top1"] >= summary["start"]["top1"]
    assert summary["held_out"]["conversations"] == 4


def test_agreement_by_hand(inputs, made, tmp_path):
    """Top-1 agreement on greedy replies is the share of tokens that the draft says as the student does."""
    summary, out = made
    student, small = load_pretrained(inputs["student"]), load_pretrained(out)
    said = agreed = 0
    for _, prompt in prompts(Shard.load(inputs["corpus"] / "held_out.npz"), 256):
        text = list(prompt)
        for _ in range(CONFIG.max_tokens):
            logits = [m(torch.tensor([text]))[0, -1] for m in (student, small)]
            token = int(logits[0].argmax())
            said, agreed = said + 1, agreed + (int(logits[1].argmax()) == token)
            text.append(token)
            if token in student.config.eos_token_ids:
                break
    assert summary["held_out"]["tokens"] == said
    assert summary["held_out"]["top1"] == pytest.approx(agreed / said)


def test_muon_turns_the_blocks_matrices_alone(inputs, tmp_path):
    """One step without a warm-up: all singular values of its change are about 1, times 0.2 √max(rows, columns) · rate;
    AdamW changes each number by about the rate."""
    config = FEATURES.model_copy(update={"steps": 1, "warmup": 0.0, "mixer_lr": 1e-3, "rest_lr": 1e-3})
    before = draft.shrink(load_pretrained(inputs["student"]), (2,), reads_features=True)
    changed = {}
    for optimizer in ("muon", "adamw"):
        _, out = run(inputs, tmp_path, config.model_copy(update={"optimizer": optimizer}))
        after = dict(load_pretrained(out).named_parameters())
        changed[optimizer] = {name: after[name] - p for name, p in before.named_parameters()}
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        values = torch.linalg.svdvals(changed["muon"][name]) / (0.2 * 1e-3 * max(changed["muon"][name].shape) ** 0.5)
        assert 0.4 < values.median() < 1.4 and values.max() < 1.6, name
        assert not torch.equal(changed["muon"][name], changed["adamw"][name])
    assert torch.equal(changed["muon"]["feature_proj.weight"], changed["adamw"]["feature_proj.weight"])


def test_learns_by_muon(inputs, tmp_path):
    summary, _ = run(inputs, tmp_path, CONFIG.model_copy(update={"optimizer": "muon", "steps": 20}))
    assert summary["held_out"]["kl"] < 0.9 * summary["start"]["kl"]


# Proposing among some tokens


def test_the_most_frequent_tokens_of_replies():
    """Questions do not count; of equally frequent ones the lowest, and those that are always in need no count."""
    documents = [np.array(d, np.uint32) for d in ([9, 9, 9, 5, 5, 7], [6, 7, 4, 4])]
    text = Shard.of(documents, ["a", "b"], [np.arange(6) >= 3, np.arange(4) >= 1])
    assert draft.frequent_tokens(text, 2, 12).tolist() == [4, 5]
    assert draft.frequent_tokens(text, 3, 12).tolist() == [4, 5, 7]
    assert draft.frequent_tokens(text, 5, 12).tolist() == [0, 1, 4, 5, 7]
    assert draft.frequent_tokens(text, 3, 12, always=(11, 7)).tolist() == [4, 7, 11]
    assert draft.frequent_tokens(text, 12, 12).tolist() == list(range(12))


def test_a_vocabulary_is_written_beside_the_same_weights(inputs, made, tmp_path):
    summary, out = run(inputs, tmp_path, CONFIG.model_copy(update={"vocabulary": 20}))
    assert (out / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()
    assert "vocabulary" not in made[0] and not (made[1] / TOKENS).exists()
    tokens = load_draft(out).tokens.tolist()
    text = Shard.load(out / draft.TEXT)
    replies = text.tokens[text.assistant].tolist()
    assert len(tokens) == len(set(tokens)) == summary["vocabulary"]["tokens"] == 20
    assert set(load_pretrained(inputs["student"]).config.eos_token_ids) <= set(tokens)
    least = min(replies.count(token) for token in tokens if token not in (0, 1, 2))
    assert all(replies.count(token) <= least for token in set(replies) - set(tokens))
    covered = summary["vocabulary"]["covered"]
    assert covered["text"] == pytest.approx(sum(replies.count(token) for token in tokens) / len(replies))
    assert 0.0 < covered["held_out"] <= 1.0 and covered["text"] < 1.0
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("count", [1, 321])
def test_a_vocabulary_that_cannot_be(inputs, tmp_path, count):
    config = load_pretrained(inputs["student"]).config
    assert config.vocab_size == 320
    two_ends = tmp_path / "student"
    student = load_pretrained(inputs["student"])
    student.config = dataclasses.replace(config, eos_token_ids=(2, 3))
    save_pretrained(student, two_ends, tokenizer_from=inputs["student"])
    with pytest.raises(DraftError, match=rf"is {count}, but the student has 320 tokens, 2 of which end a turn"):
        run({**inputs, "student": two_ends}, tmp_path, CONFIG.model_copy(update={"vocabulary": count}))


def test_bfloat16_products_keep_trained_weights_in_float32(inputs, tmp_path):
    summary, out = run(inputs, tmp_path, CONFIG.model_copy(update={"steps": 2}), "bfloat16")
    assert {p.dtype for p in load_pretrained(out).parameters()} == {torch.float32}
    assert np.isfinite(summary["loss_last"])


# Going on after a crash


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@pytest.mark.parametrize("at", ["text", 1, 5], ids=["after the text", "before a checkpoint", "after two"])
def test_killed_and_continued_is_undisturbed(inputs, made, tmp_path, monkeypatch, at):
    checkpoints = Checkpoints(Store(tmp_path / "store"), "draft", "0" * 64)
    with monkeypatch.context() as dying:
        if at == "text":
            dying.setattr(draft, "train", _killed)
        else:
            dying.setattr(draft, "token_batches", _killed_at(at, draft.token_batches))
        with pytest.raises(Killed):
            run(inputs, tmp_path, checkpoints=checkpoints)
    asked = []
    monkeypatch.setattr(draft, "token_batches", _noting(asked, draft.token_batches))
    written = []
    monkeypatch.setattr(draft, "_replies", _noting_replies(written, draft._replies))
    summary, out = run(inputs, tmp_path, checkpoints=checkpoints)
    assert asked == list(range({"text": 0, 1: 0, 5: 4}[at], STEPS))
    assert written == [4], "the training text comes from the checkpoint, only the held-out replies are made again"
    wanted_summary, wanted = made
    for name in ("model.safetensors", draft.TEXT, "config.json"):
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    assert summary["curve"] == wanted_summary["curve"]
    assert summary["held_out"] == wanted_summary["held_out"]


def _killed(*_: Any, **__: Any) -> None:
    raise Killed


def _killed_at(number, real):
    def made(*arguments):
        source = real(*arguments)
        return lambda asked: _killed() if asked == number else source(asked)

    return made


def _noting(asked, real):
    def made(*arguments):
        source = real(*arguments)
        return lambda number: asked.append(number) or source(number)

    return made


def _noting_replies(written, real):
    def replies(found, *arguments):
        written.append(len(found))
        return real(found, *arguments)

    return replies


# A checkpoint from elsewhere


def test_a_llama_as_it_is(inputs, tmp_path):
    folder = tiny.save_llama(tmp_path / "small llama", num_hidden_layers=1, hidden_size=16)
    summary, out = run(inputs, tmp_path, DraftConfig(kind=f"checkpoint:file:{folder}"))
    model = load_pretrained(out)
    assert (model.config.n_layers, model.config.d_model) == (1, 16)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(summary["fingerprint"]) > 32


def test_a_hybrid_of_this_projects_form(inputs, made, tmp_path):
    summary, out = run(inputs, tmp_path, DraftConfig(kind=f"checkpoint:file:{made[1]}"))
    x = torch.arange(9)[None]
    assert torch.equal(load_pretrained(out)(x), load_pretrained(made[1])(x))
    assert (out / "tokenizer.json").is_file()


def test_another_vocabulary_is_refused_with_both_numbers(inputs, tmp_path):
    folder = tiny.save_llama(tmp_path / "other", vocab_size=352)
    with pytest.raises(DraftError, match=r"its vocabulary has 352 tokens, the student's 320"):
        run(inputs, tmp_path, DraftConfig(kind=f"checkpoint:file:{folder}"))


def test_another_tokenizer_is_refused_with_both_numbers(inputs, tmp_path):
    folder = tiny.save_llama(tmp_path / "other")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    one, two = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(raw))
    count = len(tiny.tokenizer().get_vocab())
    with pytest.raises(DraftError, match=rf"has {count} tokens, the student's {count}, and {count - 2} are the same"):
        run(inputs, tmp_path, DraftConfig(kind=f"checkpoint:file:{folder}"))


# Where the corpus has too few questions


def questions(monkeypatch, inputs, folder, turns, count, **changes):
    """What `_questions` finds if the student says these turns, batch after batch; and the prompts it was given."""
    asked, said = [], iter(turns)

    def generate(model, prompts, max_new_tokens, *, eos_token_ids, **_):
        asked.append((prompts, max_new_tokens, eos_token_ids))
        return [next(said) for _ in prompts]

    monkeypatch.setattr(draft, "Generator", lambda: generate)
    config = CONFIG.model_copy(update=changes)
    return draft._questions(config, inputs, None, tiny_stages.context(folder, "float32"), count), asked


def test_the_student_asks_itself_what_the_corpus_does_not(monkeypatch, inputs, tmp_path):
    """In the template's own form: what comes out is what the corpus's openings look like."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["student"])
    known = prompts(Shard.load(inputs["corpus"] / "train.npz"), 256)[0][1]
    parser = draft.self_chat.TurnParser(tokenizer)
    opening = tuple(tokenizer(parser.opening, add_special_tokens=False)["input_ids"])
    (end,) = tokenizer(parser.end, add_special_tokens=False)["input_ids"]
    turn = list(known[len(opening) : known.index(end, len(opening)) + 1])
    other, cut = [7, 8, end], [7] * 9
    found, asked = questions(monkeypatch, inputs, tmp_path, [turn, cut, turn, other, [end], cut], 2)
    assert [tokens for _, tokens in found] == [known, (*opening, *other, *known[len(opening) + len(turn) :])]
    assert len({name for name, _ in found}) == 2
    assert asked[0] == ([list(opening)] * 3, 256 - len(known) + len(turn), [end])


def test_a_student_that_never_ends_its_turn_asks_nothing(monkeypatch, inputs, tmp_path):
    found, asked = questions(monkeypatch, inputs, tmp_path, [[7] * 9] * 12, 5)
    assert found == [] and len(asked) == 4, "twice as many draws as are wanted, in batches of three"
    assert questions(monkeypatch, inputs, tmp_path, [], 0) == ([], [])
    assert questions(monkeypatch, inputs, tmp_path, [], 5, max_prompt_tokens=4) == ([], [])
