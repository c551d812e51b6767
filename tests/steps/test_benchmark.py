"""The benchmark stage on tiny models: what it leaves, what it does about benchmarks that fail, and how it goes on."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corpora.shards import Shard
from evals import efficiency, fidelity, judge, layers, length, lm_eval_adapter, needle
from evals.benchmark import Found
from evals.head import EvaluationError
from evals.judge import data as judge_data
from hybrid import save_pretrained
from steps import benchmark, report
from steps.config import BenchmarkStageConfig, ReportConfig
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
MEASURED = ("fidelity", "layers", "mmlu_dev", "length", "needle", "efficiency", "judge", "samples")
MODULES = {
    "fidelity": fidelity, "layers": layers, "length": length, "needle": needle, "efficiency": efficiency, "judge": judge
}  # fmt: skip


def config(**changes) -> BenchmarkStageConfig:
    """Everything on, and small."""
    return BenchmarkStageConfig.model_validate(
        {
            "held_out_conversations": 4,
            "seq_len": 96,
            "skip_positions": 8,
            "natural_tokens": 200,
            "layer_conversations": 2,
            "tasks": ["mmlu_dev"],
            "items_per_task": 5,
            "batch_size": 3,
            "train_length": 32,
            "length": {"documents": 2, "multiple": 4, "last_tokens": 16, "last_documents": 2},
            "needle": {"lengths": [500], "depths": [0.0, 1.0], "seeds": 2, "haystack": "words", "answer_tokens": 8},
            "efficiency": {"batches": [1, 2], "contexts": [8], "tokens": 3, "repeats": 2},
            "judge": {"backend": "fake", "modes": ["mt_bench", "pairwise"], "answer_tokens": 4},
            "samples": 3,
            "sample_tokens": 6,
        }
        | changes
    )


ONLY_FIDELITY = {
    "tasks": [],
    "natural_tokens": 0,
    "layer_conversations": 0,
    "length": {},
    "needle": {},
    "efficiency": {"batches": []},
    "judge": {"backend": "none"},
    "samples": 0,
}


class Work:
    """Checkpoints of which a benchmark needs the folder alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    def work(self) -> Path:
        self.folder.mkdir(exist_ok=True)
        return self.folder


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
    texts = [np.array(tokenizer(t * 9)["input_ids"], np.uint32) for t in ("The sea is wide. ", "It rained all week; ")]
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


def _run(
    inputs, out: Path, stage_config=None, work: Path | None = None, device: str = "cpu"
) -> tuple[dict, list[Progress]]:
    out.mkdir()
    scratch = out.with_name(f"{out.name}-scratch")
    scratch.mkdir()
    seen: list[Progress] = []
    checkpoints = Work(work) if work else None
    context = StageContext(device, "float32", 3, scratch, checkpoints, seen.append)
    return benchmark.run(stage_config or config(), inputs, out, context), seen


def _teacher(folders) -> dict[str, Path]:
    return {"teacher": folders["teacher"], "corpus": folders["corpus"]}


def _record(name: str, item: str = "a", **changes) -> dict:
    return {
        "benchmark": name, "item": item, "item_hash": "h", "prompt_hash": "p", "cluster": item, "metric": "m",
        "score": 1.0, "n": 1, "response": "",
    } | changes  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch) -> list[str]:
    """Every benchmark finds two rows at once; the list says which were asked."""
    asked: list[str] = []

    def stand_in(name):
        def measure(subject, *_):
            asked.append(name)
            subject.progress(0.5, "half of it")
            return Found([_record(name), _record(name, "b")], {"of": name})

        return measure

    for name, module in MODULES.items():
        monkeypatch.setattr(module, "measure", stand_in(name))
    monkeypatch.setattr(lm_eval_adapter, "measure_task", lambda s, task, _: stand_in(task)(s))
    return asked


def _fails(monkeypatch, name: str, error: BaseException) -> None:
    def measure(*_):
        raise error

    monkeypatch.setattr(MODULES[name], "measure", measure)


