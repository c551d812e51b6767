"""Mamba-1 mixers from teacher to report, through the stages themselves, on a Llama of four small layers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import HybridForCausalLM, load_pretrained
from stage_store import Store
from steps import config, init_from_attention, lineage, pipeline, report
from steps.config import ConfigError, InitStageConfig
from tests.corpora import tiny
from tests.steps import tiny_stages

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
device = "cpu"
compute = "float32"

[teacher]
source = "file:{here}/teacher"

[corpus]
sources = ["file:{here}/talk.jsonl"]
held_out_conversations = 6

[layer_scores]
method = "restore"
sequences = 4

[variants.half]
attention = [1, 3]

[variants.legacy]
attention = [1, 3]
[variants.legacy.set]
"init_from_attention.gqa_mapping" = "legacy"
"init_from_attention.method" = "paper"
"align.enabled" = false

[variants.none]
attention = "0"
from = "half"
[variants.none.set]
"sft.enabled" = false
"dpo.enabled" = false

[init_from_attention]
mixer = "mamba1"
d_state = 4
tokens = 512
batch_size = 4
seq_len = 32

[align]
steps = 12
seq_len = 32
mixer_lr = 3e-3

[kl_distill]
steps = 12
seq_len = 32
mixer_lr = 3e-3
rest_lr = 1e-3

[sft]
steps = 2
seq_len = 32

[dpo]
steps = 2
batch_size = 2
pairs = 4
max_reply_tokens = 6

[benchmark]
held_out_conversations = 4
seq_len = 64
skip_positions = 4
samples = 1
sample_tokens = 6

[benchmark.efficiency]
batches = [1]
tokens = 4
repeats = 2

[draft]
kind = "layers:[0, 3]"
conversations = 8
max_tokens = 8
steps = 3
seq_len = 32

[speculative_profile]
max_k = 2
prompts = 2
new_tokens = 8
"""


@dataclass
class Finished:
    """By variant and stage: the stages' folders, and their summaries; and the report's folder."""

    folders: dict[str, dict[str, Path]]
    summaries: dict[str, dict[str, dict[str, Any]]]
    report: Path

    def student(self, variant: str, stage: str) -> HybridForCausalLM:
        return load_pretrained(self.folders[variant][stage])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    here = tmp_path_factory.mktemp("mamba1")
    tiny.save_llama(here / "teacher", num_hidden_layers=4, initializer_range=0.2)
    tiny.write_jsonl(here / "talk.jsonl", [tiny.conversation(i, turns=2) for i in range(24)])
    settings = config.parse_text(CONFIG.format(here=here) + f'\n[store]\nurl = "{here}/store"\n')
    refs: dict[str, dict[str, Any]] = {variant: {} for variant in ("", *settings.variants)}
    store = Store(here / "store")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(here))  # not the device lock that a real run may hold now
        run = pipeline.Run("run", ROOT)
        for stage, variant, _ in pipeline.walk(settings):
            if ref := pipeline.run_stage(stage.name, variant, settings, {**refs[""], **refs[variant]}, run):
                refs[variant][stage.name] = ref
        told = lineage.lineage(settings, refs, run, store)
    manifests = {
        variant: {stage: store.manifest(pipeline.stored_ref(ref)) for stage, ref in of_variant.items()}
        for variant, of_variant in refs.items()
    }
    folders = {v: {stage: store.fetch(m) for stage, m in of.items()} for v, of in manifests.items()}
    inputs = {"lineage": here / "lineage.json", "benchmark_teacher": folders[""]["benchmark_teacher"]}
    inputs["lineage"].write_text(json.dumps(told))
    for variant in settings.variants:
        inputs |= {f"{variant}.{name}": folders[variant][name] for name in ("benchmark", "speculative_profile")}
    (here / "report").mkdir()
    report.run(settings.report, inputs, here / "report", None)
    summaries = {v: {stage: m.meta["summary"] for stage, m in of.items()} for v, of in manifests.items()}
    return Finished(folders, summaries, here / "report")


def test_students_have_mamba1_mixers(finished):
    forms = {v: finished.student(v, "kl_distill").config for v in ("half", "legacy", "none")}
    assert {c.mixer for c in forms.values()} == {"mamba1"} and {c.d_state for c in forms.values()} == {4}
    assert [forms[v].gqa_mapping for v in forms] == ["heads", "legacy", "heads"]
    assert [forms[v].mamba_layers for v in forms] == [(0, 2), (0, 2), (0, 1, 2, 3)]
    for variant in forms:
        assert finished.summaries[variant]["init_from_attention"]["mixer"] == "mamba1"


