"""Drafts that propose among some tokens alone: what comes out is still the model's, and bad lists are refused.

Where there is a GPU all this runs there, with the kernels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from hybrid import HybridForCausalLM, save_pretrained
from hybrid.drafts import TOKENS, ModelDraft, load_draft, save_tokens
from hybrid.engine import DecodeEngine, Sampling
from hybrid.generate import generate
from hybrid.serve import loading
from kernels_ext import dispatch
from tests.hybrid import serving, tiny_hybrid
from tests.hybrid.tiny_hybrid import VOCAB, prompts
from tests.kernels_ext.interpreted import interpreted

PROMPTS = prompts(9, 1, 22)
COUNT = 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOME = torch.tensor([90, 3, 5, 8, 13, 21, 34, 55, 89, 2, 1, 77, 60])


def build(seed: int = 0, **changes) -> HybridForCausalLM:
    return tiny_hybrid.model(seed, **changes).to(DEVICE)


class Noted(ModelDraft):
    """Keeps what it proposes, and the distributions that it was drawn from."""

    def propose(self, engine: DecodeEngine) -> Tensor | None:
        q = super().propose(engine)
        self.seen = [*getattr(self, "seen", []), (engine.tokens[:, 1:].clone(), q)]
        return q


def engine(model, draft, k=3, batch=3, **options) -> DecodeEngine:
    return DecodeEngine(model, batch=batch, max_length=64, draft=draft, k=k, eos_token_ids=(), **options)


@pytest.mark.parametrize("seed", [0, 5], ids=["the model itself", "another model"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"reads_features": True}], ids=str)
def test_greedy_speculation_is_greedy(seed, changes):
    model, draft = build(), Noted(build(seed, **changes), SOME)
    made = engine(model, draft, graphs=False).generate(PROMPTS, COUNT)
    assert made.replies == generate(model, PROMPTS, COUNT, eos_token_ids=())
    proposed = torch.cat([tokens.flatten() for tokens, _ in draft.seen])
    assert set(proposed.tolist()) <= set(SOME.tolist()) and len(proposed.unique()) > 3


def test_what_is_proposed_is_the_best_of_its_tokens():
    """By the definition: the draft reads the whole text, and of the logits those of its tokens count."""
    model, other = build(), build(5)
    draft = Noted(other, SOME)
    engine(model, draft, k=1, batch=1, graphs=False).generate([PROMPTS[0]], 2)
    allowed = torch.full((VOCAB,), float("-inf"), device=DEVICE)
    allowed[SOME.to(DEVICE)] = 0.0
    wanted = (other(torch.tensor([PROMPTS[0]], device=DEVICE))[0, -1] + allowed).argmax()
    assert draft.seen[0][0].tolist() == [[int(wanted)]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0, 0.9)], ids=["greedy", "sampled"])
def test_all_tokens_in_any_order_are_the_whole_vocabulary(sampling):
    model, other = build(), build(5)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    whole, listed = (
        engine(model, ModelDraft(other, tokens), sampling=sampling).generate(PROMPTS, COUNT, seed=1)
        for tokens in (None, order)
    )
    assert listed.replies == whole.replies and listed.stats == whole.stats


@pytest.mark.parametrize("reads_features", [False, True])
def test_sampled_speculation_follows_the_models_distribution(reads_features):
    """The first two tokens of 3000 replies, of which one in the draft's three of five tokens may be proposed."""
    changes = {"vocab_size": 5, "n_layers": 2, "attention_layers": (1,)}
    model, other = build(0, **changes), build(1, **changes, reads_features=reads_features)
    sampling, rows, prompt = Sampling(temperature=1.5, top_k=4), 500, [3, 1, 4]
    draft = Noted(other, torch.tensor([4, 0, 2]))
    sampled = engine(model, draft, k=2, batch=rows, sampling=sampling, graphs=False)
    pairs = torch.zeros(5, 5)
    for seed in range(6):
        for reply in sampled.generate([prompt] * rows, 3, seed=seed).replies:
            pairs[reply[0], reply[1]] += 1

    def distribution(text: list[int]) -> Tensor:
        logits = model(torch.tensor([text], device=DEVICE))[0, -1].cpu() / sampling.temperature
        return logits.masked_fill(logits < logits.topk(4).values[-1], float("-inf")).softmax(0)

    first = distribution(prompt)
    expected = torch.stack([first[a] * distribution([*prompt, a]) for a in range(5)]) * pairs.sum()
    possible = expected > 0
    assert pairs[~possible].sum() == 0 and pairs[[1, 3]].sum() > 0, "tokens that nobody proposed are said as well"
    assert chisquare(pairs[possible].numpy(), expected[possible].double().numpy(), sum_check=False).pvalue > 1e-3
    for tokens, q in draft.seen:
        assert q.shape == (rows, 2, 5) and q.dtype == torch.float32
        assert set(tokens.unique().tolist()) <= {0, 2, 4}
        assert not q[..., [1, 3]].any()
        torch.testing.assert_close(q.sum(-1), torch.ones(rows, 2, device=DEVICE))
        assert (q.gather(2, tokens.long()[..., None]) > 0).all()


