from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from hybrid import HybridForCausalLM
from hybrid.attention import rope_tables, rotate
from hybrid.init_map import from_attention, in_proj_rows, inverse_softplus, new_mixers, verify
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens

KEPT = (1,)


@pytest.fixture(scope="module")
def teacher() -> HybridForCausalLM:
    return tiny_hybrid.model(attention_layers=(0, 1, 2, 3))


def mixers(student: HybridForCausalLM) -> list:
    return [student.model.layers[i].mamba for i in student.config.mamba_layers]


@pytest.mark.parametrize("method", ["copy", "paper"])
def test_projections_are_copied(teacher, method):
    student = from_attention(teacher, KEPT, method)
    assert student.config.mamba_layers == (0, 2, 3)
    for layer in student.config.mamba_layers:
        attention, mixer = teacher.model.layers[layer].self_attn, student.model.layers[layer].mamba
        z, x, B, C, dt = mixer.in_proj.weight.split((48, 16, 16, 48, 6))
        assert torch.equal(C, attention.q_proj.weight)
        assert torch.equal(B, attention.k_proj.weight)
        assert torch.equal(x, attention.v_proj.weight)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
        assert {p.dtype for p in mixer.parameters()} == {torch.float32}


@pytest.mark.parametrize("gqa_mapping", ["heads", "legacy"])
@pytest.mark.parametrize("method", ["copy", "paper"])
def test_mamba1_takes_the_same_projections(teacher, method, gqa_mapping):
    student = from_attention(teacher, KEPT, method, mixer="mamba1", d_state=4, gqa_mapping=gqa_mapping)
    assert (student.config.mixer, student.config.d_state) == ("mamba1", 4)
    rows = in_proj_rows(student.config)
    assert [(s.start, s.stop) for s in rows.values()] == [(0, 48), (48, 64), (64, 80), (80, 128), (128, 131)]
    for layer in student.config.mamba_layers:
        attention, mixer = teacher.blocks[layer].self_attn, student.blocks[layer].mamba
        for source, target in (("q_proj", "C"), ("k_proj", "B"), ("v_proj", "x")):
            assert torch.equal(mixer.in_proj.weight[rows[target]], getattr(attention, source).weight)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
        assert {p.dtype for p in mixer.parameters()} == {torch.float32}
        torch.testing.assert_close(mixer.A, -torch.arange(1.0, 5.0).expand(48, 4))
        dt = softplus(mixer.dt_bias)
        assert dt.min() > 0.999e-3 and dt.max() < 0.1001 and dt.unique().numel() == 48
        assert 0.3 < mixer.dt_proj.weight.abs().max() <= 3**-0.5
        assert torch.equal(mixer.D, torch.ones(48))


def test_mamba1_starts_with_an_identity_and_an_open_gate(teacher):
    student = from_attention(teacher, (), mixer="mamba1", d_state=4, gate_bias=2.5, gate_scale=0.0)
    assert not student.config.conv_silu
    for mixer in mixers(student):
        z, *rest = mixer.project(torch.randn(1, 9, 48))
        assert torch.equal(z, torch.full_like(z, 2.5))
        assert torch.equal(mixer.convolve(rest[0], None, None, None), rest[0])
    drawn = from_attention(teacher, (), "paper", mixer="mamba1", d_state=4)
    assert drawn.config.conv_silu and not drawn.config.proj_bias
    assert all(0.4 < m.conv1d.weight.abs().max() <= 0.5 for m in mixers(drawn))


def test_groups_of_mamba1_begin_as_the_same_function(teacher):
    """Convolutions are identities and everything else is by head, so heads that share x and B or have their own copies
    of them compute the same."""
    shared, own = (from_attention(teacher, KEPT, mixer="mamba1", d_state=4, ngroups=groups) for groups in (None, 6))
    with torch.no_grad():
        for few, many in zip(mixers(shared), mixers(own), strict=True):
            rows, theirs = in_proj_rows(many.config), in_proj_rows(few.config)
            for name in ("z", "dt"):  # what is drawn is drawn by row, so copied for the comparison
                many.in_proj.weight[rows[name]] = few.in_proj.weight[theirs[name]]
            many.dt_bias.copy_(few.dt_bias)
            many.dt_proj.weight.copy_(few.dt_proj.weight)
    text = tokens(2, 11)
    torch.testing.assert_close(own.hidden(text), shared.hidden(text))
    legacy = from_attention(teacher, KEPT, mixer="mamba1", d_state=4, gqa_mapping="legacy")
    assert (legacy.hidden(text) - shared.hidden(text)).abs().max() > 1e-2


