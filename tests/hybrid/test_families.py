"""Each family of teachers: nothing replaced is transformers' own model, some replaced is a student like any other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid import HybridConfig, UnsupportedModel, load_pretrained, save_pretrained
from hybrid.drafts import ModelDraft
from hybrid.engine import DecodeEngine
from hybrid.families import FAMILIES, settings
from hybrid.families.table import table
from hybrid.generate import generate
from hybrid.init_map import from_attention
from tests.hybrid import tiny_hybrid

SHAPE: dict[str, Any] = {
    "vocab_size": tiny_hybrid.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # its embedding would be zero
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": False},
    "Llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "Llama 3.2": {"model_type": "llama", "rope_parameters": LLAMA3},
    "Mistral 0.1": {"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
    "Mistral 0.3": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen2, window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
    },
    "Qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "SmolLM3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
}  # fmt: skip


def save_theirs(folder: Path, changes: dict[str, Any], **options: Any) -> Any:
    """transformers' model of that family, in whose every layer biases and norms matter, saved to the folder."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    made.save_pretrained(folder, **options)
    return made


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """(transformers' model, ours from its folder)."""
    folder = tmp_path_factory.mktemp("family")
    theirs = save_theirs(folder, CASES[request.param])
    return theirs, load_pretrained(folder)


def test_all_families_are_tried():
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES)


def test_nothing_replaced_is_the_teacher(family):
    theirs, ours = family
    assert ours.config.family == theirs.config.model_type
    text = tiny_hybrid.tokens(2, 45)
    with torch.no_grad():
        torch.testing.assert_close(ours(text), theirs(text).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [[45], [20, 25], [1] * 45], ids=str)
def test_reading_in_pieces_is_the_teacher(family, calls):
    theirs, ours = family
    text, cache = tiny_hybrid.tokens(2, 45), ours.new_cache(2, 45)
    with torch.no_grad():
        parts = [ours(part, cache=cache) for part in text.split(calls, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), theirs(text).logits, rtol=1e-4, atol=1e-4)


def test_packed_documents_are_the_teachers_one_by_one(family):
    theirs, ours = family
    text = tiny_hybrid.tokens(1, 40)
    lengths = (17, 1, 22)
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = ours(text, seq_idx).split(lengths, dim=1)
        for ours_alone, document in zip(packed, text.split(lengths, dim=1), strict=True):
            torch.testing.assert_close(ours_alone, theirs(document).logits, rtol=1e-4, atol=1e-4)


