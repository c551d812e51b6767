import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corpora.shards import Shard
from evals import items
from evals.head import EvaluationError
from hybrid import save_pretrained
from steps import benchmark
from steps.config import BenchmarkConfig
from steps.stage import Progress, StageContext

sys.path.insert(0, str(Path(__file__).parents[1] / "evals"))
from tiny_models import BYTE_VOCAB, byte_tokenizer, tiny

CONVERSATIONS = [
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because it rains a lot here.")],
    [
        ("user", "What is 2 and 2?"),
        ("assistant", "It is four, I think."),
        ("user", "Sure?"),
        ("assistant", "Yes, quite."),
    ],
    [("user", "Name a colour that you like."), ("assistant", "Green, as the leaves are in May.")],
    [("user", "What is 2 and 2?"), ("assistant", "Four, and the sum is even.")],
]
CONFIG = BenchmarkConfig(
    held_out_conversations=4,
    seq_len=96,
    skip_positions=8,
    natural_tokens=200,
    tasks=["mmlu_dev", "hellaswag_100"],
    items_per_task=5,
    batch_size=3,
    decode_batches=[1, 3],
    decode_tokens=4,
    samples=3,
    sample_tokens=6,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Upstream folders: a teacher, a student with one Mamba layer, a corpus."""
    root = tmp_path_factory.mktemp("upstream")
    tokenizer = byte_tokenizer()
    for name, seed, attention in (("teacher", 0, (0, 1)), ("student", 1, (1,))):
        save_pretrained(tiny(seed, attention, BYTE_VOCAB), root / name)
        tokenizer.save_pretrained(root / name)
    (root / "corpus").mkdir()
    documents, masks = zip(*(_tokenize(tokenizer, c) for c in CONVERSATIONS), strict=True)
    Shard.of(documents, [f"c{i}" for i in range(4)], masks).save(root / "corpus" / "held_out.npz")
    texts = [np.array(tokenizer(t * 4)["input_ids"], np.uint32) for t in ("The sea is wide. ", "It rained all week; ")]
    Shard.of(texts, ["sea", "rain"]).save(root / "corpus" / "natural.npz")
    own = [np.array(tokenizer(t * 3)["input_ids"], np.uint32) for t in ("The hills are green. ", "A mill stood here; ")]
    Shard.of(own, ["hills", "mill"]).save(root / "corpus" / "held_out_text.npz")
    return {name: root / name for name in ("teacher", "student", "corpus")}


def _tokenize(tokenizer, conversation) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = [], []
    for role, content in conversation:
        for text, is_reply in (
            (f"<|im_start|>{role}\n", False),
            (f"{content}<|im_end|>", role == "assistant"),
            ("\n", False),
        ):
            ids = tokenizer(text)["input_ids"]
            tokens += ids
            mask += [is_reply] * len(ids)
    return np.array(tokens, np.uint32), np.array(mask)


def _run(inputs: dict[str, Path], out: Path, config: BenchmarkConfig = CONFIG) -> tuple[dict, list[Progress]]:
    out.mkdir()
    seen: list[Progress] = []
    context = StageContext("cpu", "float32", seed=3, scratch=out, progress=seen.append)
    return benchmark.run(config, inputs, out, context), seen


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    made = [items.Item(f"h{i}", f"h{i}", f"Item {i}: they", ("go", "stop now", "x" * (i + 1)), i % 3) for i in range(7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(items.LOADERS, "hellaswag_100", lambda: made)
        base = {"teacher": folders["teacher"], "corpus": folders["corpus"]}
        _, progress = _run(base, root / "teacher")
        _run(base | {"student": folders["student"], "teacher_rows": root / "teacher"}, root / "student")
    return root, progress


def test_teacher_is_measured_alone(results):
    root, progress = results
    out = root / "teacher"
    assert sorted(p.name for p in out.iterdir()) == ["rows.parquet", "samples.jsonl", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["model", "fidelity", "tasks", "decode", "state_bytes", "device"]
    assert summary["model"] == "teacher"
    assert set(summary["fidelity"]["held_out"]) == {"ppl", "tokens", "documents"}
    assert summary["tasks"]["mmlu_dev"]["n"] == summary["tasks"]["hellaswag_100"]["n"] == 5
    assert summary["tasks"]["mmlu_dev"]["chance"] == 0.25
    assert [d["batch"] for d in summary["decode"]] == [1, 3]
    assert all(d["tokens_per_second"] > 0 and d["new_tokens"] == 4 for d in summary["decode"])
    assert [s["context"] for s in summary["state_bytes"]] == [512, 2048, 8192, 32768]
    assert summary["device"]
    assert [(p.done, p.total) for p in progress] == [(i, 8) for i in range(1, 9)]


def test_student_has_divergence_and_a_paired_comparison(results):
    root, _ = results
    teacher, student = (json.loads((root / name / "summary.json").read_text()) for name in ("teacher", "student"))
    assert list(student["fidelity"]) == list(teacher["fidelity"]) == ["held_out", "held_out_text", "natural"]
    for text in student["fidelity"]:
        found = student["fidelity"][text]
        assert set(found) == {
            "kl_mean", "kl_p50", "kl_p90", "kl_p99", "kl_se", "top1", "ppl", "ppl_ratio", "tokens", "documents",
        }  # fmt: skip
        assert found["tokens"] == teacher["fidelity"][text]["tokens"]
        assert found["ppl_ratio"] == pytest.approx(found["ppl"] / teacher["fidelity"][text]["ppl"], rel=1e-5)
    assert student["state_bytes"][0]["ssm"] > 0 == teacher["state_bytes"][0]["ssm"]

    comparison = json.loads((root / "student" / "comparison.json").read_text())
    assert [(c["benchmark"], c["metric"]) for c in comparison] == [
        ("held_out", "nll"), ("held_out_text", "nll"), ("natural", "nll"),
        ("hellaswag_100", "acc_norm"), ("mmlu_dev", "acc"),
    ]  # fmt: skip
    held_out = comparison[0]
    assert not held_out["higher_is_better"]
    assert held_out["teacher"] == pytest.approx(np.log(teacher["fidelity"]["held_out"]["ppl"]))
    assert held_out["difference"] == pytest.approx(np.log(student["fidelity"]["held_out"]["ppl_ratio"]), abs=1e-6)
    assert all(c["p"] <= c["p_holm"] <= 1 and c["delta"] == 0.02 for c in comparison)


def test_rows_of_teacher_and_student_pair_item_by_item(results):
    root, _ = results
    teacher, student = (pd.read_parquet(root / name / "rows.parquet") for name in ("teacher", "student"))
    keys = ["benchmark", "item", "item_hash", "prompt_hash", "cluster", "metric", "n"]
    shared = student[~student.metric.isin(["kl", "top1"])]
    assert teacher[keys].equals(shared[keys].reset_index(drop=True))
    assert set(teacher.model) == {"teacher"}
    assert set(student.model) == {"student"}


def test_samples_are_the_same_users_words_for_both(results):
    root, _ = results
    teacher, student = (
        [json.loads(line) for line in (root / name / "samples.jsonl").read_text().splitlines()]
        for name in ("teacher", "student")
    )
    assert [s["prompt"] for s in teacher] == [s["prompt"] for s in student]
    # A system prompt that the template does not add by itself is shown as the model got it.
    assert teacher[0]["prompt"].startswith("<|im_start|>system\nBe brief.")
    assert [s["prompt"] for s in teacher[1:]] == ["What is 2 and 2?", "Name a colour that you like."]
    assert [s["response"] for s in teacher] != [s["response"] for s in student]


def test_a_corpus_without_plain_text_is_measured_on_its_conversations(folders, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "held_out.npz").write_bytes((folders["corpus"] / "held_out.npz").read_bytes())
    config = CONFIG.model_copy(update={"tasks": [], "decode_batches": [], "samples": 0})
    summary, _ = _run({"teacher": folders["teacher"], "corpus": tmp_path / "corpus"}, tmp_path / "out", config)
    assert list(summary["fidelity"]) == ["held_out"]


def test_only_what_is_asked_for_is_measured(folders, tmp_path):
    config = CONFIG.model_copy(update={"tasks": [], "natural_tokens": 0, "decode_batches": [], "samples": 0})
    inputs = {"teacher": folders["teacher"], "corpus": folders["corpus"]}
    summary, _ = _run(inputs, tmp_path / "out", config)
    assert summary["tasks"] == {}
    assert summary["decode"] == []
    assert list(summary["fidelity"]) == ["held_out"]
    assert (tmp_path / "out" / "samples.jsonl").read_text() == ""
    assert set(pd.read_parquet(tmp_path / "out" / "rows.parquet").benchmark) == {"held_out"}


def test_teacher_rows_of_other_items_are_refused(folders, results, tmp_path):
    root, _ = results
    inputs = {**folders, "teacher_rows": root / "teacher"}
    config = CONFIG.model_copy(update={"skip_positions": 9, "tasks": [], "decode_batches": [], "samples": 0})
    with pytest.raises(ValueError, match="held_out/nll: item_hash differs"):
        _run(inputs, tmp_path / "out", config)


def test_prompts_need_a_reply_to_end_at(tmp_path):
    document = np.arange(5, 25, dtype=np.uint32)
    late = np.arange(20) >= 15
    Shard.of([document, document + 1], ["a", "b"], [late, np.zeros(20, bool)]).save(tmp_path / "s.npz")
    assert benchmark.first_turns(tmp_path / "s.npz", 15) == [list(range(5, 20))]
    with pytest.raises(EvaluationError, match="no conversation has a reply that begins within 14 tokens"):
        benchmark.first_turns(tmp_path / "s.npz", 14)


def test_a_broken_student_stops_the_stage(folders, tmp_path):
    broken = tiny(1, (1,), BYTE_VOCAB)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    save_pretrained(broken, tmp_path / "student", folders["teacher"])
    with pytest.raises(EvaluationError, match="not finite"):
        _run({**folders, "student": tmp_path / "student"}, tmp_path / "out")
