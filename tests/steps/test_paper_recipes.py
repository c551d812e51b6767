"""The paper's recipes from teacher to last student on tiny random teachers of the same architectures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import HybridForCausalLM, load_pretrained
from hybrid.init_map import in_proj_rows
from stage_store import Store
from steps import config, pipeline
from steps.config import Config
from tests.corpora import tiny
from tests.steps import tiny_stages

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "paper"
LLAMA3 = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.2}
SCALED = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "zephyr_7b": LLAMA3 | {"model_type": "mistral", "sliding_window": 20, "tie_word_embeddings": False},
    "llama3_8b": LLAMA3
    | {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "llama3.1_8b": LLAMA3 | {"tie_word_embeddings": False, "rope_parameters": SCALED},
    "llama3.2_3b": LLAMA3
    | {"hidden_size": 48, "num_attention_heads": 6, "rope_parameters": {**SCALED, "factor": 32.0}},
}
SMALL = [
    "device=cpu",
    "compute=float32",
    'corpus.natural_text=""',
    "corpus.held_out_conversations=4",
    "kl_distill.steps=2",
    "sft.steps=2",
    "dpo.steps=2",
    "dpo.pairs=4",
    "benchmark.enabled=false",
    "speculative_profile.enabled=false",
]
SMALL += ["init_from_attention.d_state=2"]  # of Mamba-1, in heads of four channels
SMALL += [f"{stage}.seq_len=48" for stage in ("kl_distill", "sft")]
SMALL += [f"{stage}.batch_size=2" for stage in ("kl_distill", "sft", "dpo")]
SMALL += [f"{stage}.accumulation=1" for stage in ("kl_distill", "sft", "dpo")]


@dataclass
class Finished:
    """A recipe that was run: its configuration, and for every variant the folders of its stages and their summaries."""

    config: Config
    folders: dict[str, dict[str, Path]]
    summaries: dict[str, dict[str, dict[str, Any]]]
    keys: dict[str, dict[str, str]]
    upstream: dict[str, dict[str, Mapping[str, str]]]

    def student(self, variant: str, stage: str) -> HybridForCausalLM:
        return load_pretrained(self.folders[variant][stage])

    def weights(self, variant: str, stage: str) -> dict[str, torch.Tensor]:
        return dict(self.student(variant, stage).named_parameters())


def layer_of(weight: str) -> int:
    return int(weight.split(".")[2])


@pytest.fixture(scope="module", params=list(TEACHERS))
def finished(request, tmp_path_factory) -> Finished:
    root = tmp_path_factory.mktemp(request.param)
    tiny.save_llama(root / "teacher", **TEACHERS[request.param])
    tiny.write_jsonl(root / "talk.jsonl", [tiny.conversation(i, turns=2) for i in range(24)])
    tiny.write_jsonl(root / "pairs.jsonl", [tiny_stages.preference(i) for i in range(4)])
    here = [
        f"teacher.source=file:{root}/teacher",
        f'corpus.sources=["file:{root}/talk.jsonl"]',
        f"corpus.preferences=file:{root}/pairs.jsonl",
        f"store.url={root}/store",
    ]
    if config.load(RECIPES / f"{request.param}.toml").kl_distill.teacher:
        tiny.save_llama(root / "larger", **TEACHERS[request.param] | {"num_hidden_layers": 9, "intermediate_size": 64})
        here.append(f"kl_distill.teacher=file:{root}/larger")
    settings = config.load(RECIPES / f"{request.param}.toml", [*SMALL, *here])
    done = Finished(settings, {}, {}, {}, {})
    refs: dict[str, dict[str, Any]] = {variant: {} for variant in ("", *settings.variants)}
    store = Store(root / "store")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(root))  # not the device lock that a real run may hold now
        run = pipeline.Run("run", Path(__file__).resolve().parents[2])
        for stage, variant, _ in pipeline.walk(settings):
            if ref := pipeline.run_stage(stage.name, variant, settings, {**refs[""], **refs[variant]}, run):
                refs[variant][stage.name] = ref
    for variant, of_variant in refs.items():
        manifests = {stage: store.manifest(pipeline.stored_ref(ref)) for stage, ref in of_variant.items()}
        done.folders[variant] = {stage: store.fetch(manifest) for stage, manifest in manifests.items()}
        done.summaries[variant] = {stage: manifest.meta["summary"] for stage, manifest in manifests.items()}
        done.keys[variant] = {stage: manifest.key for stage, manifest in manifests.items()}
        done.upstream[variant] = {stage: manifest.payload["upstream"] for stage, manifest in manifests.items()}
    return done


def test_every_ratio_of_the_paper_is_made_by_the_stages_of_its_recipe(finished):
    stages = {variant: list(summaries) for variant, summaries in finished.summaries.items() if variant}
    kept = {
        v: of_variant["init_from_attention"]["attention_layers"] for v, of_variant in finished.summaries.items() if v
    }
    ratios = {"half": [1, 3, 5, 7], "quarter": [3, 7], "eighth": [7], "none": []}
    assert {v: kept[v] for v in ratios} == ratios
    if "three_quarters" in stages:
        assert kept["three_quarters"] == kept["three_quarters_text"] == [1, 2, 3, 5, 6, 7]
        assert stages["three_quarters"] == stages["half_text"] == ["init_from_attention", "kl_distill"]
        assert stages["half"] == ["init_from_attention", "kl_distill", "sft", "dpo"]
        assert stages["none"] == ["init_from_attention", "sft", "dpo"]
    else:
        assert set(map(tuple, stages.values())) == {("init_from_attention", "kl_distill", "dpo")}


def test_every_stage_trains(finished):
    for variant, of_variant in finished.summaries.items():
        for stage, summary in of_variant.items():
            if stage in ("kl_distill", "sft", "dpo"):
                assert summary["steps"] == 2, (variant, stage)
                json.dumps(summary, allow_nan=False)
    larger = finished.config.kl_distill.teacher
    assert finished.summaries["half"]["kl_distill"].get("teacher", {}).get("source", "") == larger


def test_a_ratio_starts_from_the_student_before_it_with_all_of_its_weights(finished):
    """Embeddings, norms and head among them: the released code sets these back to the teacher's."""
    teacher = dict(load_pretrained(finished.folders[""]["teacher"]).named_parameters())
    chained = [name for name, variant in finished.config.variants.items() if variant.previous]
    assert len(chained) >= 3
    for name in chained:
        variant = finished.config.variants[name]
        source = variant.from_stage
        assert finished.upstream[name]["init_from_attention"]["previous"] == finished.keys[variant.previous][source]
        before, after = finished.weights(variant.previous, source), finished.weights(name, "init_from_attention")
        summary = finished.summaries[name]["init_from_attention"]
        new = set(summary["replaced_layers"]) - set(summary["carried_over"])
        assert {layer_of(weight) for weight in after.keys() - before.keys()} == new
        for weight in after.keys() & before.keys():
            assert torch.equal(before[weight], after[weight]), (name, weight)
        for part in ("model.embed_tokens.weight", "model.norm.weight"):
            as_the_teacher = torch.equal(after[part], teacher[part].float())
            assert as_the_teacher == (name == "half"), (name, part)  # only mixers were trained before it


