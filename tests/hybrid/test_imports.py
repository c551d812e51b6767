"""Checkpoints as jxiw/MambaInLlama and jxiw/M1 lay them out, of random weights, against their forward written from its
description in float64, token by token and channel by channel."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hybrid import UnsupportedModel, load_pretrained
from hybrid.drafts import NGramDraft
from hybrid.engine import DecodeEngine
from hybrid.export.__main__ import export
from hybrid.imports import convert
from hybrid.imports.__main__ import main
from hybrid.imports.settings import read_config
from tests.hybrid import tiny_hybrid

WIDTH, INNER, SHARED, MLP, VOCAB, LAYERS, HEADS, GROUPS, RANK = 48, 48, 16, 64, 97, 4, 6, 2, 3
ATTENTION = (1, 3)
ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA = {
    "_name_or_path": "meta-llama/Llama-3.2-3B-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": ROPE_SCALING,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "vocab_size": VOCAB,
}
MAMBA1 = {
    "d_model": WIDTH,
    "ssm_cfg": {"expand": 1, "d_state": 4},
    "rms_norm_eps": 1e-05,
    "vocab_size": None,
    "d_inner": None,
    "d_xb": SHARED,
    "intermediate_size": MLP,
    "hidden_act": "silu",
    "n_layer": LAYERS,
    "attn_layers": list(ATTENTION),
}
MAMBA2 = {**MAMBA1, "ssm_cfg": {"expand": 1, "ngroups": HEADS, "d_state": WIDTH // HEADS}, "d_inner": INNER}
M1 = {**MAMBA1, "d_inner": INNER}
KINDS = {"mamba1": MAMBA1, "mamba2": MAMBA2, "m1": M1}


def weights(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the checkpoint's own names, of a size at which every one of them changes the logits."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.2

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random)

    made = {"model.embed_tokens.weight": normal(VOCAB, WIDTH), "model.norm.weight": between(0.5, 1.5, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        made |= {
            f"{at}.input_layernorm.weight": between(0.5, 1.5, WIDTH),
            f"{at}.post_attention_layernorm.weight": between(0.5, 1.5, WIDTH),
            f"{at}.mlp.gate_proj.weight": normal(MLP, WIDTH),
            f"{at}.mlp.up_proj.weight": normal(MLP, WIDTH),
            f"{at}.mlp.down_proj.weight": normal(WIDTH, MLP),
        }
        if layer in ATTENTION and kind == "m1":
            made[f"{at}.mha.in_proj.weight"] = normal(INNER + 2 * SHARED, WIDTH)
            made[f"{at}.mha.out_proj.weight"] = normal(WIDTH, INNER)
        elif layer in ATTENTION:
            for name, rows in (("q", INNER), ("k", SHARED), ("v", SHARED)):
                made[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, WIDTH)
            made[f"{at}.self_attn.o_proj.weight"] = normal(WIDTH, INNER)
        elif kind == "mamba2":
            channels = INNER + 2 * SHARED
            made |= {
                f"{at}.mamba.in_proj.weight": normal(2 * INNER + 2 * SHARED + HEADS, WIDTH),
                f"{at}.mamba.conv1d.weight": normal(channels, 1, 4),
                f"{at}.mamba.conv1d.bias": normal(channels),
                f"{at}.mamba.dt_bias": normal(HEADS),
                f"{at}.mamba.A_log": between(-1.5, 1.0, HEADS),
                f"{at}.mamba.D": between(0.5, 1.5, HEADS),
                f"{at}.mamba.norm.weight": between(0.5, 1.5, INNER),
                f"{at}.mamba.out_proj.weight": normal(WIDTH, INNER),
            }
        else:
            pieces = {"in_proj_z": INNER, "in_proj_x": SHARED, "B_proj": SHARED, "C_proj": INNER, "dt_proj_down": RANK}
            if kind == "m1":
                pieces = {"in_proj": sum(pieces.values())}
            made |= {f"{at}.mamba.{name}.weight": normal(rows, WIDTH) for name, rows in pieces.items()}
            made |= {
                f"{at}.mamba.dt_proj.weight": normal(INNER, RANK),
                f"{at}.mamba.dt_proj.bias": normal(INNER),
                f"{at}.mamba.conv1d.weight": normal(INNER, 1, 4),
                f"{at}.mamba.conv1d.bias": normal(INNER),
                f"{at}.mamba.A_log": between(-1.5, 1.0, INNER, 4),
                f"{at}.mamba.D": between(0.5, 1.5, INNER),
                f"{at}.mamba.out_proj.weight": normal(WIDTH, INNER),
            }
    return made


def checkpoint(folder: Path, kind: str = "mamba1", storage: str = "safetensors", **llama: Any) -> dict[str, Tensor]:
    """Write one; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | llama))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of the checkpoint"}')
    (folder / "mamba_config.json").write_text(json.dumps(KINDS[kind], indent=4))
    made = weights(kind)
    store(folder, made, storage)
    return made


