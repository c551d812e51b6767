import dataclasses
import json
import shutil
import sys
import tempfile

import pytest

from stage_store import Store
from steps import config, lineage, pipeline, plan
from steps.pipeline import StageFailed

TOML = """
device = "cpu"
[teacher]
source = "file:teacher.txt"
[corpus]
sources = ["file:talk.jsonl"]
[variants.half]
[variants.none]
attention = "0"
set = { "kl_distill.steps" = 7 }
"""

FAKE = '''
"""A stage that notes what it was given."""
import json

class FakeError(ValueError):
    pass

def run(config, inputs, out, context):
    if getattr(config, "pairs", 0) == 13:
        raise FakeError("loss is NaN")
    if getattr(config, "pairs", 0) == 14:
        raise KeyError("a bug")
    (out / "made.json").write_text(json.dumps([__name__, config.model_dump(mode="json")]))
    return {role: json.loads((folder / "made.json").read_text())[0][6:] for role, folder in inputs.items()}
'''

TRAINED = ["init_from_attention", "align", "kl_distill", "sft", "dpo"]
MEASURED = ["benchmark", "speculative_profile"]
DRAFTED = ["draft", "speculative_profile"]
SHARED = ["teacher", "corpus", "benchmark_teacher"]


@pytest.fixture
def root(finished, tmp_path, monkeypatch):
    """A project root whose stages are fakes, with everything stored after a first run."""
    use_fakes(monkeypatch, tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    (root / "fakes").mkdir()
    (root / "fakes" / "__init__.py").touch()
    for stage in pipeline.STAGES:
        (root / "fakes" / f"{stage.name}.py").write_text(FAKE)
    (root / "teacher.txt").write_text("a teacher")
    (root / "talk.jsonl").write_text("{}\n")
    (root / "small.txt").write_text("a small model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fakes(monkeypatch, root)
        run_all(settings(), root)
    return root


def use_fakes(monkeypatch, root):
    fakes = tuple(dataclasses.replace(stage, module=f"fakes.{stage.name}") for stage in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", fakes)
    monkeypatch.setattr(pipeline, "BY_NAME", {stage.name: stage for stage in fakes})
    monkeypatch.setattr(pipeline, "FIRST_PARTY", ("fakes", "stage_store", "corpora"))
    monkeypatch.setattr(tempfile, "tempdir", str(root))  # not the device lock that a real run may hold now
    monkeypatch.syspath_prepend(root)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakes"]:
        monkeypatch.delitem(sys.modules, name)


def settings(*overrides):
    return config.override(config.parse_text(TOML), overrides)


def run_all(settings, root):
    """Run every stage as the flow does; (labels of what was computed, references)."""
    refs = {variant: {} for variant in ("", *settings.variants)}
    for stage, variant, _ in pipeline.walk(settings):
        known = {**refs[""], **refs[variant]}
        if ref := pipeline.run_stage(stage.name, variant, settings, known, pipeline.Run("run-1", root)):
            refs[variant][stage.name] = ref
    computed = {
        pipeline.label(s, v) for v, of_variant in refs.items() for s, ref in of_variant.items() if not ref["hit"]
    }
    return computed, refs


def planned(settings, root, state="run", force=""):
    return {pipeline.label(p.stage, p.variant) for p in plan.make_plan(settings, root, force) if p.state == state}


def of(variant, *stages):
    return {f"{variant}/{stage}" for stage in stages}


def test_nothing_runs_twice(root):
    assert planned(settings(), root) == set()
    assert len(planned(settings(), root, "reuse")) == 3 + 2 * 7
    assert run_all(settings(), root)[0] == set()


BOTH = ("half", "none")


@pytest.mark.parametrize(
    ("override", "shared", "of_half", "of_none"),
    [
        ("dpo.beta=0.2", [], ["dpo", *MEASURED], ["dpo", *MEASURED]),
        ("kl_distill.steps=60", [], [*TRAINED[2:], *MEASURED], []),  # the other variant sets this leaf itself
        ("kl_distill.loss=reverse", [], [*TRAINED[2:], *MEASURED], [*TRAINED[2:], *MEASURED]),
        ("init_from_attention.gate_bias=2.0", [], TRAINED + MEASURED, TRAINED + MEASURED),
        ("variants.half.attention=1/4", [], TRAINED + MEASURED, []),
        ("layer_scores.method=restore", ["layer_scores"], TRAINED + MEASURED, []),  # none keeps no layer by a ratio
        ("layer_scores.rounds=2", [], [], []),  # nothing is scored while layers interleave
        ('variants.none.set={"kl_distill.steps" = 7, "sft.steps" = 3}', [], [], ["sft", "dpo", *MEASURED]),
        ("corpus.held_out_conversations=9", SHARED[1:], TRAINED + MEASURED, TRAINED + MEASURED),
        ("benchmark.items_per_task=3", ["benchmark_teacher"], ["benchmark"], ["benchmark"]),
        ("benchmark.non_inferiority=0.03", [], ["benchmark"], ["benchmark"]),  # the teacher is compared with nobody
        ("benchmark.judge.backend=fake", ["benchmark_teacher"], ["benchmark"], ["benchmark"]),
        ("benchmark.judge.retries=2", [], [], []),
        ("align.seq_len=300", ["benchmark_teacher"], [*TRAINED[1:], *MEASURED], [*TRAINED[1:], *MEASURED]),
        ("align.seq_len=200", [], [*TRAINED[1:], *MEASURED], [*TRAINED[1:], *MEASURED]),  # others train on longer ones
        ("speculative_profile.max_k=2", [], ["speculative_profile"], ["speculative_profile"]),
        ("speculative_profile.injected_acceptance=0.5", [], ["speculative_profile"], ["speculative_profile"]),
        ("draft.ngram=2", [], ["speculative_profile"], ["speculative_profile"]),
        ("draft.conversations=9", [], [], []),  # there is nothing to train while the kind is ngram
        ("draft.kind=layers:[0, 2]", [], [*DRAFTED], [*DRAFTED]),
        ("draft.kind=checkpoint:file:small.txt", [], [*DRAFTED], [*DRAFTED]),
        ("kl_distill.checkpoint_every=7", [], [], []),
        ("seed=1", SHARED[1:], TRAINED + MEASURED, TRAINED + MEASURED),
        ("compute=float32", SHARED[1:], TRAINED + MEASURED, TRAINED + MEASURED),
        ("sft.enabled=false", [], ["dpo", *MEASURED], ["dpo", *MEASURED]),
        ("dpo.steps=0", [], MEASURED, MEASURED),
        ("report.title=other", [], [], []),
        ("resources.align.gpu=4", [], [], []),
        ("device=auto", [], [], []),
    ],
)
def test_a_changed_leaf_runs_what_depends_on_it_as_planned(root, monkeypatch, override, shared, of_half, of_none):
    monkeypatch.setattr(pipeline.device, "gpu_visible", lambda: False)
    expected = set(shared) | of("half", *of_half) | of("none", *of_none)
    assert planned(settings(override), root) == expected
    assert run_all(settings(override), root)[0] == expected


@pytest.mark.parametrize(
    ("file", "text", "shared"),
    [("talk.jsonl", "{ }\n", SHARED[1:]), ("teacher.txt", "another teacher", SHARED)],
)
def test_changed_data_runs_what_reads_it(root, file, text, shared):
    (root / file).write_text(text)
    expected = set(shared) | {label for v in BOTH for label in of(v, *TRAINED, *MEASURED)}
    assert planned(settings(), root) == expected


def test_a_file_that_only_benchmarks_read_counts_by_its_content(root):
    asked = settings('benchmark.judge={backend = "hf", source = "file:small.txt"}', "benchmark.tasks=['squad']")
    asked = config.override(asked, ['benchmark.data={squad = "file:squad.jsonl", logiqa = "file:never.jsonl"}'])
    measured = {"benchmark_teacher", "half/benchmark", "none/benchmark"}
    (root / "squad.jsonl").write_text("{}")
    run_all(asked, root)
    assert planned(asked, root) == set()
    for name in ("small.txt", "squad.jsonl"):
        (root / name).write_text("other content")
        assert planned(asked, root) == measured
        run_all(asked, root)


def test_changed_code_runs_what_imports_it_and_a_comment_does_not(root):
    code = root / "fakes" / "dpo.py"
    code.write_text(code.read_text() + "\n# a comment\n")
    assert planned(settings(), root) == set()
    code.write_text(code.read_text() + "\nMORE = 1\n")
    assert planned(settings(), root) == {label for v in BOTH for label in of(v, "dpo", *MEASURED)}


def test_benchmarks_run_again_on_other_hardware_and_training_does_not(root, monkeypatch):
    monkeypatch.setattr(pipeline.device, "hardware", lambda kind: {"device": kind, "name": "another"})
    assert planned(settings(), root) == {"benchmark_teacher"} | {label for v in BOTH for label in of(v, *MEASURED)}


def drafted(*overrides):
    return settings("draft.kind=layers:[0, 2]", *overrides)


def test_a_draft_is_made_of_the_last_student_and_profiled_beside_it(root):
    _, refs = run_all(drafted(), root)
    store = Store(root / ".mamballama" / "store")
    played = {s: store.manifest(pipeline.stored_ref(r)).meta["summary"] for s, r in refs["half"].items()}
    assert played["draft"] == {"corpus": "corpus", "student": "dpo"}
    assert played["speculative_profile"] == {"corpus": "corpus", "student": "dpo", "draft": "draft"}
    assert run_all(drafted(), root)[0] == set()


@pytest.mark.parametrize(
    ("override", "of_half"),
    [
        ("draft.steps=7", DRAFTED),
        ("draft.kind=layers:[0, 3]", DRAFTED),
        ("draft.ngram=2", ["speculative_profile"]),
        ("draft.checkpoint_every=7", []),
        ("dpo.beta=0.2", ["dpo", "draft", *MEASURED]),
        ("draft.enabled=false", []),  # back to what was stored without a draft
        ("draft.steps=0", []),
    ],
)
def test_a_changed_draft_runs_what_depends_on_it(root, override, of_half):
    run_all(drafted(), root)
    assert planned(drafted(override), root) == {label for v in BOTH for label in of(v, *of_half)}


def test_a_draft_from_elsewhere_is_known_by_its_content(root):
    changed = settings("draft.kind=checkpoint:file:small.txt")
    run_all(changed, root)
    assert planned(changed, root) == set()
    (root / "small.txt").write_text("another small model")
    assert planned(changed, root) == {label for v in BOTH for label in of(v, *DRAFTED)}


def scored(*overrides):
    return settings("layer_scores.method=restore", "variants.quarter.attention=1/4", *overrides)


def test_a_ranking_is_made_once_for_all_variants_that_keep_a_ratio(root):
    computed, refs = run_all(scored(), root)
    assert computed == {"layer_scores"} | {label for v in ("half", "quarter") for label in of(v, *TRAINED, *MEASURED)}
    store = Store(root / ".mamballama" / "store")
    upstream = {
        v: store.manifest(pipeline.stored_ref(refs[v]["init_from_attention"])).payload["upstream"]
        for v in ("half", "quarter", "none")
    }
    assert upstream["half"]["layer_scores"] == upstream["quarter"]["layer_scores"] == refs[""]["layer_scores"]["key"]
    assert "layer_scores" not in upstream["none"]
    assert run_all(scored(), root)[0] == set()


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("layer_scores.rounds=2", True),
        ("layer_scores.method=recall", True),
        ("init_from_attention.gate_bias=2.0", True),
        ("init_from_attention.measure_paper=false", False),
        ("kl_distill.steps=60", False),
        ("device=auto", False),
    ],
)
def test_a_ranking_is_made_anew_where_it_could_change(root, monkeypatch, override, again):
    monkeypatch.setattr(pipeline.device, "gpu_visible", lambda: False)
    run_all(scored(), root)
    assert ("layer_scores" in planned(scored(override), root)) == again


def continued(*overrides):
    """`quarter` continues from `half`; in the file it stands before it."""
    raw = TOML.replace("[variants.half]", '[variants.quarter]\nattention = "1/4"\nfrom = "half"\n[variants.half]')
    return config.override(config.parse_text(raw), overrides)


def test_a_variant_continues_from_the_student_of_another(root):
    computed, refs = run_all(continued(), root)
    assert computed == of("quarter", *TRAINED, *MEASURED)
    store = Store(root / ".mamballama" / "store")
    start = store.manifest(pipeline.stored_ref(refs["quarter"]["init_from_attention"]))
    assert start.meta["summary"] == {"teacher": "teacher", "corpus": "corpus", "previous": "kl_distill"}
    assert start.payload["upstream"]["previous"] == refs["half"]["kl_distill"]["key"]
    aligned = store.manifest(pipeline.stored_ref(refs["quarter"]["align"]))
    assert aligned.payload["upstream"]["previous"] == refs["half"]["kl_distill"]["key"]
    assert run_all(continued(), root)[0] == set()


def test_a_chain_of_variants_is_made_from_its_end(root):
    raw = TOML.replace("[variants.half]", '[variants.quarter]\nattention = "1/4"\nfrom = "half"\n[variants.half]')
    chained = config.parse_text(raw.replace('attention = "0"', 'attention = "0"\nfrom = "quarter"'))
    _, refs = run_all(chained, root)
    upstream = Store(root / ".mamballama" / "store").manifest(pipeline.stored_ref(refs["none"]["align"])).payload
    assert upstream["upstream"]["previous"] == refs["quarter"]["kl_distill"]["key"]
    planned = {(line.variant, line.stage): line.key for line in plan.make_plan(chained, root)}
    assert all(planned[variant, name] == ref["key"] for variant, made in refs.items() for name, ref in made.items())


@pytest.mark.parametrize(
    ("override", "of_quarter"),
    [
        ("dpo.beta=0.2", ["dpo", *MEASURED]),  # it continues from what was before
        ('variants.half.set={"align.steps" = 7}', TRAINED + MEASURED),
        ('variants.half.set={"sft.steps" = 7}', []),
        ("variants.quarter.from_stage=sft", TRAINED + MEASURED),
    ],
)
def test_a_variant_is_made_anew_where_what_it_continues_from_changes(root, override, of_quarter):
    run_all(continued(), root)
    planned_of_quarter = {label for label in planned(continued(override), root) if label.startswith("quarter/")}
    assert planned_of_quarter == of("quarter", *of_quarter)
    assert planned_of_quarter <= run_all(continued(override), root)[0]


@pytest.mark.parametrize(
    ("from_stage", "off", "played"),
    [
        ("dpo", "sft", "dpo"),
        ("sft", "sft", "kl_distill"),
        ("kl_distill", "kl_distill", "align"),
        ("init_from_attention", "sft", "init_from_attention"),
    ],
)
def test_a_variant_continues_from_the_nearest_student_that_there_is(root, from_stage, off, played):
    changed = continued(f"variants.quarter.from_stage={from_stage}", f"{off}.enabled=false")
    _, refs = run_all(changed, root)
    start = Store(root / ".mamballama" / "store").manifest(pipeline.stored_ref(refs["quarter"]["init_from_attention"]))
    assert start.meta["summary"]["previous"] == played


def test_a_variant_that_comes_first_makes_what_it_continues_from(root):
    """As its branch may where variants run side by side; the other branch then finds it stored."""
    changed = continued("kl_distill.loss=reverse")
    shared = {s: pipeline.run_stage(s, "", changed, {}, pipeline.Run("run-1", root)) for s in ("teacher",)}
    for stage in ("corpus", "benchmark_teacher"):
        shared[stage] = pipeline.run_stage(stage, "", changed, shared, pipeline.Run("run-1", root))
    assert not pipeline.run_stage("init_from_attention", "quarter", changed, shared, pipeline.Run("run-7", root))["hit"]
    computed, refs = run_all(changed, root)
    assert "half/kl_distill" not in computed and "half/sft" in computed
    store = Store(root / ".mamballama" / "store")
    by_run = {}
    for name in ("run-7", "run-8"):
        entries = lineage.lineage(changed, refs, pipeline.Run(name, root), store)["stages"]
        by_run[name] = {(e["variant"], e["stage"]): e["hit"] for e in entries}["half", "kl_distill"]
    assert by_run == {"run-7": False, "run-8": True}


def test_what_is_forced_forces_the_variants_that_continue_from_it(root):
    run_all(continued(), root)
    forced = planned(continued(), root, force="kl_distill")
    assert of("quarter", *TRAINED, *MEASURED) <= forced
    assert "half/align" not in forced


def test_a_stage_is_handed_what_another_section_says_of_its_input(root):
    handed = pipeline.BY_NAME["speculative_profile"].config(drafted("draft.ngram=5"), "half")
    assert (handed.ngram, handed.draft) == (5, "layers:[0, 2]")
    assert pipeline.BY_NAME["speculative_profile"].config(drafted("draft.steps=0"), "half").draft == "ngram"


def test_the_plan_says_why(root):
    why = {pipeline.label(p.stage, p.variant): p.why for p in plan.make_plan(settings("kl_distill.steps=60"), root)}
    assert why["half/kl_distill"] == "changed: kl_distill.steps: 100 -> 60"
    assert why["half/benchmark"] == "changed: kl_distill.steps: 100 -> 60"
    assert why["none/kl_distill"] == ""
    table = plan.plan_table(plan.make_plan(settings("kl_distill.steps=60", "sft.enabled=false"), root))
    assert table.startswith("plan: 7 of 15 stages to run\n")
    assert "half/sft                  off                  switched off in the configuration" in table


def test_a_first_plan_has_nothing_to_compare_with(root):
    lines = plan.make_plan(settings("store.url=fresh"), root)
    assert {line.why for line in lines if line.state != "off"} == {"not stored yet"}


def test_a_switched_off_stage_is_passed_through(root):
    _, refs = run_all(settings("sft.enabled=false", "align.steps=0"), root)
    assert not {"sft", "align"} & refs["half"].keys()
    store = Store(root / ".mamballama" / "store")
    played = {s: store.manifest(pipeline.stored_ref(r)).meta["summary"].get("student") for s, r in refs["half"].items()}
    assert (played["kl_distill"], played["dpo"], played["benchmark"]) == ("init_from_attention", "kl_distill", "dpo")


def test_the_teacher_is_measured_without_a_student_and_students_beside_it(root):
    _, refs = run_all(settings(), root)
    store = Store(root / ".mamballama" / "store")
    alone = store.manifest(pipeline.stored_ref(refs[""]["benchmark_teacher"])).meta["summary"]
    beside = store.manifest(pipeline.stored_ref(refs["half"]["benchmark"])).meta["summary"]
    assert alone == {"teacher": "teacher", "corpus": "corpus"}
    assert beside == alone | {"student": "dpo", "teacher_rows": "benchmark_teacher"}


def test_a_stage_is_handed_its_own_slice_and_nothing_else(root):
    _, refs = run_all(settings(), root)
    store = Store(root / ".mamballama" / "store")

    def handed(variant, stage):
        folder = store.fetch(store.manifest(pipeline.stored_ref(refs[variant][stage])))
        return json.loads((folder / "made.json").read_text())[1]

    assert handed("none", "kl_distill") == settings().for_variant("none").kl_distill.model_dump(mode="json")
    assert handed("none", "init_from_attention")["attention"] == "0"


def test_force_runs_a_stage_and_what_depends_on_it_anew(root):
    expected = {label for v in BOTH for label in of(v, "dpo", *MEASURED)}
    lines = plan.make_plan(settings(), root, "dpo")
    assert {pipeline.label(p.stage, p.variant) for p in lines if p.why == plan.FORCED} == expected
    assert planned(settings(), root) == set()  # a plan changes nothing
    plan.set_aside_forced(lines, settings(), root)
    assert run_all(settings(), root)[0] == expected
    assert planned(settings(), root) == set()


def test_a_failure_of_the_projects_own_is_one_line_and_a_bug_keeps_its_trace(root):
    with pytest.raises(StageFailed, match="^half/dpo: FakeError: loss is NaN$"):
        run_all(settings("dpo.pairs=13"), root)
    with pytest.raises(KeyError):
        run_all(settings("dpo.pairs=14"), root)
    assert planned(settings("dpo.pairs=13"), root) == {label for v in BOTH for label in of(v, "dpo", *MEASURED)}


def test_a_missing_source_stops_the_plan_in_one_line(root):
    (root / "talk.jsonl").unlink()
    with pytest.raises(StageFailed, match="plan: SourceError: file:talk.jsonl"):
        plan.make_plan(settings(), root)


def test_a_damaged_input_is_set_aside_and_the_next_run_makes_it_again(root):
    (file,) = (root / ".mamballama" / "store" / "corpus").glob("*/a-*/made.json")
    file.chmod(0o644)
    file.write_text("x" * file.stat().st_size)
    with pytest.raises(StageFailed, match="half/dpo: CorruptStage: corpus/"):
        run_all(settings("dpo.beta=0.2"), root)
    assert planned(settings(), root) == {"corpus"}


def test_progress_is_passed_on_at_most_every_few_seconds_and_at_the_end(monkeypatch):
    told, clock = [], iter([0.0, 1.0, 4.9, 5.1, 5.2])
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: next(clock))
    reporter = pipeline._Reporter("align", told.append)
    for done in (1, 2, 3, 4, 10):
        reporter(pipeline.Progress(done, 10, "steps", 2.0))
    assert [progress.done for progress in told] == [1, 4, 10]


