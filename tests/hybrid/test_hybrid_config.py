import json

import pytest

from hybrid import HybridConfig, UnsupportedModel
from tests.hybrid import tiny_hybrid

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}


def test_a_llama_is_all_attention():
    config = HybridConfig.from_dict({**LLAMA, "eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": 4})
    assert (config.attention_layers, config.mamba_layers) == ((0, 1, 2), ())
    assert (config.n_kv_heads, config.head_dim) == (6, 8), "missing fields follow from the others"
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2, 3), 1, 4)
    assert not config.tie_word_embeddings


def test_sizes_of_the_mixer():
    config = tiny_hybrid.config()
    assert (config.d_inner, config.d_xb, config.conv_channels) == (48, 16, 80)
    assert config.mamba_layers == (0, 2)


def test_own_format_comes_back(tmp_path):
    config = tiny_hybrid.config(
        eos_token_ids=(2, 3),
        rope={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0},
        conv_silu=True,
        proj_bias=False,
        mixer_rope=True,
        family="qwen3",
        attention_bias=True,
        qk_norm=True,
        sliding_window=9,
        no_rope_layers=(1, 2),
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert HybridConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize(
    ("raw", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_type": "default", "rope_theta": 7.0}),
    ],
    ids=["none", "old", "old scaled", "transformers 5"],
)
def test_rope_of_old_and_new_configs(raw, rope):
    assert HybridConfig.from_dict({**LLAMA, **raw}).rope == rope


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": None}, "None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*llama3"),
    ],
)
def test_unsupported_models_are_refused_by_name(raw, named):
    with pytest.raises(UnsupportedModel, match=named):
        HybridConfig.from_dict({**LLAMA, **raw})


def test_models_without_the_key_have_no_rotary_mixers():
    written = tiny_hybrid.config().to_dict()
    assert written.pop("mixer_rope") is False
    assert HybridConfig.from_dict(written) == tiny_hybrid.config()


def test_impossible_shapes():
    with pytest.raises(ValueError, match="mixer_rope belongs to mamba2; the mixer is mamba1"):
        tiny_hybrid.config(mixer="mamba1", mixer_rope=True)
    with pytest.raises(ValueError, match="n_heads 6 is not a multiple of n_kv_heads 4"):
        tiny_hybrid.config(n_kv_heads=4)
    for ngroups in (3, 12):
        with pytest.raises(
            ValueError, match=f"ngroups {ngroups} must be a multiple of n_kv_heads 2 and divide n_heads 6"
        ):
            tiny_hybrid.config(ngroups=ngroups)
    with pytest.raises(ValueError, match=r"attention_layers \[4, -1\] do not exist; the model has layers 0 to 3"):
        tiny_hybrid.config(attention_layers=(1, 4, -1))
    with pytest.raises(ValueError, match=r"no_rope_layers \[4\] do not exist; the model has layers 0 to 3"):
        tiny_hybrid.config(no_rope_layers=(1, 4))
    with pytest.raises(ValueError, match="sliding_window must be >= 1, or None for all tokens, got 0"):
        tiny_hybrid.config(sliding_window=0)
