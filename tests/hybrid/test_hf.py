"""The model in transformers: the same numbers, `generate` with its cache, and folders that need nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hybrid import HybridConfig, load_pretrained, save_pretrained
from hybrid.hf.configuration_hybrid_mamba_llama import HybridLlamaConfig
from hybrid.hf.modeling_hybrid_mamba_llama import HybridLlamaCache, HybridLlamaForCausalLM
from stage_store.fingerprint import code_modules
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import greedy, prompts, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FORMS = {
    "mamba2": {},
    "paper": {"conv_silu": True, "proj_bias": False, "tie_word_embeddings": False},
    "rope": {"mixer_rope": True, "ngroups": 6, "rope": LLAMA3},
    "mamba1": {"mixer": "mamba1", "d_state": 4, "conv_silu": True},
    "mamba1_groups": {"mixer": "mamba1", "d_state": 8, "ngroups": 6, "dt_rank": 5},
    "attention": {"attention_layers": (0, 1, 2, 3), "rope": {"rope_type": "linear", "rope_theta": 90.0, "factor": 3.0}},
    "mamba": {"attention_layers": ()},
    "short_convolution": {"d_conv": 2},
}


BEYOND_LLAMA = {
    "bias": {"attention_bias": True},
    "norms": {"qk_norm": True, "mixer_rope": True},
    "window": {"sliding_window": 5},
    "without_positions": {"no_rope_layers": (0, 3), "mixer_rope": True},
}
FORMS |= BEYOND_LLAMA


def saved(folder, **changes):
    model = tiny_hybrid.model(bos_token_id=1, eos_token_ids=(2, 5), pad_token_id=0, **changes)
    save_pretrained(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    return saved(tmp_path, **FORMS[request.param])


def padded(rows):
    """Left-padded tokens and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def test_logits_are_the_same(pair):
    ours, theirs = pair
    assert isinstance(theirs, HybridLlamaForCausalLM)
    ids = tokens(2, 150)  # more than two chunks
    assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "changes", "own"),
    [
        ("Qwen2", {}, {"attention_bias": True}),
        ("Qwen3", {"head_dim": 12}, {"qk_norm": True, "head_dim": 12}),
        ("Mistral", {"sliding_window": 7}, {"sliding_window": 7}),
        ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": None}, {"no_rope_layers": [2]}),
    ],
)
@torch.no_grad()
def test_attention_of_other_families_is_as_they_compute_it(theirs, changes, own):
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.25}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = getattr(transformers, f"{theirs}Config")(
        **shape, rope_parameters=rope, tie_word_embeddings=False, **changes
    )
    torch.manual_seed(0)
    teacher = getattr(transformers, f"{theirs}ForCausalLM")(config).eval()
    for name, p in teacher.named_parameters():
        if "bias" in name or "norm" in name:
            p.uniform_(0.5, 1.5)
    sizes = {"vocab_size": 97, "d_model": 48, "intermediate_size": 64, "n_layers": 4, "n_heads": 6, "n_kv_heads": 2}
    made = HybridLlamaConfig(**sizes | {"head_dim": 8, "attention_layers": range(4), "rope": rope} | own)
    ours = HybridLlamaForCausalLM(made).eval()
    ours.load_state_dict(teacher.state_dict())
    ids = tokens(2, 30)
    assert torch.allclose(ours(ids).logits, teacher(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cache_continues_as_the_whole_text_reads(pair):
    ours, theirs = pair
    ids = tokens(2, 40)
    whole = ours(ids)
    cache, seen = None, 0
    for length in (17, 1, 1, 6, 2, 13):  # a prompt, single tokens, further turns
        out = theirs(ids[:, seen : seen + length], past_key_values=cache, use_cache=True)
        cache, seen = out.past_key_values, seen + length
        assert torch.allclose(out.logits, whole[:, seen - length : seen], atol=1e-4, rtol=0)
    assert isinstance(cache, HybridLlamaCache)
    assert cache.get_seq_length() == seen == 40


@torch.no_grad()
def test_left_padding_changes_nothing(pair):
    ours, theirs = pair
    rows = prompts(3, 11, 2, 7)
    ids, mask = padded(rows)
    out = theirs(ids, attention_mask=mask, use_cache=True)
    for row, logits in zip(rows, out.logits, strict=True):
        assert torch.allclose(logits[-len(row) :], ours(torch.tensor([row]))[0], atol=1e-4, rtol=0)
    replies = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, reply in zip(rows, replies[:, ids.shape[1] :].tolist(), strict=True):
        assert reply == greedy(ours, row, 8)


@torch.no_grad()
def test_right_padding_is_read_but_never_continued(tmp_path):
    ours, theirs = saved(tmp_path)
    rows = prompts(4, 9)
    ids, mask = (t.flip(1) for t in padded([row[::-1] for row in rows]))
    logits = theirs(ids, attention_mask=mask).logits
    for row, each in zip(rows, logits, strict=True):
        assert torch.allclose(each[: len(row)], ours(torch.tensor([row]))[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        theirs(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match=r"shape \(2, 8\); expected \(batch, 9\)"):
        theirs(ids, attention_mask=mask[:, 1:])


def test_generate_stops_searches_and_refuses(tmp_path):
    ours, theirs = saved(tmp_path)
    prompt = torch.tensor(prompts(6))
    wanted = greedy(ours, prompt[0].tolist(), 12)
    stop = wanted[4]
    reply = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=stop)[0, 6:].tolist()
    assert reply == wanted[: wanted.index(stop) + 1]
    beams = [
        theirs.generate(prompt, max_new_tokens=6, num_beams=3, use_cache=use_cache, eos_token_id=None).tolist()
        for use_cache in (True, False)
    ]
    assert beams[0] == beams[1]
    sampled = theirs.generate(prompt, max_new_tokens=5, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert sampled.shape == (3, 11)
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(prompt, max_new_tokens=4, assistant_model=theirs)


def test_generation_goes_on_from_a_kept_cache(tmp_path):
    ours, theirs = saved(tmp_path)
    prompt = torch.tensor(prompts(6))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = theirs.generate(prompt, max_new_tokens=3, **options)
    asked = torch.cat([first.sequences, tokens(1, 4)], dim=1)
    second = theirs.generate(asked, max_new_tokens=3, past_key_values=first.past_key_values, **options)
    assert second.sequences[0, 13:].tolist() == greedy(ours, asked[0].tolist(), 3)


def test_labels_give_the_mean_loss_and_gradients(tmp_path):
    ours, theirs = saved(tmp_path)
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    out = theirs(ids, labels=labels)
    counted = labels[:, 1:] != -100
    wanted = torch.nn.functional.cross_entropy(ours(ids)[:, :-1][counted], ids[:, 1:][counted])
    assert torch.allclose(out.loss, wanted, rtol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in theirs.parameters())


def test_logits_to_keep_and_tuples(tmp_path):
    _, theirs = saved(tmp_path)
    ids = tokens(2, 9)
    with torch.no_grad():
        whole = theirs(ids, output_hidden_states=True)
        assert torch.allclose(theirs(ids, logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-6)
        assert torch.equal(theirs(ids, return_dict=False)[0], whole.logits)
    assert len(whole.hidden_states) == 5
    assert torch.equal(theirs.lm_head(whole.hidden_states[-1]), whole.logits)


def test_a_folder_that_transformers_wrote_loads_here(tmp_path):
    ours, theirs = saved(tmp_path / "first")
    theirs.save_pretrained(tmp_path / "second")
    again = load_pretrained(tmp_path / "second")
    assert again.config == ours.config
    assert torch.equal(again(tokens(1, 8)), ours(tokens(1, 8)))


def test_config_has_every_field_with_the_same_default():
    config = tiny_hybrid.config(eos_token_ids=(2, 5))
    raw = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    theirs = HybridLlamaConfig(**raw)
    assert {k: getattr(theirs, k) for k in raw} == json.loads(json.dumps(raw))
    needed = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "intermediate_size")
    shape = {k: raw[k] for k in (*needed, "max_position_embeddings")}
    assert HybridConfig.from_dict(HybridLlamaConfig(**shape).to_dict()) == HybridConfig(**shape)
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.eos_token_id) == (48, 4, [2, 5])
    assert HybridLlamaConfig(eos_token_id=7).eos_token_ids == [7]
    with pytest.raises(ValueError, match="mixer 'rwkv' is not supported; supported: mamba1, mamba2"):
        HybridLlamaConfig(mixer="rwkv")
    with pytest.raises(ValueError, match="gqa_mapping 'legacy' is not supported here"):
        HybridLlamaConfig(gqa_mapping="legacy")
    with pytest.raises(ValueError, match="no model by itself"):
        HybridLlamaConfig(reads_features=True)


def test_code_of_other_software_is_in_no_stages_key():
    root = Path(__file__).parents[2]
    for stage in ("sft", "benchmark"):
        reached = code_modules(f"steps.{stage}", root, ("steps", "evals", "corpora", "hybrid", "kernels_ext"))
        assert "hybrid.checkpoint" in reached
        assert not [name for name in reached if name.startswith(("hybrid.hf", "hybrid.export"))]


def test_low_precision_keeps_the_leaves_in_float32(tmp_path):
    ours, _ = saved(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = theirs.model.layers[0].mamba
    assert {p.dtype for p in (mixer.A_log, mixer.dt_bias, mixer.D)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits = theirs(tokens(2, 20)).logits.float()
    low = load_pretrained(tmp_path, dtype=torch.bfloat16)(tokens(2, 20)).float()
    assert (logits - low).abs().max() < 0.05 * low.abs().max()


ALONE = """
import sys
sys.modules["hybrid"] = sys.modules["kernels_ext"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
    reply = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1]:]
    torch.save((type(model).__module__, config.model_type, text, logits, reply.tolist()), folder + "/out.pt")
"""


def test_a_folder_is_enough(tmp_path):
    """In a process that cannot import this project."""
    source = tmp_path / "teacher"
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"},
    }
    source.mkdir()
    (source / "raw.json").write_text(json.dumps(tokenizer))
    made = PreTrainedTokenizerFast(tokenizer_file=str(source / "raw.json"), unk_token="[UNK]")
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    made.save_pretrained(source)
    ids, models = tokens(2, 70), {}
    for form in ("rope", "mamba1"):
        models[tmp_path / form] = tiny_hybrid.model(**FORMS[form])
        save_pretrained(models[tmp_path / form], tmp_path / form, tokenizer_from=source)
        torch.save(ids, tmp_path / form / "ids.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, *map(str, models)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, ours in models.items():
        module, model_type, text, logits, reply = torch.load(folder / "out.pt", weights_only=False)
        assert module.startswith("transformers_modules.") and model_type == "hybrid_mamba_llama"
        assert text == "<user>a b"
        assert torch.allclose(logits, ours(ids), atol=1e-4, rtol=0)
        assert reply == greedy(ours, ids[0].tolist(), 6)


def test_auto_classes_know_the_model_without_its_code(tmp_path):
    save_pretrained(tiny_hybrid.model(), tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HybridLlamaConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), HybridLlamaForCausalLM)


def test_registration_waits_for_transformers():
    """In a process that has imported nothing yet; where a model is imported first, the tables are loaded inside it."""
    code = (
        "import hybrid, sys; assert 'transformers' not in sys.modules\n"
        "from transformers import LlamaForCausalLM, AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('hybrid_mamba_llama', n_layers=1)\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == 'HybridLlamaForCausalLM'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tokenizer_of_a_student_loads_without_asking(tmp_path, monkeypatch):
    save_pretrained(tiny_hybrid.model(), tmp_path)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [1]