def store(folder: Path, tensors: dict[str, Tensor], storage: str) -> None:
    if storage == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif storage == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        stem, ending = ("model", "safetensors") if storage == "sharded" else ("pytorch_model", "bin")
        where = {n: f"{stem}-{i % 2 + 1:05d}-of-00002.{ending}" for i, n in enumerate(tensors)}
        for file in set(where.values()):
            shard = {n: t for n, t in tensors.items() if where[n] == file}
            if ending == "bin":
                torch.save(shard, folder / file)
            else:
                save_file(shard, folder / file)
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))


def described(kind: str, given: dict[str, Tensor], tokens: list[int], by_heads: bool = False) -> Tensor:
    """Logits (L, V) float64. by_heads: Mamba-1 mixers share x and B as attention shares keys and values."""
    w = {name: tensor.double() for name, tensor in given.items()}
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        own = {n.removeprefix(f"model.layers.{layer}."): t for n, t in w.items() if f".layers.{layer}." in n}
        u = rms(x, own["input_layernorm.weight"])
        if layer in ATTENTION:
            x = x + attention(kind, own, u)
        else:
            x = x + (mamba2(own, u) if kind == "mamba2" else mamba1(own, u, by_heads))
        u = rms(x, own["post_attention_layernorm.weight"])
        x = (
            x
            + (silu(u @ own["mlp.gate_proj.weight"].T) * (u @ own["mlp.up_proj.weight"].T))
            @ own["mlp.down_proj.weight"].T
        )
    return rms(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def attention(kind: str, w: dict[str, Tensor], u: Tensor) -> Tensor:
    """M1's has plain rotary frequencies."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if kind == "m1":
        q, k, v = (u @ w["mha.in_proj.weight"].T).split([INNER, SHARED, SHARED], dim=-1)
        out = w["mha.out_proj.weight"]
    else:
        q, k, v = (u @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        out = w["self_attn.o_proj.weight"]
    scaling = None if kind == "m1" else dict(ROPE_SCALING)
    rotary = LlamaConfig(**{**LLAMA, "rope_scaling": scaling, "rope_theta": 500.0})
    frequencies = LlamaRotaryEmbedding(rotary).inv_freq.double()
    width = INNER // HEADS
    y = torch.zeros(len(u), INNER, dtype=torch.float64)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        query = q[:, head * width : (head + 1) * width]
        key = k[:, group * width : (group + 1) * width]
        value = v[:, group * width : (group + 1) * width]
        for t in range(len(u)):
            scores = [turned(query[t], t * frequencies) @ turned(key[s], s * frequencies) for s in range(t + 1)]
            shares = torch.softmax(torch.stack(scores) / width**0.5, dim=0)
            y[t, head * width : (head + 1) * width] = shares @ value[: t + 1]
    return y @ out.T


def turned(vector: Tensor, angles: Tensor) -> Tensor:
    first, second = vector.chunk(2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(len(x)):
        y[t] = bias
        for back in range(min(4, t + 1)):
            y[t] += weight[:, 0, 3 - back] * x[t - back]
    return silu(y)


def mamba1(w: dict[str, Tensor], u: Tensor, by_heads: bool) -> Tensor:
    """Pieces of d_state channels are repeated for x before its convolution, and for B; dt from two matrices."""
    d_state, ratio = 4, INNER // SHARED
    if "mamba.in_proj.weight" in w:
        parts = (u @ w["mamba.in_proj.weight"].T).split([INNER, SHARED, SHARED, INNER, RANK], dim=-1)
    else:
        names = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
        parts = tuple(u @ w[f"mamba.{name}.weight"].T for name in names)
    z, x, B, C, dt = parts
    piece = INNER // HEADS if by_heads else d_state
    source = [c // piece // ratio * piece + c % piece for c in range(INNER)]
    x, B = x[:, source], B[:, source]
    x = convolved(x, w["mamba.conv1d.weight"], w["mamba.conv1d.bias"])
    dt = softplus(dt @ w["mamba.dt_proj.weight"].T + w["mamba.dt_proj.bias"])
    A = -torch.exp(w["mamba.A_log"])
    y = torch.zeros_like(x)
    for c in range(INNER):
        group = slice(c // d_state * d_state, c // d_state * d_state + d_state)
        state = torch.zeros(d_state, dtype=torch.float64)
        for t in range(len(u)):
            state = torch.exp(dt[t, c] * A[c]) * state + dt[t, c] * x[t, c] * B[t, group]
            y[t, c] = C[t, group] @ state + w["mamba.D"][c] * x[t, c]
    return (y * silu(z)) @ w["mamba.out_proj.weight"].T


def mamba2(w: dict[str, Tensor], u: Tensor) -> Tensor:
    """x, B and C are convolved; heads of a group read the same x and B; the norm of the gated output is by head."""
    width = INNER // HEADS
    parts = (u @ w["mamba.in_proj.weight"].T).split([INNER, 2 * SHARED + INNER, HEADS], dim=-1)
    z, xBC, dt = parts
    xBC = convolved(xBC, w["mamba.conv1d.weight"], w["mamba.conv1d.bias"])
    x, B, C = xBC.split([SHARED, SHARED, INNER], dim=-1)
    dt = softplus(dt + w["mamba.dt_bias"])
    y = torch.zeros(len(u), INNER, dtype=torch.float64)
    for head in range(HEADS):
        mine = slice(head * width, (head + 1) * width)
        group = head // (HEADS // GROUPS)
        shared = slice(group * width, (group + 1) * width)
        state = torch.zeros(width, width, dtype=torch.float64)
        for t in range(len(u)):
            decay = torch.exp(-torch.exp(w["mamba.A_log"][head]) * dt[t, head])
            state = decay * state + dt[t, head] * torch.outer(x[t, shared], B[t, shared])
            y[t, mine] = state @ C[t, mine] + w["mamba.D"][head] * x[t, shared]
        gated = y[:, mine] * silu(z[:, mine])
        y[:, mine] = rms(gated, w["mamba.norm.weight"][mine])
    return y @ w["mamba.out_proj.weight"].T


TOKENS = tiny_hybrid.prompts(11, seed=3)[0]


@pytest.mark.parametrize(
    ("kind", "storage"),
    [
        ("mamba1", "safetensors"),
        ("mamba1", "bin"),
        ("mamba2", "bin"),
        ("mamba2", "sharded"),
        ("m1", "sharded"),
        ("m1", "sharded-bin"),
    ],
)
def test_the_imported_model_computes_what_the_published_one_does(kind: str, storage: str, tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "theirs", kind, storage)
    config = convert(tmp_path / "theirs", tmp_path / "ours")
    model = load_pretrained(tmp_path / "ours")
    assert model.config == config
    assert config.attention_layers == ATTENTION
    assert config.mixer == ("mamba2" if kind == "mamba2" else "mamba1")
    expected = described(kind, given, TOKENS)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(torch.tensor([TOKENS]))[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_mamba_1_shares_by_pieces_of_the_state_and_not_by_heads(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = load_pretrained(tmp_path / "ours")(torch.tensor([TOKENS]))[0].double()
    assert (ours - described("mamba1", given, TOKENS, by_heads=True)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_decodes_with_a_cache_and_with_speculation(kind: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs", kind)
    convert(tmp_path / "theirs", tmp_path / "ours")
    model = load_pretrained(tmp_path / "ours")
    expected = tiny_hybrid.greedy(model, TOKENS, 12)
    assert model.generate([TOKENS], 12, eos_token_ids=()) == [expected]
    engine = DecodeEngine(model, batch=1, max_length=64, k=3, draft=NGramDraft(), eos_token_ids=())
    assert engine.generate([TOKENS], 12).replies == [expected]


@pytest.mark.parametrize(("kind", "to"), [("mamba2", "bamba"), ("mamba1", "hf")])
def test_an_imported_model_goes_on_to_transformers(kind: str, to: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = checkpoint(tmp_path / "theirs", kind)
    convert(tmp_path / "theirs", tmp_path / "ours")
    export(tmp_path / "ours", to, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert type(model).__name__ == {"bamba": "BambaForCausalLM", "hf": "HybridLlamaForCausalLM"}[to]
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits.double(), described(kind, given, TOKENS), rtol=1e-4, atol=1e-4)


def test_m1_has_plain_rotary_frequencies_and_mamba_in_llama_its_base_s(tmp_path: Path) -> None:
    for kind in KINDS:
        checkpoint(tmp_path / kind, kind)
    ropes = {kind: convert(tmp_path / kind, tmp_path / f"{kind}-ours").rope for kind in KINDS}
    assert ropes["m1"] == {"rope_type": "default", "rope_theta": 500.0}
    assert ropes["mamba1"] == ropes["mamba2"] == {**ROPE_SCALING, "rope_theta": 500.0}


def test_the_base_may_be_of_another_family(tmp_path: Path) -> None:
    """Zephyr, which the paper's first models were made of, is a Mistral."""
    checkpoint(tmp_path / "theirs", model_type="mistral", sliding_window=32, rope_scaling=None)
    config = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (config.family, config.sliding_window) == ("mistral", 32)
    assert load_pretrained(tmp_path / "ours").config == config


def test_what_a_mamba_1_checkpoint_leaves_out_is_what_the_published_code_takes(tmp_path: Path) -> None:
    """Heads of 32 channels, so that 16 numbers of state are half a head; dt from ⌈128 / 16⌉ numbers."""
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    checkpoint(tmp_path, **wide)
    settings = {**MAMBA1, "d_model": 128, "d_xb": 64, "ssm_cfg": {"expand": 1}}
    (tmp_path / "mamba_config.json").write_text(json.dumps(settings))
    config = read_config(tmp_path, None, weights("mamba1"))
    assert (config.state_size, config.dt_size, config.d_conv) == (16, 8, 4)
    assert (config.conv_silu, config.proj_bias) == (True, False)


def test_a_reply_ends_with_any_token_that_ends_one_in_either_file(tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "ours").eos_token_ids == (2, 5, 7)


def test_weights_keep_their_type_or_get_the_one_asked_for(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "theirs", storage="bin")
    torch.save({n: t.bfloat16() for n, t in given.items()}, tmp_path / "theirs" / "pytorch_model.bin")
    convert(tmp_path / "theirs", tmp_path / "kept")
    convert(tmp_path / "theirs", tmp_path / "wide", dtype=torch.float32)
    for folder, expected in (("kept", torch.bfloat16), ("wide", torch.float32)):
        for name, parameter in load_pretrained(tmp_path / folder).named_parameters():
            assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias", ".D")) else expected), name
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == str(expected)[6:]


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, storage="bin")
    head = given["model.embed_tokens.weight"].clone()
    torch.save(given | {"lm_head.weight": head}, tmp_path / "pytorch_model.bin")
    assert convert(tmp_path, tmp_path / "ours").tie_word_embeddings
    head[0, 0] += 1
    torch.save(given | {"lm_head.weight": head}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        convert(tmp_path, tmp_path / "other")
    checkpoint(tmp_path, storage="bin", tie_word_embeddings=False)
    torch.save(given | {"lm_head.weight": head}, tmp_path / "pytorch_model.bin")
    convert(tmp_path, tmp_path / "other")
    assert torch.equal(load_pretrained(tmp_path / "other").lm_head_weight, head)


def test_the_base_gives_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    theirs, base = tmp_path / "theirs", tmp_path / "base"
    checkpoint(theirs)
    checkpoint(base)
    (theirs / "config.json").unlink()
    (base / "tokenizer_config.json").write_text('{"chat_template": "of the base"}')
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no config.json; .* --base"):
        convert(theirs, tmp_path / "ours")
    convert(theirs, tmp_path / "ours", base)
    assert "of the checkpoint" in (tmp_path / "ours" / "tokenizer_config.json").read_text()
    assert (tmp_path / "ours" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_xb": 48}, "contradicts .*config.json: d_xb 48 instead of 16"),
        ({"n_layer": 32, "d_model": 4096, "d_inner": 48}, "d_model 4096 instead of 48, n_layer 32 instead of 4"),
        ({"ssm_cfg": {"d_state": 4}}, "d_inner 96 instead of 48"),
        ({"ssm_cfg": {"expand": 1, "repeat_kv_before_conv": False}}, "repeat_kv_before_conv False; supported: True"),
        ({"ssm_cfg": {"expand": 1, "ngroups": 6}}, "has ngroups, which no mamba1 mixer has; known: d_state"),
        (
            {"attn_layers": [1, 2, 3]},
            r"layers.2.self_attn.*not expected.*layers.2.mamba.*layers \[1, 2, 3\] are attent",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs")
    (tmp_path / "theirs" / "mamba_config.json").write_text(json.dumps(MAMBA1 | change))
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("ssm", "llama", "said"),
    [
        ({"ngroups": 3, "d_state": 16}, {}, "ngroups 3 and d_state 16; supported: .* heads 6 and their width 8"),
        ({"ngroups": 6, "d_state": 8, "norm_before_gate": True}, {}, "norm_before_gate True; supported: False"),
        ({"ngroups": 6, "d_state": 8}, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, .* own norm is 1e-05"),
        ({"ngroups": 6, "d_state": 8}, {"model_type": "gemma2"}, "gemma2"),
    ],
)
def test_forms_that_are_not_implemented_are_refused(
    ssm: dict[str, Any], llama: dict[str, Any], said: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, "mamba2", **llama)
    eps = llama.get("rms_norm_eps", 1e-5)
    settings = MAMBA2 | {"ssm_cfg": {"expand": 1, **ssm}, "rms_norm_eps": eps}
    (tmp_path / "mamba_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match=said):
        convert(tmp_path, tmp_path / "ours")


def test_missing_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    def refused(error: type[Exception], said: str) -> None:
        with pytest.raises(error, match=said):
            convert(tmp_path, tmp_path / "ours")

    given = checkpoint(tmp_path, "m1", "sharded")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(FileNotFoundError, "model.safetensors.index.json names model-00002-of-00002.safetensors")
    for file in tmp_path.glob("model*"):
        file.unlink()
    refused(FileNotFoundError, "no weights; expected")
    store(tmp_path, {n: t for n, t in given.items() if "layers.2.mamba.D" not in n}, "safetensors")
    refused(ValueError, "weights missing .'model.layers.2.mamba.D'")
    store(tmp_path, given | {"model.layers.0.mamba.in_proj.bias": torch.zeros(3)}, "safetensors")
    refused(ValueError, "not expected .'model.layers.0.mamba.in_proj.bias'")
    store(tmp_path, given | {"model.layers.1.mha.in_proj.weight": torch.zeros(96, WIDTH)}, "safetensors")
    refused(ValueError, r"layers.1.mha.in_proj.weight \(96, 48\) cannot become \(48, 48\)")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    refused(ValueError, "a .safetensors file cannot be read")
    store(tmp_path, given, "safetensors")
    (tmp_path / "mamba_config.json").write_text("{")
    refused(ValueError, "mamba_config.json: is not valid JSON")
    (tmp_path / "mamba_config.json").write_text(json.dumps({n: v for n, v in M1.items() if n != "d_xb"}))
    refused(ValueError, "mamba_config.json: has no 'd_xb'")
    (tmp_path / "mamba_config.json").unlink()
    refused(FileNotFoundError, "mamba_config.json: is not there")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]


class Command:
    """Unpickled, makes the file `ran` beside the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.touch, (self.folder / "ran",)


@pytest.mark.parametrize("protocol", [None, 2])
def test_a_bin_file_that_would_run_code_is_refused(protocol: int | None, tmp_path: Path) -> None:
    given = checkpoint(tmp_path, storage="bin")
    file = tmp_path / "pytorch_model.bin"
    if protocol is None:
        torch.save(given | {"model.norm.weight": Command(tmp_path)}, file)
    else:
        file.write_bytes(pickle.dumps({"model.norm.weight": Command(tmp_path)}, protocol))
    with pytest.raises(ValueError, match="pytorch_model.bin: not loaded, as it is no plain file of tensors"):
        convert(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Command(tmp_path)))
    assert (tmp_path / "ran").exists()


def test_a_bin_file_of_anything_but_weights_is_refused(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, storage="bin")
    torch.save({"state_dict": given, "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected names and tensors"):
        convert(tmp_path, tmp_path / "ours")
    for content in (b"", b"PK\x03\x04 cut off"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin: not loaded"):
            convert(tmp_path, tmp_path / "ours")


def test_the_command_says_what_it_wrote_or_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "theirs")
    command = [str(tmp_path / "theirs"), "-o", str(tmp_path / "ours"), "--dtype", "bfloat16"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 layers, 2 of them mamba1 mixers" in said and "without a tokenizer" in said
    assert load_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert main(command) == 1
    assert "ours exists; name a new folder" in capsys.readouterr().err