def test_greedy_replies_are_the_teachers(family):
    theirs, ours = family
    prompts = tiny_hybrid.prompts(13, 1, 24)
    replies = generate(ours, prompts, 16, eos_token_ids=[])
    for prompt, reply in zip(prompts, replies, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert reply == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rotary mixers"])
def test_some_replaced_trains_saves_loads_and_decodes(family, rope, tmp_path):
    _, teacher = family
    student = from_attention(teacher, (1, 3), rope=rope)
    text = tiny_hybrid.tokens(2, 33)
    with torch.no_grad():
        wanted = teacher(text).log_softmax(-1)
    student.requires_grad_()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        student.zero_grad()
        loss = torch.nn.functional.kl_div(student(text).log_softmax(-1), wanted, log_target=True, reduction="sum") / 66
        loss.backward()
        losses.append(loss.item())
        reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert reached == {name for name, _ in student.named_parameters()}
        optimizer.step()
    assert losses[1] < losses[0]

    student.requires_grad_(False)
    save_pretrained(student, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == student.config
    with torch.no_grad():
        assert torch.equal(loaded(text), student(text))
    prompts = tiny_hybrid.prompts(19, 4)
    wanted_replies = [tiny_hybrid.greedy(loaded, prompt, 12) for prompt in prompts]
    options: dict[str, Any] = {"batch": 2, "max_length": 40, "eos_token_ids": []}
    assert DecodeEngine(loaded, **options).generate(prompts, 12).replies == wanted_replies
    speculative = DecodeEngine(loaded, draft=ModelDraft(teacher), k=3, **options)
    assert speculative.generate(prompts, 12).replies == wanted_replies


def test_sharded_files_load(tmp_path):
    theirs = save_theirs(tmp_path, CASES["Qwen3"], max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    text = tiny_hybrid.tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(tmp_path)(text), theirs(text).logits, rtol=1e-4, atol=1e-4)


def test_layers_without_rotation_have_mixers_without(tmp_path):
    save_theirs(tmp_path, CASES["SmolLM3"])
    student = from_attention(load_pretrained(tmp_path), (2,), rope=True)
    assert student.config.no_rope_layers == (1, 3)
    assert [student.blocks[i].mamba.config.mixer_rope for i in (0, 1, 3)] == [True, False, False]
    assert student.config.of_layers((1, 2)) == replace(
        student.config, n_layers=2, attention_layers=(1,), no_rope_layers=(0,)
    )


@pytest.mark.parametrize("method", ["copy", "paper"])
def test_biases_become_those_of_the_mixer(method, tmp_path):
    save_theirs(tmp_path, CASES["Qwen2"])
    teacher = load_pretrained(tmp_path)
    mixer, attention = (
        from_attention(teacher, (1, 3), method, gate_bias=3.0).blocks[0].mamba,
        teacher.blocks[0].self_attn,
    )
    z, x, B, C, dt = mixer.in_proj.bias.split((48, 16, 16, 48, 6))
    assert torch.equal(C, attention.q_proj.bias)
    assert torch.equal(B, attention.k_proj.bias)
    assert torch.equal(x, attention.v_proj.bias)
    assert (z == (3.0 if method == "copy" else 0.0)).all() and (dt == 0).all()


def test_norms_are_folded_into_the_rows_of_the_mixer(tmp_path):
    """On inputs such as the norm before the block gives, B and C have the size of attention's keys and queries."""
    save_theirs(tmp_path, CASES["Qwen3"])
    teacher = load_pretrained(tmp_path)
    student = from_attention(teacher, (1, 3), ngroups=6)
    block = teacher.blocks[0]
    random = torch.Generator().manual_seed(0)
    hidden = block.input_layernorm(torch.randn(20000, 48, generator=random))
    made = hidden @ student.blocks[0].mamba.in_proj.weight.T
    _, x, B, C, _ = made.split((96, 96, 96, 96, 6), dim=-1)
    attention = block.self_attn
    assert attention.q_norm is not None and attention.k_norm is not None
    for ours, projection, norm in ((C, attention.q_proj, attention.q_norm), (B, attention.k_proj, attention.k_norm)):
        heads = projection(hidden).unflatten(-1, (-1, 16))
        heads = heads.repeat_interleave(6 // heads.shape[1], dim=1)
        plain = ours.unflatten(-1, (6, 16)) / norm.weight
        torch.testing.assert_close(plain.pow(2).mean((0, 2)), torch.ones(6), rtol=0.02, atol=0)
        factor = plain.norm(dim=(0, 2), keepdim=True) / heads.norm(dim=(0, 2), keepdim=True)  # one number a head
        torch.testing.assert_close(plain, heads * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, attention.v_proj(hidden).unflatten(-1, (2, 16)).repeat_interleave(3, 1).flatten(1))


def test_under_autocast_queries_and_keys_have_the_type_of_values(tmp_path, monkeypatch):
    """Attention by blocks takes no others; norms with float32 gains give float32."""
    save_theirs(tmp_path, CASES["Qwen3"])
    types = []

    def recorded(q, k, v, **options):
        types.append((q.dtype, k.dtype, v.dtype))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr("hybrid.attention.scaled_dot_product_attention", recorded)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        load_pretrained(tmp_path)(tiny_hybrid.tokens(1, 5))
    assert types == [(torch.bfloat16,) * 3] * 4


def raw(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**SHAPE, **changes}.items() if v != "left out"}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"model_type": "mistral"}, "sliding_window", 4096),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", None),
        ({"model_type": "llama", "sliding_window": 16}, "sliding_window", None),
        ({"model_type": "qwen2", "sliding_window": 16}, "sliding_window", None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4}, "sliding_window", None),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
            "sliding_window",
            4096,
        ),
        ({"model_type": "qwen3"}, "head_dim", 128),
        ({"model_type": "qwen2"}, "head_dim", 8),
        ({"model_type": "smollm3", "tie_word_embeddings": "left out"}, "tie_word_embeddings", True),
        ({"model_type": "smollm3"}, "rope", {"rope_type": "default", "rope_theta": 2e6}),
        ({"model_type": "smollm3"}, "no_rope_layers", (3,)),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layers", (1, 3)),
    ],
)
def test_what_a_config_leaves_out_is_as_in_transformers(changes, field, value):
    assert settings(raw(**changes))[field] == value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported; supported: 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"model_type": "qwen3", "attention_bias": True}, "a qwen3 with attention_bias=true"),
        ({"model_type": "smollm3", "mlp_bias": True}, "a smollm3 with mlp_bias=true"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "in 3 of 4 layers"),
        ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8}, "in 1 of 4 layers"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"model_type": "mistral", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"model_type": "llama", "head_dim": 12}, "head_dim 12"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(UnsupportedModel, match=re.escape(named)):
        HybridConfig.from_dict(raw(**changes))


def test_the_readme_shows_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(r"<!-- python -m hybrid.families -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert shown is not None and shown[1].strip() == table().strip()