@pytest.mark.parametrize("tokens", [None, torch.arange(VOCAB)], ids=["all", "listed"])
def test_weights_that_move_take_the_head_along(tokens):
    model, other = build(tie_word_embeddings=False), build(5, tie_word_embeddings=False)
    both = engine(model, ModelDraft(other, tokens))
    assert sum(row.rounds for row in both.generate(PROMPTS, COUNT).stats) > 3 * COUNT // 4
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.data = theirs.data.clone()
    assert [row.rounds for row in both.generate(PROMPTS, COUNT).stats] == [COUNT // 4] * 3, "all is accepted"


def test_one_draft_may_move_to_another_engine():
    model, draft = build(), ModelDraft(build(5), SOME)
    replies = [engine(model, draft, k=k, batch=batch).generate(PROMPTS, COUNT).replies for k, batch in ((1, 3), (4, 5))]
    assert replies == [generate(model, PROMPTS, COUNT, eos_token_ids=())] * 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"at least one id, got torch.int64 of shape \(0,\)"),
        ([[1, 2]], r"got torch.int64 of shape \(1, 2\)"),
        ([1.0, 2.0], "got torch.float"),
        ([5, 97, 3], "are 3 to 97, but its vocabulary has 97: 0 to 96"),
        ([5, -1], "are -1 to 5, but its vocabulary has 97"),
        ([5, 7, 9, 7, 5], r"must differ, but \[5, 7\] come more than once"),
    ],
)
def test_tokens_that_cannot_be_proposed_are_refused(tokens, message):
    tokens = torch.tensor(tokens, dtype=torch.int64 if not tokens else None)
    with pytest.raises(ValueError, match=message):
        ModelDraft(build(), tokens)


# In a folder


def test_a_folder_keeps_the_tokens(tmp_path):
    save_pretrained(tiny_hybrid.model(5), tmp_path)
    assert load_draft(tmp_path).tokens is None
    save_tokens(tmp_path, SOME.tolist())
    draft = load_draft(tmp_path, DEVICE, torch.bfloat16)
    assert draft.tokens is not None and draft.tokens.tolist() == sorted(SOME.tolist())
    assert draft.model.dtype == torch.bfloat16 and draft.model.device.type == DEVICE
    save_tokens(tmp_path, [VOCAB])
    with pytest.raises(ValueError, match=rf"{TOKENS}: a draft's tokens are {VOCAB} to {VOCAB}, but its vocabulary"):
        load_draft(tmp_path)


def test_what_is_served_proposes_among_the_folders_tokens(tmp_path: Path):
    model, small = serving.folder(tmp_path / "model"), tmp_path / "draft"
    save_pretrained(serving.model(5), small)
    save_tokens(small, np.arange(40, 60))
    parser = argparse.ArgumentParser()
    loading.add_options(parser)
    options = parser.parse_args(
        [str(model), "--draft", str(small), "--k", "2", "--max-length", "64", "--device", DEVICE]
    )
    loaded = loading.load(model, options)
    drafts = [loaded.engine(batch).draft for batch in (1, 2)]
    assert all(isinstance(draft, ModelDraft) for draft in drafts) and drafts[0] is not drafts[1]
    assert [draft.tokens.tolist() for draft in drafts] == [list(range(40, 60))] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="everything here runs on the kernels already")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 12, 0.9)], ids=["greedy", "sampled"])
def test_interpreted_kernels_propose_what_the_plain_code_proposes(monkeypatch, sampling):
    changes = {"vocab_size": 24, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 16}
    changes |= {"n_layers": 2, "attention_layers": (1,)}
    model, other = build(0, **changes), build(1, **changes)
    for package in ("attention", "causal_conv", "gated_norm", "linear", "rms_norm", "sampling"):
        interpreted(f"kernels_ext.{package}.kernel")
    for package in ("speculation", "ssd", "swiglu"):
        interpreted(f"kernels_ext.{package}.kernel")
    assert "filtered_probabilities" in dispatch.triton_kernels()
    made = []
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        draft = Noted(other, torch.arange(1, 24, 2))
        both = DecodeEngine(
            model, batch=2, max_length=12, draft=draft, k=2, sampling=sampling, ring=6, eos_token_ids=()
        )
        made.append((both.generate([[3, 1, 4, 1, 5]], 3, seed=3).replies, [t[:1].tolist() for t, _ in draft.seen]))
    assert made[0] == made[1]
