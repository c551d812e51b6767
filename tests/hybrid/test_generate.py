from __future__ import annotations

import pytest
import torch

from hybrid import HybridForCausalLM, load_pretrained, save_pretrained
from hybrid.generate import Generator, generate
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
    assert [[t for (t,) in row if t >= 0] for row in zip(*steps, strict=True)] == replies
    assert [row[2] for row in steps][2:] == [[-1]] * (len(steps) - 2), "ended rows give −1"


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


def test_the_model_has_it_as_a_method(hybrid):
    assert hybrid.generate(PROMPTS, 5, eos_token_ids=()) == generate(hybrid, PROMPTS, 5, eos_token_ids=())


def test_a_generator_keeps_its_buffers_while_they_fit(hybrid):
    keep = Generator()
    first = keep(hybrid, PROMPTS, 6, temperature=1.0, seed=1)
    engine = keep.engine
    assert keep(hybrid, PROMPTS, 6, temperature=1.0, seed=2) != first
    assert keep(hybrid, PROMPTS, 6, temperature=1.0, seed=1) == first
    assert keep.engine is engine
    assert keep(hybrid, PROMPTS[:2], 6) == generate(hybrid, PROMPTS[:2], 6)
    assert keep.engine is not engine


def test_a_generator_takes_prompts_in_turns(hybrid):
    keep, told = Generator(), []
    assert keep(hybrid, PROMPTS, 6, slots=2, progress=told.append) == generate(hybrid, PROMPTS, 6)
    assert keep.engine is not None and keep.engine.batch == 2
    assert told == sorted(told) and told[-1] == 1.0
    assert keep(hybrid, PROMPTS, 6, slots=64) == generate(hybrid, PROMPTS, 6)
    assert keep.engine.batch == len(PROMPTS)


def test_weights_that_change_are_seen(hybrid):
    """Training goes on in place between two calls, decays included."""
    model, keep = tiny_hybrid.model(7), Generator()
    keep(model, PROMPTS, 4)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), hybrid.parameters(), strict=True):
            ours.copy_(theirs)
    assert keep(model, PROMPTS, 8) == generate(hybrid, PROMPTS, 8)
    assert all(p.is_contiguous() for p in model.parameters())


def test_decoding_leaves_the_weights_as_they_are(hybrid, tmp_path):
    model = tiny_hybrid.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    generate(model, PROMPTS, 3)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert all(torch.equal(before[name], p) for name, p in loaded.named_parameters())
    sizes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < sizes + 20_000


def test_autocast_around_it_does_not_matter(hybrid):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = generate(hybrid, PROMPTS, 8)
    assert inside == generate(hybrid, PROMPTS, 8)


@pytest.mark.parametrize("bad", [[], [[1, 2], []]])
def test_empty_prompts_are_refused(hybrid, bad):
    with pytest.raises(ValueError, match="at least one token"):
        generate(hybrid, bad, 4)


def test_nothing_to_generate_is_refused(hybrid):
    with pytest.raises(ValueError, match="max_new_tokens.*got 0"):
        generate(hybrid, PROMPTS, 0)


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