def test_benchmarks_that_run_the_teacher_come_first(folders, stand_ins, tmp_path):
    summary, _ = _run(folders, tmp_path / "out")
    assert tuple(stand_ins) == MEASURED[:-1]
    assert list(summary) == ["model", "device", "failed", "fidelity", "tasks", "layers", "length", "needle",
                             "efficiency", "judge"]  # fmt: skip
    assert summary["tasks"] == {"mmlu_dev": {"of": "mmlu_dev"}}
    assert summary["needle"] == {"of": "needle"}
    assert summary["failed"] == []


def test_only_what_is_asked_for_is_measured(folders, tmp_path):
    summary, _ = _run(_teacher(folders), tmp_path / "out", config(**ONLY_FIDELITY))
    assert list(summary) == ["model", "device", "failed", "fidelity", "tasks", "efficiency"]
    assert list(summary["fidelity"]) == ["held_out"]
    assert summary["tasks"] == {}
    assert (tmp_path / "out" / "samples.jsonl").read_text() == ""
    assert set(pd.read_parquet(tmp_path / "out" / "rows.parquet").benchmark) == {"held_out"}


@pytest.mark.parametrize(
    "error", [RuntimeError("no such file"), torch.cuda.OutOfMemoryError("CUDA out of memory"), AssertionError("bug")]
)
def test_a_benchmark_that_fails_is_named_and_the_others_go_on(folders, stand_ins, monkeypatch, tmp_path, caplog, error):
    _fails(monkeypatch, "length", error)
    with caplog.at_level(logging.INFO):
        summary, progress = _run(_teacher(folders), tmp_path / "out")
    assert summary["failed"] == [{"benchmark": "length", "error": f"{type(error).__name__}: {error}"}]
    assert summary["recompute"] == "run the same command with --force benchmark_teacher"
    assert "length" not in summary
    assert stand_ins[-2:] == ["efficiency", "judge"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert "length" not in set(pd.read_parquet(tmp_path / "out" / "rows.parquet").benchmark)
    logged = next(record for record in caplog.records if "length failed" in record.message)
    assert logged.exc_info is not None
    assert progress[-1].done == progress[-1].total


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (Found(summary={"nll": float("inf")}), "EvaluationError: a figure is NaN or infinite"),
        (Found([_record("length", score=float("nan"))]), "EvaluationError: a figure is NaN or infinite"),
        (Found([_record("length")] * 2), "ValueError: length: item 'a' has metric 'm' more than once"),
        (Found([{"benchmark": "length"}]), r"ValueError: record 0 (length, item None): missing ['cluster'"),
        (Found(summary={"path": Path("x")}), "TypeError: "),
    ],
)
def test_findings_that_cannot_be_kept_are_a_failure_of_their_benchmark(
    folders, stand_ins, monkeypatch, tmp_path, found, error
):
    monkeypatch.setattr(length, "measure", lambda *_: found)
    summary, _ = _run(_teacher(folders), tmp_path / "out")
    assert [lost["benchmark"] for lost in summary["failed"]] == ["length"]
    assert summary["failed"][0]["error"].startswith(error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_interrupts_and_a_full_host_end_the_stage(folders, stand_ins, monkeypatch, tmp_path, error):
    _fails(monkeypatch, "length", error)
    with pytest.raises(type(error)):
        _run(_teacher(folders), tmp_path / "out")


def test_a_stage_that_was_killed_goes_on_where_it_was(folders, stand_ins, monkeypatch, tmp_path):
    whole, _ = _run(folders, tmp_path / "whole")
    stand_ins.clear()
    with monkeypatch.context() as patch:
        _fails(patch, "layers", RuntimeError("passes by"))
        _fails(patch, "needle", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _run(folders, tmp_path / "killed", work=tmp_path / "work")
    assert stand_ins == ["fidelity", "mmlu_dev", "length"]
    stand_ins.clear()
    (tmp_path / "work" / "found" / "needle.draft").write_text("{")
    summary, progress = _run(folders, tmp_path / "out", work=tmp_path / "work")
    assert stand_ins == ["layers", "needle", "efficiency", "judge"]
    assert summary == whole
    assert pd.read_parquet(tmp_path / "out" / "rows.parquet").equals(
        pd.read_parquet(tmp_path / "whole" / "rows.parquet")
    )
    assert progress[-1].done == len(MEASURED)


def test_progress_tells_the_benchmark_under_way_and_the_whole(folders, stand_ins, tmp_path):
    _, progress = _run(_teacher(folders), tmp_path / "out")
    total = len(MEASURED) - 1  # a teacher has no layers to compare
    assert {p.total for p in progress} == {total}
    assert [p.done for p in progress] == sorted(p.done for p in progress)
    assert (progress[0].done, progress[-1].done) == (0.5, total)
    assert "fidelity 50 %, " in progress[0].detail and progress[0].detail.endswith("s left: half of it")
    assert "half of it" in str(progress[0])


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
    only = config(**ONLY_FIDELITY | {"tasks": ["mmlu_dev"]})
    with pytest.raises(EvaluationError, match="no benchmark gave a row: fidelity: .*finite.*mmlu_dev: .*finite"):
        _run({**folders, "student": tmp_path / "student"}, tmp_path / "out", only)


# From here on with the benchmarks themselves.


@pytest.fixture(scope="module")
def asked_by_the_judge():
    """Two questions of our own, so that no package is fetched."""
    questions = [judge_data.Question(f"{i}", "writing", (f"Why {i}?", "And now?"), None) for i in (1, 2)]
    prompts = {
        "single-v1": judge_data.Prompt("", "[[rating]] {question}: {answer}"),
        "single-v1-multi-turn": judge_data.Prompt("", "[[rating]] {question_2}: {answer_2}"),
        "pair-v2": judge_data.Prompt("", "[[A]] {question}: {answer_a} or {answer_b}"),
        "pair-v2-multi-turn": judge_data.Prompt("", "[[A]] {answer_a_2} or {answer_b_2}"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_data, "questions", lambda *_: questions)
        patch.setattr(judge_data, "judge_prompts", lambda: prompts)
        yield


@pytest.fixture(scope="module")
def results(folders, asked_by_the_judge, tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    _run(_teacher(folders), root / "teacher")
    _run(folders | {"teacher_rows": root / "teacher"}, root / "student")
    return root


def _summaries(root: Path) -> list[dict]:
    return [json.loads((root / name / "summary.json").read_text()) for name in ("teacher", "student")]


def test_teacher_is_measured_alone(results):
    assert sorted(p.name for p in (results / "teacher").iterdir()) == ["rows.parquet", "samples.jsonl", "summary.json"]
    summary, _ = _summaries(results)
    assert list(summary) == ["model", "device", "failed", "fidelity", "tasks", "length", "needle", "efficiency",
                             "judge"]  # fmt: skip
    assert summary["failed"] == []
    assert summary["model"] == "teacher"
    assert summary["device"]
    assert {"ppl", "tokens", "documents"} <= set(summary["fidelity"]["held_out"])
    assert summary["tasks"]["mmlu_dev"]["n"] == 5
    assert summary["tasks"]["mmlu_dev"]["chance"] == 0.25
    assert sum(b["n"] for b in summary["tasks"]["mmlu_dev"]["calibration"]["bins"]) == 5
    assert summary["length"]["train_length"] == summary["needle"]["train_length"] == 32
    assert [(d["batch"], d["context"]) for d in summary["efficiency"]["decode"]] == [(1, 8), (2, 8)]
    assert summary["judge"]["judge"]["kind"] == "fake"


def test_student_has_divergence_layers_and_a_paired_comparison(results):
    teacher, student = _summaries(results)
    assert student["failed"] == student["not_compared"] == []
    assert list(student["fidelity"]) == list(teacher["fidelity"]) == ["held_out", "held_out_text", "natural"]
    for text, found in student["fidelity"].items():
        assert {"kl_mean", "kl_p50", "kl_p90", "kl_p99", "kl_se", "top1", "ppl", "ppl_ratio"} <= set(found)
        assert found["tokens"] == teacher["fidelity"][text]["tokens"]
        assert found["ppl_ratio"] == pytest.approx(found["ppl"] / teacher["fidelity"][text]["ppl"], rel=1e-5)
    assert [layer["replaced"] for layer in student["layers"]] == [True, False]
    assert student["efficiency"]["state"][0]["ssm"] > 0 == teacher["efficiency"]["state"][0]["ssm"]

    assert json.loads((results / "student" / "means.json").read_text()) == []  # one task is no mean of tasks
    comparison = json.loads((results / "student" / "comparison.json").read_text())
    assert [(c["benchmark"], c["unit"]) for c in comparison] == [
        ("held_out", "nats"), ("held_out_text", "nats"), ("natural", "nats"), ("mmlu_dev", "share"),
        ("length", "nats"), ("needle", "share"), ("mt_bench", "points"),
        ("pairwise", "share"),
    ]  # fmt: skip
    held_out = comparison[0]
    assert not held_out["higher_is_better"]
    assert held_out["teacher"] == pytest.approx(np.log(teacher["fidelity"]["held_out"]["ppl"]))
    assert held_out["difference"] == pytest.approx(np.log(student["fidelity"]["held_out"]["ppl_ratio"]), abs=1e-6)
    assert all(c["p"] <= c["p_holm"] <= 1 for c in comparison)
    assert {c["unit"]: c["delta"] for c in comparison} == config().deltas


def test_rows_of_teacher_and_student_pair_item_by_item(results):
    teacher, student = (pd.read_parquet(results / name / "rows.parquet") for name in ("teacher", "student"))
    keys = ["benchmark", "item", "item_hash", "prompt_hash", "cluster", "metric", "n"]
    shared = student[~student.metric.isin(["kl", "top1", "win"])]  # which no teacher has of itself
    assert teacher[keys].equals(shared[keys].reset_index(drop=True))
    assert set(teacher.model) == {"teacher"}
    assert set(student.model) == {"student"}


def test_samples_are_the_same_users_words_for_both(results):
    teacher, student = (
        [json.loads(line) for line in (results / name / "samples.jsonl").read_text().splitlines()]
        for name in ("teacher", "student")
    )
    assert [s["prompt"] for s in teacher] == [s["prompt"] for s in student]
    # A system prompt that the template does not add by itself is shown as the model got it.
    assert teacher[0]["prompt"].startswith("<|im_start|>system\nBe brief.")
    assert [s["prompt"] for s in teacher[1:]] == ["What is 2 and 2?", "Name a colour that you like."]
    assert [s["response"] for s in teacher] != [s["response"] for s in student]


def test_what_must_not_be_compared_is_said_and_the_rest_is_compared(folders, results, tmp_path):
    inputs = {**folders, "teacher_rows": results / "teacher"}
    other = config(**ONLY_FIDELITY | {"skip_positions": 9, "natural_tokens": 200})
    summary, _ = _run(inputs, tmp_path / "out", other)
    assert [(r["benchmark"], r["metric"]) for r in summary["not_compared"]] == [("held_out", "nll")]
    assert "item_hash differs" in summary["not_compared"][0]["reason"]
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [c["benchmark"] for c in comparison] == ["held_out_text", "natural"]


def test_a_student_killed_in_the_judge_and_without_a_benchmark_ends_like_one_that_was_not(
    folders, results, monkeypatch, tmp_path
):
    """The whole stage: a benchmark breaks, the process dies in a later one, and the next one finishes."""
    inputs = {**folders, "teacher_rows": results / "teacher"}
    with monkeypatch.context() as patch:
        _fails(patch, "length", RuntimeError("out of patience"))
        _fails(patch, "judge", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _run(inputs, tmp_path / "killed", work=tmp_path / "work")
    with monkeypatch.context() as patch:
        for name in ("fidelity", "layers", "needle", "efficiency"):
            _fails(patch, name, AssertionError(f"{name} is measured again"))
        _fails(patch, "length", RuntimeError("out of patience"))
        summary, _ = _run(inputs, tmp_path / "out", work=tmp_path / "work")
    _, undisturbed = _summaries(results)
    assert summary["failed"] == [{"benchmark": "length", "error": "RuntimeError: out of patience"}]
    assert summary["recompute"].endswith("--force benchmark")
    for section in ("fidelity", "layers", "tasks", "needle", "judge"):
        assert summary[section] == undisturbed[section]
    rows, expected = (pd.read_parquet(folder / "rows.parquet") for folder in (tmp_path / "out", results / "student"))
    expected = expected[~expected.benchmark.isin(["length", "length_last"])]
    assert rows.equals(expected.reset_index(drop=True))
    compared = [c["benchmark"] for c in json.loads((tmp_path / "out" / "comparison.json").read_text())]
    assert compared == ["held_out", "held_out_text", "natural", "mmlu_dev", "needle", "mt_bench", "pairwise"]


def test_a_task_without_its_data_is_told_on_the_page_and_the_mean_is_of_the_others(folders, tmp_path):
    """Through both stages: nothing stands in for the benchmark that fails."""
    items = [
        {"id": f"i{k}", "cluster": f"i{k}", "query": f"{k} and 1?", "choices": ["yes", "no"], "gold": k % 2}
        for k in range(8)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    data = {"hellaswag_100": f"file:{tmp_path / 'items.jsonl'}", "squad": f"file:{tmp_path / 'gone.jsonl'}"}
    asked = config(**ONLY_FIDELITY | {"tasks": ["squad", "mmlu_dev", "hellaswag_100"], "data": data})
    _run(_teacher(folders), tmp_path / "teacher", asked)
    summary, _ = _run(folders | {"teacher_rows": tmp_path / "teacher"}, tmp_path / "student", asked)
    (lost,) = summary["failed"]
    assert lost["benchmark"] == "squad" and "gone.jsonl" in lost["error"]
    (mean,) = json.loads((tmp_path / "student" / "means.json").read_text())
    assert (mean["tasks"], mean["n"]) == (["mmlu_dev", "hellaswag_100"], 5 + 5)
    assert "squad" in mean["missing"]

    (tmp_path / "lineage.json").write_text(
        json.dumps({"run": "7", "config": {"variants": {"half": {"attention": "1/2"}}}, "stages": []})
    )
    inputs = {"lineage": "lineage.json", "benchmark_teacher": "teacher", "half.benchmark": "student"}
    (tmp_path / "report").mkdir()
    report.run(ReportConfig(), {role: tmp_path / name for role, name in inputs.items()}, tmp_path / "report", None)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("gone.jsonl") >= 2  # the teacher's and the student's
    assert "--force benchmark" in page
    assert "hellaswag_100" in page


@pytest.mark.gpu
def test_a_gpu_whose_memory_does_not_suffice_loses_one_benchmark(folders, results, monkeypatch, tmp_path):
    def measure(subject, _):
        held = [torch.empty(2**20, device=subject.model.device)]
        while True:
            held.append(torch.empty(2**36, device=subject.model.device))

    monkeypatch.setattr(length, "measure", measure)
    summary, _ = _run({**folders, "teacher_rows": results / "teacher"}, tmp_path / "out", device="cuda")
    assert [lost["benchmark"] for lost in summary["failed"]] == ["length"]
    assert summary["failed"][0]["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert {"fidelity", "layers", "needle", "efficiency", "judge"} <= summary.keys()
    assert torch.cuda.memory_reserved() < 2**36