def test_lineage_says_how_every_figure_came_about(root):
    changed = settings("dpo.beta=0.2", "sft.enabled=false")
    _, refs = run_all(changed, root)
    store = Store(root / ".mamballama" / "store")
    found = lineage.lineage(changed, refs, pipeline.Run("run-2", root, "python flow run"), store)
    entries = {(e["variant"], e["stage"]): e for e in found["stages"]}
    assert (found["run"], found["command"], found["config"]["dpo"]["beta"]) == ("run-2", "python flow run", 0.2)
    assert len(entries) == 4 + 2 * 8
    assert entries["half", "draft"]["hit"] is None
    assert entries["half", "sft"] == {"variant": "half", "stage": "sft", "hit": None}
    assert entries["", "teacher"]["hit"] is True
    dpo = entries["half", "dpo"]
    assert (dpo["hit"], dpo["config"]["beta"], dpo["config"]["seed"]) == (False, 0.2, 0)
    assert dpo["upstream"]["student"] == entries["half", "kl_distill"]["key"]
    assert dpo["key"] == refs["half"]["dpo"]["key"] and dpo["seconds"] >= 0 and dpo["peak_rss_bytes"] > 0
    assert "python" in dpo["versions"] and dpo["device"] == found["host"]["name"]
    json.dumps(found)
