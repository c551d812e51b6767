from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid import UnsupportedModel, checkpoint, load_pretrained, save_pretrained
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_hybrid.model(), tmp_path / "student")
    return tmp_path / "student"


def change(folder, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_comes_back_as_it_was(tmp_path, tied):
    model = tiny_hybrid.model(tie_word_embeddings=tied, eos_token_ids=(2, 5))
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    for (name, ours), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_mixed_types_stay_and_leaves_stay_float32(tmp_path):
    model = tiny_hybrid.model()
    for name, p in model.named_parameters():
        if ".mamba." not in name:
            p.data = p.data.bfloat16()
    save_pretrained(model, tmp_path)

    def types(loaded):
        return {name: p.dtype for name, p in loaded.named_parameters()}

    assert types(load_pretrained(tmp_path)) == types(model)
    low = types(load_pretrained(tmp_path, dtype=torch.bfloat16))
    leaves = {name for name in low if name.endswith((".A_log", ".dt_bias", ".D"))}
    assert len(leaves) == 6
    assert all((dtype == torch.float32) == (name in leaves) for name, dtype in low.items())
    assert set(types(load_pretrained(tmp_path, dtype=torch.float32)).values()) == {torch.float32}


def test_a_file_of_low_leaves_is_raised_to_float32(folder):
    change(folder, lambda w: w.update({n: t.bfloat16() for n, t in w.items()}))
    mixer = load_pretrained(folder).model.layers[0].mamba
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_bias)} == {torch.float32}


def test_several_shards_and_a_superfluous_tied_head(folder):
    weights = load_file(folder / "model.safetensors")
    wanted = load_pretrained(folder)(tokens(1, 5))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    rest = {n: weights[n] for n in names[1::2]} | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    assert torch.equal(load_pretrained(folder)(tokens(1, 5)), wanted)


def test_tokenizer_files_travel(tmp_path):
    source = tmp_path / "teacher"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("hi")
    (source / "other.bin").write_text("no")
    save_pretrained(tiny_hybrid.model(), tmp_path / "out", tokenizer_from=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = {"configuration_hybrid_mamba_llama.py", "modeling_hybrid_mamba_llama.py"}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} | code


def test_large_models_are_cut_into_files_that_an_index_names(tmp_path):
    model = tiny_hybrid.model()
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    checkpoint.save_weights(tmp_path, model.named_parameters(), limit=40_000)
    checkpoint.write_config(tmp_path, model.config, torch.float32)
    again = load_pretrained(tmp_path)
    assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    held = {name: {n for n, file in index["weight_map"].items() if file == name} for name in files}
    assert set().union(*held.values()) == sizes.keys()
    for name, inside in held.items():
        assert set(load_file(tmp_path / name)) == inside
        assert sum(sizes[n] for n in inside) <= 40_000 or len(inside) == 1


@pytest.mark.parametrize("mixers", ["float32", "bfloat16"])
def test_transformers_is_told_the_widest_type(tmp_path, mixers):
    model = tiny_hybrid.model()
    for name, p in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")):
            p.data = p.data.to(getattr(torch, mixers) if ".mamba." in name else torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == mixers


def test_missing_and_surplus_weights(folder):
    change(folder, lambda w: w.pop("model.layers.2.mamba.D"))
    with pytest.raises(ValueError, match=r"missing \['model.layers.2.mamba.D'\]"):
        load_pretrained(folder)
    change(folder, lambda w: w.update({"model.layers.2.mamba.D": torch.ones(6), "model.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"missing \[\], not expected \['model.extra'\]"):
        load_pretrained(folder)


def test_weights_of_another_shape(folder):
    change(folder, lambda w: w.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(ValueError, match=r"model.norm.weight \(47,\) instead of \(48,\)"):
        load_pretrained(folder)


def test_folders_that_are_no_model(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path / "nothing")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    with pytest.raises(UnsupportedModel, match="'gemma2'"):
        load_pretrained(folder)