def test_a_shared_student_holds_the_carried_weights_once(teacher):
    student, own = from_attention(teacher, KEPT, share=True), from_attention(teacher, KEPT)
    theirs, copies = dict(teacher.named_parameters()), dict(own.named_parameters())
    for name, p in student.named_parameters():
        assert torch.equal(p, copies[name])
        assert (".mamba." in name) != (name in theirs and p.data_ptr() == theirs[name].data_ptr())


def test_everything_else_is_the_teachers_own_copy(teacher):
    student = from_attention(teacher, KEPT)
    theirs = dict(teacher.named_parameters())
    for name, ours in student.named_parameters():
        if ".mamba." not in name:
            assert torch.equal(ours, theirs[name])
            assert ours.data_ptr() != theirs[name].data_ptr()
    assert "model.layers.1.self_attn.q_proj.weight" in dict(student.named_parameters())


def trained(student: HybridForCausalLM) -> HybridForCausalLM:
    """As training leaves it: no weight is what it was."""
    for p in student.parameters():
        p.data = p.data.float() * 1.25 + 0.01
    return student


@pytest.mark.parametrize("method", ["copy", "paper"])
def test_a_student_continues_with_all_of_its_weights(teacher, method):
    before = trained(from_attention(teacher, (1, 3), method))
    after = from_attention(before, (3,), method, seed=4)
    assert (after.config.mamba_layers, new_mixers(before, after)) == ((0, 1, 2), (1,))
    theirs, ours = dict(before.named_parameters()), dict(after.named_parameters())
    assert {name for name in ours if name not in theirs} == {n for n in ours if n.startswith("model.layers.1.mamba.")}
    for name in ours.keys() & theirs.keys():
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    rows, attention, mixer = in_proj_rows(after.config), before.blocks[1].self_attn, after.blocks[1].mamba
    for source, target in (("q_proj", "C"), ("k_proj", "B"), ("v_proj", "x")):
        assert torch.equal(mixer.in_proj.weight[rows[target]], getattr(attention, source).weight)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert not torch.equal(mixer.out_proj.weight, teacher.blocks[1].self_attn.o_proj.weight)


def test_a_mamba1_student_continues_with_all_of_its_weights(teacher):
    form = {"mixer": "mamba1", "d_state": 4, "gqa_mapping": "legacy"}
    before = trained(from_attention(teacher, (1, 3), **form))
    after = from_attention(before, (3,), **form)
    theirs, ours = dict(before.named_parameters()), dict(after.named_parameters())
    assert {name for name in ours if name not in theirs} == {n for n in ours if n.startswith("model.layers.1.mamba.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    other = {"mixer": "mamba2", "d_state": None, "gqa_mapping": "heads"}
    for change in (other, {"gqa_mapping": "heads"}, {"d_state": 8}):
        with pytest.raises(ValueError, match="the same mixer, gqa_mapping, d_state"):
            from_attention(before, (3,), **{**form, **change})


def test_a_student_without_new_mixers_computes_the_same(teacher):
    before = trained(from_attention(teacher, KEPT))
    after = from_attention(before, KEPT, seed=9)
    assert new_mixers(before, after) == ()
    assert torch.equal(before(tokens(2, 9)), after(tokens(2, 9)))


def test_attention_that_was_given_up_does_not_come_back(teacher):
    before = from_attention(teacher, (1, 3))
    with pytest.raises(ValueError, match=r"layers \[0, 2\] is to be kept.*layers \[1, 3\]"):
        from_attention(before, (0, 1, 2))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("copy", False), ("paper", False), "method 'paper', rope false and ngroups 2 .*make mixers of another form"),
        (("paper", False), ("copy", False), "method 'copy', rope false and ngroups 2 .*make mixers of another form"),
        (("copy", False), ("copy", True), "rope true and ngroups 2 .*the same mixer, .* rope"),
        (("copy", True), ("copy", False), "rope false and ngroups 2 .*the same mixer, .* rope"),
    ],
)
def test_mixers_of_two_forms_do_not_go_together(teacher, first, second, said):
    before = from_attention(teacher, (1, 3), first[0], rope=first[1])
    with pytest.raises(ValueError, match=said):
        from_attention(before, (3,), second[0], rope=second[1])


