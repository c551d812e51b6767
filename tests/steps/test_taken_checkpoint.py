"""A variant whose student is not made but taken from a folder or the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import load_pretrained
from hybrid.imports import convert
from steps import benchmark, init_from_attention, speculative_profile, teacher
from steps.config import (
    BenchmarkStageConfig,
    Config,
    ConfigError,
    EfficiencyConfig,
    InitStageConfig,
    SpeculativeStageConfig,
    TeacherConfig,
    parse,
)
from steps.pipeline import BY_NAME, payload_of
from steps.teacher import TeacherError
from tests.corpora import tiny
from tests.steps import tiny_stages

MAMBA_CONFIG = {
    "d_model": 32,
    "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8},
    "rms_norm_eps": 1e-05,
    "vocab_size": None,
    "d_inner": 32,
    "d_xb": 16,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "n_layer": 3,
    "attn_layers": [1],
}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_stages.upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def student(upstream: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student")
    make = InitStageConfig(attention=[1], method="paper")
    init_from_attention.run(make, upstream, out, tiny_stages.context(out))
    return out


def take(source: str, upstream: dict[str, Path], out: Path) -> dict[str, Any]:
    return init_from_attention.run(InitStageConfig(checkpoint=source), upstream, out, tiny_stages.context(out))


def test_the_student_is_taken_as_it_is_whatever_else_the_section_says(
    upstream: dict[str, Path], student: Path, tmp_path: Path
) -> None:
    summary = take(f"file:{student}", upstream, tmp_path)
    ours, theirs = load_pretrained(tmp_path), load_pretrained(student)
    assert ours.config == theirs.config
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert (summary["attention_layers"], summary["replaced_layers"]) == ([1], [0, 2])
    assert summary["held_out"]["kl"] > 0
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_student_of_other_tokens_is_refused(upstream: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.save_llama(tmp_path / "other", vocab_size=400)
    with pytest.raises(
        ConfigError, match="no student of this teacher: its vocabulary has 320 tokens, the student's 400"
    ):
        take(f"file:{other}", upstream, tmp_path / "out")


def test_a_published_form_is_no_transformer(student: Path, tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "released")
    (folder / "mamba_config.json").write_text("{}")
    with pytest.raises(TeacherError, match="python -m hybrid.imports FOLDER -o OUT"):
        teacher.run(TeacherConfig(source=f"file:{folder}"), {}, tmp_path / "out", tiny_stages.context(tmp_path))


def test_a_published_hybrid_is_benchmarked_and_profiled(tmp_path: Path) -> None:
    """A Mamba-2 student by the paper's method has the weights' names of MambaInLlama; the rest is in two JSON files."""
    upstream = tiny_stages.upstream(tmp_path / "upstream")
    tiny.save_llama(upstream["teacher"], num_hidden_layers=3, initializer_range=0.2, rms_norm_eps=1e-5)
    published = tmp_path / "published"
    make = InitStageConfig(attention=[1], method="paper")
    init_from_attention.run(make, upstream, published, tiny_stages.context(tmp_path))
    shutil.copy(upstream["teacher"] / "config.json", published)
    (published / "mamba_config.json").write_text(json.dumps(MAMBA_CONFIG))
    convert(published, tmp_path / "imported")

    taken, measured, profiled = (tmp_path / name for name in ("taken", "measured", "profiled"))
    for folder in (taken, measured, profiled):
        folder.mkdir()
    take(f"file:{tmp_path / 'imported'}", upstream, taken)
    inputs = {"corpus": upstream["corpus"], "student": taken}
    settings = BenchmarkStageConfig(
        held_out_conversations=2,
        seq_len=96,
        natural_tokens=0,
        samples=0,
        train_length=32,
        efficiency=EfficiencyConfig(batches=[]),
    )
    alone = {"teacher": upstream["teacher"], "corpus": upstream["corpus"]}
    rows = tmp_path / "rows"
    rows.mkdir()
    benchmark.run(settings, alone, rows, tiny_stages.context(tmp_path))
    scored = {**inputs, "teacher": upstream["teacher"], "teacher_rows": rows}
    benchmark.run(settings, scored, measured, tiny_stages.context(tmp_path))
    assert json.loads((measured / "summary.json").read_text())["fidelity"]
    speculation = SpeculativeStageConfig(max_k=2, prompts=2, new_tokens=6)
    assert speculative_profile.run(speculation, inputs, profiled, tiny_stages.context(tmp_path))["identical"]


def configured(taken: str, more: str = "") -> Config:
    raw: dict[str, Any] = {
        "teacher": {"source": "file:teacher"},
        "corpus": {"self_chat": {"conversations": 8}},
        "variants": {"taken": {"checkpoint": taken}, "made": {}} | ({"later": {"from": more}} if more else {}),
    }
    return parse(raw)


def test_what_is_taken_is_in_the_stage_s_key(student: Path, tmp_path: Path) -> None:
    refs = {name: {"key": name} for name in ("teacher", "corpus", "layer_scores")}
    config = configured(f"file:{student}")
    taken, made = (
        payload_of(BY_NAME["init_from_attention"], name, config, refs, Path(__file__).parents[2])
        for name in ("taken", "made")
    )
    assert taken["data"].keys() == {f"file:{student}"} and not made["data"]
    assert taken["upstream"].keys() == {"teacher", "corpus"}, "its layers are no matter of a ranking"
    assert made["upstream"].keys() == {"teacher", "corpus", "layer_scores"}


def test_a_variant_may_continue_from_one_that_was_taken() -> None:
    """Which layers that one keeps is known when it is there."""
    config = configured("file:student", more="taken")
    assert config.chain("later") == ["taken", "later"]
    wrong = config.model_dump(mode="json")
    wrong["variants"]["later"]["checkpoint"] = "file:student"
    with pytest.raises(ConfigError, match="continues from 'taken' and takes the checkpoint 'file:student': leave"):
        parse(wrong)
