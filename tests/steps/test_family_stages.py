"""From a teacher of another family than Llama to its student, through the stages themselves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from hybrid import load_pretrained
from stage_store import Store
from steps import config, pipeline
from tests.corpora import tiny

ROOT = Path(__file__).resolve().parents[2]
TEACHERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"pad_token_id": 2},
}
SMALL = [
    "device=cpu",
    "compute=float32",
    'corpus.natural_text=""',
    "corpus.held_out_conversations=4",
    "corpus.self_chat.conversations=0",
    "corpus.free_text.documents=0",
    "init_from_attention.rope=true",
    "align.steps=2",
    "kl_distill.steps=2",
    "sft.steps=2",
    "dpo.enabled=false",
    "benchmark.enabled=false",
    "speculative_profile.enabled=false",
]
SMALL += [f"{stage}.seq_len=48" for stage in ("align", "kl_distill", "sft")]
SMALL += [f"{stage}.batch_size=2" for stage in ("align", "kl_distill", "sft")]
SMALL += [f"{stage}.accumulation=1" for stage in ("align", "kl_distill", "sft")]


@pytest.mark.parametrize("family", TEACHERS)
def test_every_stage_takes_the_family(family, tmp_path, monkeypatch):
    shape = {"num_hidden_layers": 4, "initializer_range": 0.2, **TEACHERS[family]}
    tiny.save_llama(tmp_path / "teacher", model_type=family, **shape)
    tiny.write_jsonl(tmp_path / "talk.jsonl", [tiny.conversation(i, turns=2) for i in range(24)])
    here = [
        f"teacher.source=file:{tmp_path}/teacher",
        f'corpus.sources=["file:{tmp_path}/talk.jsonl"]',
        f"store.url={tmp_path}/store",
    ]
    settings = config.load(ROOT / "configs/smollm2_cpu.toml", [*SMALL, *here])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not the device lock that a real run may hold now
    run, refs, store = pipeline.Run("run", ROOT), {}, Store(tmp_path / "store")
    for stage, variant, _ in pipeline.walk(settings):
        if ref := pipeline.run_stage(stage.name, variant, settings, refs, run):
            refs[stage.name] = ref
    summaries = {name: store.manifest(pipeline.stored_ref(ref)).meta["summary"] for name, ref in refs.items()}
    assert summaries["teacher"]["architecture"] == family
    assert [summaries[name]["steps"] for name in ("align", "kl_distill", "sft")] == [2, 2, 2]
    student = load_pretrained(store.fetch(store.manifest(pipeline.stored_ref(refs["sft"]))))
    assert student.config.family == family and student.config.mamba_layers == (0, 2)