@pytest.mark.parametrize("mixer_rope", [False, True])
@pytest.mark.parametrize("method", ["copy", "paper"])
def test_more_groups_begin_as_the_same_function(teacher, method, mixer_rope):
    shared = from_attention(teacher, KEPT, method, rope=mixer_rope, seed=2)
    own = from_attention(teacher, KEPT, method, rope=mixer_rope, ngroups=6, seed=2)
    assert [m.in_proj.out_features for m in (mixers(shared)[0], mixers(own)[0])] == [48 + 16 + 16 + 48 + 6, 4 * 48 + 6]
    for few, many in zip(mixers(shared), mixers(own), strict=True):
        rows, theirs = in_proj_rows(own.config), in_proj_rows(shared.config)
        assert torch.equal(
            many.in_proj.weight[rows["B"]].view(2, 3, 8, -1)[:, 1], few.in_proj.weight[theirs["B"]].view(2, 8, -1)
        )
        for name, ours in many.named_parameters():  # what is drawn is drawn by row, so copied for the comparison
            drawn = few.get_parameter(name).data
            if name.startswith("conv1d"):
                x, B, C = drawn.split((16, 16, 48))
                x, B = (t.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1) for t in (x, B))
                ours.data = torch.cat([x, B, C])
            elif name.startswith("in_proj"):
                ours[rows["z"]], ours[rows["dt"]] = drawn[theirs["z"]], drawn[theirs["dt"]]
            else:
                ours.data = drawn
    text = tokens(2, 11)
    torch.testing.assert_close(own.hidden(text), shared.hidden(text))