def test_new_mixers_are_made_of_the_attention_as_it_was_trained(finished):
    variant = finished.config.variants["quarter"]
    before = finished.student("half", variant.from_stage)
    student = finished.student("quarter", "init_from_attention")
    teacher = load_pretrained(finished.folders[""]["teacher"])
    rows = in_proj_rows(student.config)
    for layer in (1, 5):
        mixer, attention = student.blocks[layer].mamba, before.blocks[layer].self_attn
        for source, target in (("q_proj", "C"), ("k_proj", "B"), ("v_proj", "x")):
            assert torch.equal(mixer.in_proj.weight[rows[target]], getattr(attention, source).weight)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
        assert not torch.equal(mixer.out_proj.weight, teacher.blocks[layer].self_attn.o_proj.weight.float())


@pytest.mark.parametrize("finished", ["zephyr_7b", "llama3_8b"], indirect=True)
def test_what_the_code_freezes_and_what_the_text_does(finished):
    for variant in ("three_quarters", "half", "three_quarters_text", "half_text"):
        before, after = (finished.weights(variant, stage) for stage in ("init_from_attention", "kl_distill"))
        for name in after:
            frozen = ".mlp." in name if variant.endswith("text") else ".mamba." not in name
            assert torch.equal(before[name], after[name]) == frozen, (variant, name)
