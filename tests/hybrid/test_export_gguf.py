"""Students as GGUF: what is written, and what llama.cpp makes of it where its Python package is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybrid import load_pretrained, save_pretrained
from hybrid.export.__main__ import main
from hybrid.export.errors import CannotExport
from hybrid.export.gguf import check, splitting
from tests.hybrid import tiny_hybrid
from tests.hybrid.test_hf import LLAMA3
from tests.hybrid.tiny_hybrid import VOCAB, greedy, tokens

PAPER = {"conv_silu": True, "proj_bias": False, "bos_token_id": 1, "eos_token_ids": (2,)}


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a byte-level tokenizer as SmolLM2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 6]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "ll", "hell"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(words[:3])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("hi")
    return folder


def exported(tmp_path, tokenizer, *options, **changes):
    model = tiny_hybrid.model(**PAPER, **changes)
    save_pretrained(model, tmp_path / "student", tokenizer_from=tokenizer)
    assert main([str(tmp_path / "student"), "--to", "gguf", "-o", str(tmp_path / "out.gguf"), *options]) == 0
    return model, tmp_path / "out.gguf"


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written(tmp_path, tokenizer, tied):
    model, path = exported(tmp_path, tokenizer, tie_word_embeddings=tied)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "granitehybrid"
    assert fields["granitehybrid.attention.head_count_kv"] == [0, 2, 0, 2]
    assert (fields["granitehybrid.ssm.inner_size"], fields["granitehybrid.ssm.group_count"]) == (96, 12)
    assert fields["tokenizer.ggml.pre"] == "smollm" and fields["tokenizer.chat_template"] == "hi"
    assert fields["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(fields["tokenizer.ggml.tokens"]) == VOCAB and fields["tokenizer.ggml.merges"][-1] == "he ll"
    assert fields["tokenizer.ggml.token_type"][2:4] == [3, 1] and not fields["tokenizer.ggml.add_bos_token"]
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    assert ("output.weight" in tensors) == (not tied)
    mixer, attention = model.blocks[0].mamba, model.blocks[1].self_attn
    assert torch.allclose(tensors["blk.0.ssm_a"][:6, 0], mixer.A)
    q = tensors["blk.1.attn_q.weight"].view(6, 4, 2, 48)  # rows of a head in pairs that turn together
    assert torch.equal(q.transpose(1, 2).reshape(48, 48), attention.q_proj.weight)
    z, _, _, C, dt = tensors["blk.0.ssm_in.weight"].split([96, 96, 96, 96, 12])
    assert torch.equal(z[:48], mixer.in_proj.weight[:48]) and torch.equal(dt[:6], mixer.in_proj.weight[-6:])
    assert not any(t.any() for t in (z[48:], C[48:], dt[6:], tensors["blk.0.ssm_out.weight"][:, 48:]))


def test_bfloat16_is_of_matrices(tmp_path, tokenizer):
    model, path = exported(tmp_path, tokenizer, "--dtype", "bfloat16")
    types = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
    low = {name for name, kind in types.items() if kind == "BF16"}
    assert {"token_embd.weight", "blk.0.ssm_in.weight", "blk.1.attn_q.weight", "blk.3.ffn_down.weight"} <= low
    assert not any("norm" in n or "conv1d" in n or n.endswith(("ssm_a", "ssm_d", "bias")) for n in low)
    data = next(t.data for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    embedding = torch.from_numpy(np.array(data)).view(torch.bfloat16)
    assert torch.equal(embedding, model.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize("rope", [{}, {"rope": {"rope_type": "linear", "rope_theta": 90.0, "factor": 3.0}}])
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, rope):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python: builds llama.cpp, in minutes")
    model, path = exported(tmp_path, tokenizer, **rope)
    plain = {"type_k": 0, "type_v": 0}  # keys and values as float32
    llama = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **plain)
    text = tokens(1, 40)
    llama.eval(text[0].tolist())
    theirs = torch.from_numpy(np.array(llama._scores))
    assert torch.allclose(theirs, model(text)[0], atol=1e-3, rtol=0)
    prompt = llama.tokenize(b"hello hell 1", add_bos=False)
    assert prompt == Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("hello hell 1").ids
    replies = llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True)
    assert [next(replies) for _ in range(12)] == greedy(model, prompt, 12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conv_silu": True}, r'a bias.*init_from_attention.method = "paper"'),
        ({"proj_bias": False}, r'no SiLU.*init_from_attention.method = "paper"'),
        ({**PAPER, "rope": LLAMA3}, "scaled as Llama 3.1's"),
        ({**PAPER, "mixer_rope": True}, "rotated by position"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_with_the_reason(changes, reason):
    with pytest.raises(CannotExport, match=reason):
        check(tiny_hybrid.config(**changes))


def test_tokenizers_are_told_apart(tokenizer):
    made = json.loads((tokenizer / "tokenizer.json").read_text())
    assert splitting(made) == "smollm"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2")):
        pattern = {"Regex": words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
        made["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": pattern}, byte_level],
        }
        assert splitting(made) == name
    made["pre_tokenizer"] = {"type": "Metaspace"}
    with pytest.raises(CannotExport, match=r"BPE after \['Metaspace'\]"):
        splitting(made)


def test_a_refused_tokenizer_leaves_no_file(tmp_path, capsys, tokenizer):
    made = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").write_text(json.dumps(made | {"pre_tokenizer": {"type": "Metaspace"}}))
    save_pretrained(tiny_hybrid.model(**PAPER), tmp_path / "student", tokenizer_from=tokenizer)
    assert main([str(tmp_path / "student"), "--to", "gguf", "-o", str(tmp_path / "out.gguf")]) == 1
    assert "Metaspace" in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()
    (tmp_path / "student" / "tokenizer.json").unlink()
    assert main([str(tmp_path / "student"), "--to", "gguf", "-o", str(tmp_path / "out.gguf")]) == 1
    assert load_pretrained(tmp_path / "student").config.conv_silu
