from __future__ import annotations

import pytest
import torch

from hybrid import load_pretrained
from hybrid.attention import document_positions
from hybrid.init_map import from_attention
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens

LENGTHS = [1, 13, 70, 5]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "head_dim": 16,
        },
    ],
    ids=["tied", "untied", "as many keys as queries", "wide heads", "linear rope", "llama3 rope"],
)
def test_nothing_replaced_is_transformers_llama(tmp_path, changes):
    theirs = tiny_hybrid.llama(tmp_path, **changes)
    teacher = load_pretrained(tmp_path)
    student = from_attention(teacher, teacher.config.attention_layers)
    text = tokens(2, 71)
    with torch.no_grad():
        wanted = theirs(text).logits
    assert wanted.std() > 0.5
    assert torch.equal(student(text), teacher(text))
    torch.testing.assert_close(teacher(text), wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    assert torch.equal(teacher(text).argmax(-1), wanted.argmax(-1))
    assert torch.equal(teacher.lm_head_weight, theirs.lm_head.weight)


def test_every_layer_matters():
    """A model whose mixers did nothing would pass the comparisons below."""
    model = tiny_hybrid.model()
    text = tokens(1, 30)
    before = model(text)
    for layer in model.model.layers:
        out = layer.self_attn.o_proj if layer.is_attention else layer.mamba.out_proj
        kept = out.weight.clone()
        out.weight.zero_()
        assert (model(text) - before).abs().max() > 0.05
        out.weight.copy_(kept)


@pytest.mark.parametrize("attention", [(1, 3), (), (0, 1, 2, 3)])
def test_packed_is_unpacked(attention):
    model = tiny_hybrid.model(attention_layers=attention)
    text = tokens(2, sum(LENGTHS))
    orders = [LENGTHS, LENGTHS[::-1]]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)) for lengths in orders]).int()
    packed = model(text, seq_idx)
    for row, lengths in enumerate(orders):
        for part, alone in zip(packed[row].split(lengths), text[row].split(lengths), strict=True):
            torch.testing.assert_close(part, model(alone[None])[0], rtol=1e-4, atol=1e-4)


def test_positions_start_anew_with_each_document():
    """Attention sees only distances, so the logits would hardly show it; far positions would cost precision."""
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 5]])
    wanted = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert document_positions(seq_idx, 2, 6, torch.device("cpu")).tolist() == wanted
    assert document_positions(None, 2, 3, torch.device("cpu")).tolist() == [[0, 1, 2]] * 2


def test_gradients_of_packed_rows_do_not_leak():
    model = tiny_hybrid.model()
    text, seq_idx = tokens(1, 20), torch.tensor([[0] * 8 + [1] * 12])
    weights = model.model.embed_tokens.weight.requires_grad_()
    text[0, :8], text[0, 8:] = 5, 7  # the second document's tokens are not the first's
    gradient = torch.autograd.grad(model.hidden(text, seq_idx)[:, 8:].sum(), weights)[0]
    # Decays are differences of running sums, whose gradients cancel up to rounding.
    assert gradient[5].abs().max() < 1e-6 * gradient[7].abs().max()


def test_training_reaches_every_weight():
    model = tiny_hybrid.model(tie_word_embeddings=False).requires_grad_()
    model(tokens(2, 70)).logsumexp(-1).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_packed_rows_are_refused_with_a_cache():
    model = tiny_hybrid.model()
    with pytest.raises(ValueError, match="its own row"):
        model(tokens(1, 4), torch.zeros(1, 4, dtype=torch.int32), cache=model.new_cache(1, 8))


@pytest.mark.parametrize("calls", [[1] * 41, [41], [17, 1, 1, 16, 6], [3, 38]], ids=str)
@pytest.mark.parametrize("attention", [(1, 3), (), (0, 1, 2, 3)])
def test_decoding_is_the_full_pass(attention, calls):
    model = tiny_hybrid.model(attention_layers=attention)
    text = tokens(2, 41)
    cache = model.new_cache(2, 41)
    parts = [model(part, cache=cache) for part in text.split(calls, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), rtol=1e-4, atol=1e-4)
    assert cache.cursors.lengths.tolist() == [41, 41]


def test_paper_convolution_decodes_too():
    model = tiny_hybrid.model(conv_silu=True, proj_bias=False)
    text, cache = tokens(1, 23), model.new_cache(1, 23)
    parts = [model(part, cache=cache) for part in text.split([9, 1, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_its_type():
    model = tiny_hybrid.model()
    exact = model(tokens(2, 19))
    model = model.bfloat16()
    for layer in model.config.mamba_layers:
        mixer = model.model.layers[layer].mamba
        for p in (mixer.A_log, mixer.D, mixer.dt_bias):
            p.data = p.data.float()
    assert model.dtype == torch.bfloat16
    logits = model(tokens(2, 19))
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.1
    cache = model.new_cache(2, 19)
    decoded = torch.cat([model(part, cache=cache) for part in tokens(2, 19).split([18, 1], dim=1)], dim=1)
    assert (decoded.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_mixing_is_what_attention_takes_and_gives(packed):
    model = tiny_hybrid.model()
    seq_idx = torch.tensor([[0] * 7 + [1] * 6]) if packed else None
    seen = {}
    handle = model.blocks[1].self_attn.register_forward_hook(
        lambda module, args, output: seen.update(given=args[0], gave=output)
    )
    model.hidden(tokens(1, 13), seq_idx)
    handle.remove()
    found = model.mixing(tokens(1, 13), seq_idx, [1])
    assert found.keys() == {1}
    for ours, theirs in zip(found[1], seen.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert model.mixing(tokens(1, 13), None, []) == {}