def test_every_start_is_measured_and_the_closed_form_is_nearest(finished):
    summary = finished.summaries["half"]["init_from_attention"]
    start = {name: found["kl"] for name, found in summary["start"].items()}
    assert set(start) == {"copy", "calibrated", "paper"}
    assert start["calibrated"] < min(start["copy"], start["paper"])
    assert [row["layer"] for row in summary["layers"]] == [0, 2]
    assert all(0 < row["relative_error"] < 1 for row in summary["layers"])
    legacy = finished.summaries["legacy"]["init_from_attention"]["start"]
    assert legacy["paper"]["kl"] == start["paper"], "the published form is that of the released code"


def test_training_brings_the_student_nearer(finished):
    kl = {stage: s["held_out"]["kl"] for stage, s in finished.summaries["half"].items() if "held_out" in s}
    assert kl["kl_distill"] < kl["init_from_attention"]
    assert kl["align"] < finished.summaries["half"]["init_from_attention"]["start"]["paper"]["kl"]


@pytest.mark.parametrize("stage", ["align", "kl_distill", "sft", "dpo"])
def test_every_stage_trains_all_that_is_new(finished, stage):
    stages = list(finished.summaries["half"])
    before, after = (
        dict(finished.student("half", name).named_parameters()) for name in (stages[stages.index(stage) - 1], stage)
    )
    for name in ("in_proj.weight", "dt_proj.weight", "dt_bias", "A_log", "D", "conv1d.weight", "out_proj.weight"):
        weight = f"model.layers.2.mamba.{name}"
        assert after[weight].dtype == torch.float32 and not torch.equal(before[weight], after[weight]), weight


def test_a_ratio_continues_with_the_mixers_before_it(finished):
    before = dict(finished.student("half", "kl_distill").named_parameters())
    after = dict(finished.student("none", "init_from_attention").named_parameters())
    for name in after.keys() & before.keys():
        assert torch.equal(before[name], after[name]), name
    assert {name.split(".mamba")[0] for name in after.keys() - before.keys()} == {"model.layers.1", "model.layers.3"}


def test_speculation_is_lossless(finished):
    for variant in ("half", "legacy", "none"):
        profile = json.loads((finished.folders[variant]["speculative_profile"] / "profile.json").read_text())
        assert {group["draft"] for group in profile["groups"]} == {"layers:[0, 3]", "ngram"}
        assert all(row["identical_to_greedy"] for group in profile["groups"] for row in group["rows"])


def test_the_report_tells_of_them(finished):
    twin = json.loads((finished.report / "report.json").read_text())
    assert [v["name"] for v in twin["variants"]] == ["half", "legacy", "none"]
    page = (finished.report / "report.html").read_text()
    assert "filled = Mamba-1" in page and "filled = Mamba-2" not in page
    assert all(v["benchmark"] for v in twin["variants"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"mixer": "mamba1", "rope": True}, 'rope belongs to mixer "mamba2", mixer is "mamba1": leave rope out'),
        ({"gqa_mapping": "legacy"}, 'gqa_mapping "legacy" belongs to mixer "mamba1" .*, mixer is "mamba2"'),
        (
            {"mixer": "mamba1", "gqa_mapping": "legacy", "ngroups": "heads"},
            'mixer is "mamba1" and ngroups "heads": leave gqa_mapping out or set these two',
        ),
        ({"mixer": "mamba3"}, "init_from_attention.mixer: given 'mamba3'; input should be 'mamba2' or 'mamba1'"),
        ({"mixer": "mamba1", "d_state": 0}, "init_from_attention.d_state: given 0; input should be greater than"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(section, said):
    raw = {
        "teacher": {"source": "file:x"},
        "corpus": {"sources": ["file:y"]},
        "variants": {"half": {}},
        "init_from_attention": section,
    }
    with pytest.raises(ConfigError, match=said):
        config.parse(raw)


def test_the_number_of_states_is_checked_against_the_teacher(finished, tmp_path):
    given = InitStageConfig(mixer="mamba1", d_state=3, attention=[1])
    inputs = {role: finished.folders[""][role] for role in ("teacher", "corpus")}
    with pytest.raises(ConfigError, match="d_state 3 does not divide head_dim 8"):
        init_from_attention.run(given, inputs, tmp_path, tiny_stages.context(tmp_path))
