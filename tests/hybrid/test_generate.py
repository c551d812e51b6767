from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid import HybridForCausalLM, load_pretrained, save_pretrained
from hybrid import generate as generate_module
from hybrid.generate import filtered_probabilities, generate
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import VOCAB, greedy, prompts

PROMPTS = prompts(7, 30, 1, 18)


@pytest.fixture(scope="module", params=[(1, 3), (), (0, 1, 2, 3)], ids=["hybrid", "mamba", "attention"])
def model(request) -> HybridForCausalLM:
    return tiny_hybrid.model(attention_layers=request.param)


@pytest.fixture(scope="module")
def hybrid() -> HybridForCausalLM:
    return tiny_hybrid.model()


def test_greedy_is_argmax_without_a_cache(model):
    wanted = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(w) for w in wanted}) == 4
    assert generate(model, PROMPTS, 12) == wanted
    assert [generate(model, [prompt], 12)[0] for prompt in PROMPTS] == wanted


def test_end_of_turn_ends_a_row_and_no_other(hybrid):
    plain = generate(hybrid, PROMPTS, 12, eos_token_ids=())
    stop = [plain[0][4], plain[1][9]]

    def cut(reply):
        ends = [i for i, token in enumerate(reply) if token in stop]
        return reply[: ends[0] + 1] if ends else reply

    stopped = generate(hybrid, PROMPTS, 12, eos_token_ids=stop)
    assert stopped == [cut(reply) for reply in plain]
    assert len({len(reply) for reply in stopped}) > 1


def test_the_models_own_end_of_turn_is_the_default(hybrid):
    plain = generate(hybrid, PROMPTS[:1], 12)[0]
    own = tiny_hybrid.model(eos_token_ids=(plain[3],))
    assert generate(own, PROMPTS[:1], 12)[0] == plain[: plain.index(plain[3]) + 1]
    assert generate(own, PROMPTS[:1], 12, eos_token_ids=())[0] == plain


def test_callback_sees_every_step(hybrid):
    steps = []
    plain = generate(hybrid, PROMPTS, 6)
    replies = generate(hybrid, PROMPTS, 6, eos_token_ids=[plain[2][1]], callback=lambda t: steps.append(t.tolist()))
    assert [[t for t in row if t >= 0] for row in zip(*steps, strict=True)] == replies
    assert [row[2] for row in steps][2:] == [-1] * (len(steps) - 2), "ended rows give −1"


def test_stops_when_all_have_ended(hybrid):
    plain = generate(hybrid, PROMPTS, 5)
    steps = []
    generate(hybrid, PROMPTS, 50, eos_token_ids=[reply[0] for reply in plain], callback=steps.append)
    assert len(steps) == 1


def test_seed_decides(hybrid):
    def sampled(seed):
        return generate(hybrid, PROMPTS, 12, temperature=1.0, top_p=0.95, top_k=50, seed=seed)

    torch.manual_seed(1)
    first = sampled(3)
    torch.manual_seed(2)
    assert sampled(3) == first
    assert sampled(4) != first
    assert all(0 <= token < VOCAB for reply in first for token in reply)


def test_a_cold_distribution_is_greedy(hybrid):
    plain = generate(hybrid, PROMPTS, 8)
    assert generate(hybrid, PROMPTS, 8, temperature=1e-4) == plain
    assert generate(hybrid, PROMPTS, 8, temperature=2.0, top_k=1) == plain
    assert generate(hybrid, PROMPTS, 8, temperature=2.0, top_p=1e-6) == plain


@pytest.mark.parametrize("bad", [[], [[1, 2], []]])
def test_empty_prompts_are_refused(hybrid, bad):
    with pytest.raises(ValueError, match="at least one token"):
        generate(hybrid, bad, 4)


def test_nothing_to_generate_is_refused(hybrid):
    with pytest.raises(ValueError, match="max_new_tokens.*got 0"):
        generate(hybrid, PROMPTS, 0)


def filtered_numpy(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row (V,) in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    p = np.exp(scaled - scaled.max())
    if top_k:
        p[order[top_k:]] = 0.0
    p /= p.sum()
    kept, mass = np.zeros_like(p), 0.0
    for token in order:
        kept[token] = p[token]
        mass += p[token]
        if mass >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("likely", [1024, 8], ids=["few looked at suffice", "whole vocabulary sorted"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.3), (1.3, 0, 0.95), (1.0, 20, 0.8), (1.0, 500, 0.9)],
)
def test_filtered_distribution(monkeypatch, likely, temperature, top_k, top_p):
    monkeypatch.setattr(generate_module, "LIKELY", likely)
    logits = 2 * torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    ours = filtered_probabilities(logits, temperature, top_k, top_p)
    wanted = np.stack([filtered_numpy(row, temperature, top_k, top_p) for row in logits.numpy()])
    np.testing.assert_array_equal(ours.numpy() > 0, wanted > 0)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-4, atol=1e-7)


def test_one_flat_row_sends_all_rows_to_the_sort(monkeypatch):
    monkeypatch.setattr(generate_module, "LIKELY", 4)
    logits = torch.zeros(2, 50)
    logits[0, :3] = 20.0
    logits[1] = torch.linspace(0, 0.5, 50)
    ours = filtered_probabilities(logits, 1.0, 0, 0.9)
    for row in range(2):
        np.testing.assert_allclose(ours[row].numpy(), filtered_numpy(logits[row].numpy(), 1.0, 0, 0.9), atol=1e-6)
    assert (ours[1] > 0).sum() > 40


def test_samples_follow_the_distribution(hybrid):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, -1)
    drawn = generate_module.sample(logits, 1.0, 3, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 4000
    wanted = filtered_probabilities(logits[:1], 1.0, 3, 1.0)[0]
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.03)
    assert shares[3] == 0


def test_a_student_as_it_is_saved_decodes_without_autocast(tmp_path):
    """Mixers in float32 in a bfloat16 body, as a stage that trains the mixers alone leaves them."""
    student = tiny_hybrid.model(attention_layers=(1, 3)).bfloat16()
    for block in student.blocks:
        if not block.is_attention:
            block.mamba.float()
    save_pretrained(student, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.blocks[0].mamba.in_proj.weight.dtype == torch.float32
    (reply,) = generate(loaded, [[5, 6, 7]], 8, eos_token_ids=())
    assert len(reply) == 8
