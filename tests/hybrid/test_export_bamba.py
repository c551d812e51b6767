"""Students as Bamba models that transformers builds without any code of ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaForCausalLM
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

from hybrid import load_pretrained, save_pretrained
from hybrid.export.__main__ import main
from hybrid.export.bamba import bamba_weights, check, scales
from hybrid.export.errors import CannotExport
from tests.hybrid import tiny_hybrid
from tests.hybrid.test_hf import LLAMA3, padded
from tests.hybrid.tiny_hybrid import greedy, prompts, tokens

by_groups = pytest.mark.skipif(
    "group_size" not in BambaRMSNormGated.__init__.__code__.co_varnames,
    reason="this transformers normalises Bamba's mixers over all channels, 5.23 and later do it by groups",
)
FORMS = {
    "paper": {"conv_silu": True, "proj_bias": False, "tie_word_embeddings": False},
    "linear": {},  # no SiLU after the convolution
    "linear_small_eps": {"rms_norm_eps": 1e-6},
    "linear_untied": {"tie_word_embeddings": False, "rope": LLAMA3},
    "heads": {"ngroups": 6, "conv_silu": True},
    "attention": {"attention_layers": (0, 1, 2, 3), "rope": {"rope_type": "linear", "rope_theta": 90.0, "factor": 3.0}},
    "short_convolution": {"d_conv": 2, "attention_layers": (0,)},
}


def exported(folder, *options, **changes):
    model = tiny_hybrid.model(bos_token_id=1, eos_token_ids=(2, 5), pad_token_id=0, **changes)
    save_pretrained(model, folder / "student")
    assert main([str(folder / "student"), "--to", "bamba", "-o", str(folder / "bamba"), *options]) == 0
    return model, AutoModelForCausalLM.from_pretrained(folder / "bamba")


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    return exported(tmp_path, **FORMS[request.param])


@by_groups
@torch.no_grad()
def test_prefill_cached_decode_and_generate(pair):
    ours, theirs = pair
    assert type(theirs) is BambaForCausalLM
    ids = tokens(2, 60)
    whole = ours(ids)
    assert torch.allclose(theirs(ids).logits, whole, atol=1e-4, rtol=0)
    out = theirs(ids[:, :48], use_cache=True)
    for t in range(48, 60):
        position = torch.full((2, 1), t)
        out = theirs(ids[:, t : t + 1], position_ids=position, past_key_values=out.past_key_values, use_cache=True)
        assert torch.allclose(out.logits[:, 0], whole[:, t], atol=1e-4, rtol=0)
    for prompt in prompts(5, 9):
        reply = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert reply[0, len(prompt) :].tolist() == greedy(ours, prompt, 12)


@by_groups
@torch.no_grad()
def test_left_padding_of_a_mixer_without_bias(tmp_path):
    """Bamba lets the bias of padding into the convolution; without one nothing comes in."""
    ours, theirs = exported(tmp_path, **FORMS["paper"])
    rows = prompts(3, 11)
    ids, mask = padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = theirs(ids, attention_mask=mask, position_ids=positions).logits
    for row, each in zip(rows, logits, strict=True):
        assert torch.allclose(each[-len(row) :], ours(torch.tensor([row]))[0], atol=1e-4, rtol=0)


@by_groups
@torch.no_grad()
def test_compact_keeps_the_state_and_loses_less_than_bfloat16(tmp_path):
    ours, theirs = exported(tmp_path, "--compact")
    assert theirs.config.mamba_d_state == ours.config.head_dim
    ids = tokens(2, 150)
    whole = ours(ids)
    error = (theirs(ids).logits - whole).abs().max() / whole.abs().max()
    assert error < 1e-4
    low = load_pretrained(tmp_path / "student", dtype=torch.bfloat16)(ids)
    assert error < 0.01 * (low - whole).abs().max() / whole.abs().max()


@by_groups
@torch.no_grad()
def test_bfloat16_keeps_every_digit_and_the_leaves(tmp_path):
    """The export is as near to the student as the student's own bfloat16 is."""
    ours, theirs = exported(tmp_path, "--dtype", "bfloat16")
    assert theirs.dtype == torch.bfloat16
    ids = tokens(2, 60)
    whole, low = ours(ids), load_pretrained(tmp_path / "student", dtype=torch.bfloat16)(ids).float()
    assert (theirs(ids).logits.float() - whole).abs().mean() < 2 * (low - whole).abs().mean()
    raised = BambaForCausalLM.from_pretrained(tmp_path / "bamba", dtype=torch.float32)
    rounded = load_pretrained(tmp_path / "student")
    for name, p in rounded.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")):
            p.data = p.data.bfloat16().float()
    assert torch.allclose(raised(ids).logits, rounded(ids), atol=1e-4, rtol=0)


def test_sizes_and_numbers_stay_in_range(tmp_path):
    ours, _ = exported(tmp_path, rms_norm_eps=1e-6)
    raw = json.loads((tmp_path / "bamba" / "config.json").read_text())
    assert torch.finfo(torch.float32).tiny < raw["rms_norm_eps"] < 1e-30
    assert (raw["mamba_n_groups"], raw["mamba_d_state"], raw["mamba_expand"]) == (6, 16, 1)
    for name, tensor in bamba_weights(ours.config, dict(ours.named_parameters())):
        nonzero = tensor[tensor != 0].abs()
        assert tensor.isfinite().all() and (not len(nonzero) or nonzero.min() > 1e-25), name
    assert scales(replace(ours.config, conv_silu=True), compact=False).stream == 1.0


def test_large_exports_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid.checkpoint.save_weights.__defaults__", (30_000,))
    ours, theirs = exported(tmp_path)
    assert len(list((tmp_path / "bamba").glob("model-*-of-*.safetensors"))) > 2
    assert sum(p.numel() for p in theirs.parameters()) > sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mixer": "mamba1", "d_state": 8}, r"mixers are mamba1.*init_from_attention.mixer"),
        ({"mixer_rope": True}, r"rotated by position.*init_from_attention.rope = false"),
        ({"n_heads": 8}, r"8 heads of 8 make 64 channels.*wide, 48"),
        ({"attention_layers": ()}, "no layer of attention"),
        ({"qk_norm": True}, "normalises q and k"),
        ({"sliding_window": 16}, "window of 16 tokens"),
        ({"no_rope_layers": (1,)}, r"layers \[1\] has no rotary"),
        ({"reads_features": True}, "a draft that reads another model's features"),
    ],
)
def test_what_bamba_lacks_is_refused_with_the_reason(changes, reason):
    with pytest.raises(CannotExport, match=reason):
        check(tiny_hybrid.config(**changes))


def test_all_reasons_at_once_and_no_files(tmp_path, capsys):
    save_pretrained(tiny_hybrid.model(mixer_rope=True, attention_layers=()), tmp_path / "student")
    assert main([str(tmp_path / "student"), "--to", "bamba", "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "rotated by position" in error and "no layer of attention" in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path, capsys):
    exported(tmp_path)
    before = (tmp_path / "bamba" / "config.json").read_bytes()
    assert main([str(tmp_path / "student"), "--to", "hf", "-o", str(tmp_path / "bamba")]) == 1
    assert "bamba exists; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "bamba" / "config.json").read_bytes() == before
    assert main([str(tmp_path / "nothing"), "--to", "hf", "-o", str(tmp_path / "new")]) == 1