def test_rope_changes_no_weight(teacher):
    plain, rotary = (from_attention(teacher, KEPT, rope=rope, seed=2) for rope in (False, True))
    assert rotary.config == replace(plain.config, mixer_rope=True)
    for ours, theirs in zip(rotary.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert from_attention(rotary, (), rope=True).config.mixer_rope, "a student continues in its own form"


def test_a_window_begins_as_the_teachers_attention_beside_an_empty_sink(teacher):
    """Where it holds the whole text, the window's half of a mixer is the attention itself with one more key and value,
    which are zero."""
    student = from_attention(teacher, KEPT, rope=True, window=16)
    hidden = torch.randn(2, 9, teacher.config.d_model, generator=torch.Generator().manual_seed(0))
    config, rows = student.config, in_proj_rows(student.config)
    assert rows["z"] == slice(0, 2 * config.d_inner)
    cos, sin = rope_tables(teacher.inv_freq, torch.arange(9).expand(2, -1), torch.float32)
    for layer in new_mixers(teacher, student):
        mixer, attention = student.blocks[layer].mamba, teacher.blocks[layer].self_attn
        with torch.no_grad():
            mixer.in_proj.weight[rows["z"]] = 0.0  # what remains of the gates is their bias
            features = mixer.features(hidden)[..., config.d_inner :]
            q, k, v = (
                p(hidden).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = (t.repeat_interleave(config.n_heads // config.n_kv_heads, 1) for t in (k, v))
            scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
            weights = torch.nn.functional.pad(scores, (1, 0)).softmax(-1)[..., 1:]
            wanted = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        of_scan, of_window = mixer.out_proj.weight.chunk(2, dim=1)
        torch.testing.assert_close(features @ of_window.T, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(of_scan, of_window)


def test_windows_belong_to_one_form(teacher):
    first = from_attention(teacher, (1, 3), window=4)
    with pytest.raises(ValueError, match="window 8.*another form"):
        from_attention(first, (1,), window=8)
    assert from_attention(first, (1,), window=4).config.mixer_window == 4
    with pytest.raises(ValueError, match="mixer_window.*it is 4 and the mixer mamba1"):
        from_attention(teacher, (1, 3), mixer="mamba1", d_state=4, window=4)


def test_rows_are_in_the_papers_order():
    rows = in_proj_rows(tiny_hybrid.config())
    assert list(rows) == ["z", "x", "B", "C", "dt"]
    assert [(s.start, s.stop) for s in rows.values()] == [(0, 48), (48, 64), (64, 80), (80, 128), (128, 134)]


def test_copy_starts_with_an_identity_and_an_open_gate(teacher):
    student = from_attention(teacher, (), "copy", gate_bias=2.5, gate_scale=0.0, a_min=0.5, a_max=8.0, seed=1)
    assert not student.config.conv_silu
    assert student.config.proj_bias
    rows = in_proj_rows(student.config)
    x = torch.randn(1, 9, student.config.conv_channels)
    for mixer in mixers(student):
        convolved = torch.nn.functional.conv1d(
            torch.nn.functional.pad(x.transpose(1, 2), (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=80
        )
        assert torch.equal(convolved.transpose(1, 2), x)
        A = mixer.A_log.exp()
        torch.testing.assert_close(A[[0, -1]], torch.tensor([0.5, 8.0]))
        torch.testing.assert_close(A[1:] / A[:-1], torch.full((5,), 16 ** (1 / 5)))
        z = mixer.in_proj(torch.randn(5, 48))[:, rows["z"]]
        assert torch.equal(z, torch.full_like(z, 2.5))
        assert mixer.in_proj.bias[48:].abs().max() == 0
        assert torch.equal(mixer.D, torch.ones(6))
        assert torch.equal(mixer.norm.weight, torch.ones(48))


def test_gate_scale_is_a_factor(teacher):
    whole, small = (from_attention(teacher, (), "copy", gate_scale=scale) for scale in (1.0, 0.1))
    for a, b in zip(mixers(whole), mixers(small), strict=True):
        torch.testing.assert_close(b.in_proj.weight[:48], 0.1 * a.in_proj.weight[:48])
        assert torch.equal(a.in_proj.weight[48:], b.in_proj.weight[48:])


def test_paper_draws_as_the_released_code(teacher):
    student = from_attention(teacher, (), "paper", gate_bias=9.0, gate_scale=0.0, a_min=100.0, a_max=200.0, seed=1)
    assert student.config.conv_silu
    assert not student.config.proj_bias
    rows = in_proj_rows(student.config)
    A = torch.cat([m.A_log.exp() for m in mixers(student)])
    assert A.min() >= 1
    assert A.max() <= 16
    assert A.std() > 2
    bound = 1 / math.sqrt(48)  # Linear draws U(−1/√fan_in, 1/√fan_in)
    for mixer in mixers(student):
        assert mixer.in_proj.bias is None
        for name in ("z", "dt"):
            drawn = mixer.in_proj.weight[rows[name]]
            assert drawn.abs().max() <= bound
            assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert mixer.conv1d.weight.abs().max() <= 0.5
        assert mixer.conv1d.weight.std() == pytest.approx(0.5 / math.sqrt(3), rel=0.2)
        assert torch.equal(mixer.D, torch.ones(6))


@pytest.mark.parametrize("method", ["copy", "paper"])
def test_time_steps_are_log_uniform(method):
    wide = tiny_hybrid.model(n_heads=512, n_kv_heads=2, head_dim=2, n_layers=1, attention_layers=(0,))
    mixer = from_attention(wide, (), method).model.layers[0].mamba
    dt = softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    share = (dt.log() - math.log(1e-3)) / math.log(100)  # U(0, 1)
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert share.std() == pytest.approx(1 / math.sqrt(12), abs=0.03)


def test_inverse_softplus():
    y = torch.tensor([1e-4, 1e-3, 0.1, 1.0, 20.0])
    torch.testing.assert_close(softplus(inverse_softplus(y)), y, rtol=1e-4, atol=0)


def test_seed_decides_and_the_callers_generator_is_left_alone(teacher):
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (from_attention(teacher, (), "paper", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), wanted)
    text = tokens(1, 12)
    assert torch.equal(one(text), same(text))
    assert not torch.equal(one(text), other(text))


def test_half_precision_teacher_gets_float32_mixers():
    teacher = tiny_hybrid.model(attention_layers=(0, 1, 2, 3)).bfloat16()
    student = from_attention(teacher, KEPT)
    types = {(".mamba." in name, p.dtype) for name, p in student.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mamba.in_proj.weight",
        "model.layers.2.mamba.out_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
    ],
)
def test_verify_notices_a_changed_weight(teacher, name):
    student = from_attention(teacher, KEPT)
    verify(teacher, student)
    changed = dict(student.named_parameters())[name]
    changed.data[60 if "in_proj" in name else 0] += 1e-3
    with pytest.raises(RuntimeError, match=name.split(".mamba")[0].replace("model.layers.", "(model.layers.|layer )")):
        verify(teacher, student)


@pytest.mark.parametrize("name", ["model.layers.0.mamba.A_log", "model.layers.2.mlp.up_proj.weight"])
def test_verify_notices_a_weight_that_was_not_carried_over(teacher, name):
    before = trained(from_attention(teacher, (1, 3)))
    after = from_attention(before, (3,))
    verify(before, after)
    dict(after.named_parameters())[name].data[0] += 1e-3
    with pytest.raises(RuntimeError, match=name):
        verify(before, after)
