"""What the charts show of a run: who is in them, where marks and lines stand, and what is left out."""

import copy
from xml.etree import ElementTree

import pytest

from evals.stats import wilson
from reports import figures
from reports.figures import efficiency, fidelity, judge, long_context, speculation, training
from reports.figures.models import models, rules
from reports.rows import load
from reports.text import count, percent
from reports.twin import build_twin


@pytest.fixture
def twin(example):
    return build_twin(load(example), "A title", 2, wilson)


def parse(chart):
    return ElementTree.fromstring(str(chart))


def texts(chart):
    return [e.text for e in parse(chart).iter("text")]


def notes(chart):
    return [e.text for e in parse(chart).iter("title")][1:]


def group(chart, slot):
    return [e for e in parse(chart).iter("g") if e.get("class") == f"s{slot}"]


def test_every_chart_is_drawn_of_a_run_that_has_everything(twin):
    drawn = figures.draw(twin)
    empty = [name for name, charts in drawn.items() if not charts]
    assert empty == []


def test_nothing_is_drawn_of_a_run_without_benchmarks(twin):
    for model in (twin["teacher"], *twin["variants"]):
        model["benchmark"] = None
    for variant in twin["variants"]:
        variant |= {
            "comparisons": [],
            "speculation": None,
            "against_teacher": {"decode": [], "prefill": [], "state": []},
        }
    drawn = figures.draw(twin)
    for name in (
        "models",
        "forests",
        "fidelity_layers",
        "fidelity_positions",
        "calibration",
        "length",
        "last",
        "needles",
    ):
        assert not drawn[name], name
    for name in ("frontier", "throughput", "state", "speculation", "pairwise", "categories", "mt_bench"):
        assert not drawn[name], name


def test_a_section_that_only_one_model_has_is_drawn_of_that_one(twin):
    twin["teacher"]["benchmark"]["length"] = twin["variants"][0]["benchmark"]["length"] = None
    assert "quarter" in texts(long_context.by_position(twin)) and "half" not in texts(long_context.by_position(twin))


def test_forests_have_one_chart_a_unit_and_name_the_baseline(twin):
    assert [f["unit"] for f in figures.comparison.forests(twin)] == [
        "nats per token",
        "percentage points",
        "points of the judge's scale",
    ]
    twin["baseline"] = {"name": "A/half", "kind": "variant"}
    words = texts(figures.comparison.forests(twin)[0]["chart"])
    assert {"A/half", "Paired difference in nats per token", "student − A/half; further left is better"} <= set(words)


def test_replaced_layers_are_filled_and_kept_ones_hollow(twin):
    mixers = fidelity.by_layer(twin)[0]
    half = [mark for g in group(mixers, 1) for mark in g.iter("use") if mark.find("title") is not None]
    hollow = [m.find("title").text for m in half if m.get("class") == "hollow"]
    filled = [m.find("title").text for m in half if m.get("class") != "hollow"]
    assert len(hollow) == len(filled) == 15
    assert all("kept" in note for note in hollow) and all("replaced" in note for note in filled)


def test_rules_stand_at_the_training_length_and_at_the_teacher_s_context(twin):
    words = texts(long_context.by_position(twin))
    assert "students trained to 512" in words and f"teacher's context, {count(8192)}" in words
    twin["variants"][0]["benchmark"]["length"]["train_length"] = 1024
    words = texts(long_context.by_position(twin))
    assert f"half trained to {count(1024)}" in words and "quarter trained to 512" in words


def test_needle_fields_say_k_of_n_with_an_interval(twin):
    half = long_context.needles(twin)[1]
    cells = twin["variants"][0]["benchmark"]["needle"]["cells"]
    shown = [e.find("text").text for e in parse(half).iter("g") if e.find("rect") is not None]
    assert sorted(shown) == sorted(f"{c['k']}/{c['n']}" for c in cells)
    low, high = wilson(5, 5)
    assert f"depth 0 %, 512 tokens: 5 of 5, {percent(1.0)} [{percent(low)}, {percent(high)}]" in notes(half)
    assert {"trained to 512", "effective to 512"} <= set(texts(half))
    assert f"trained to {count(8192)}" in texts(long_context.needles(twin)[0])


def test_a_field_that_was_not_measured_is_not_a_zero(twin):
    cells = twin["variants"][0]["benchmark"]["needle"]["cells"]
    del cells[0]
    cells[0] |= {"k": 0, "n": 0}
    chart = long_context.needles(twin)[1]
    assert texts(chart).count("–") == 2 and sum("not measured" in note for note in notes(chart)) == 2


def test_out_of_memory_is_shown_where_it_happened(twin):
    charts = efficiency.throughput(twin)
    assert len(charts) == 4
    assert all(texts(chart).count("OOM") == 1 for chart in charts)  # the teacher's, at batch 8 and 8192 tokens
    note = f"teacher, batch 8, context {count(8192)}: out of memory"
    assert all(note in notes(chart) for chart in charts)


def test_one_batch_and_one_context_make_no_curve(twin):
    for m in models(twin):
        for kind in efficiency.KINDS:
            m.benchmark["efficiency"][kind] = m.benchmark["efficiency"][kind][:1]
    assert efficiency.throughput(twin) == []


def test_measured_bytes_stand_as_hollow_marks_beside_the_computed_ones(twin):
    for entry in twin["variants"][0]["benchmark"]["efficiency"]["state"]:
        entry["measured"] = entry["total"] + 4096
    chart = efficiency.state(twin)
    hollow = [e for e in parse(chart).iter("use") if e.get("class") == "hollow" and e.find("title") is not None]
    assert len(hollow) == 4 and "half, measured" in texts(chart)


def test_students_share_a_line_where_they_cross_at_one_context(twin):
    assert "students: fewer bytes from 103" in texts(efficiency.state(twin))
    twin["variants"][0]["benchmark"]["efficiency"]["crossover"] = 150
    twin["variants"][1]["benchmark"]["efficiency"]["crossover"] = None
    words = texts(efficiency.state(twin))
    assert [w for w in words if "fewer" in w] == ["half: fewer bytes from 150"]


def test_the_label_of_a_line_lists_few_names():
    made = rules([(name, 7) for name in "abcde"] + [("f", 9)], lambda who, value: f"{who} at {value}")
    assert [(r.value, r.label) for r in made] == [(7, "a, b, c and 2 more at 7"), (9, "f at 9")]


@pytest.mark.parametrize(
    ("pairs", "cheaper", "corners"),
    [
        ([(1, 0.9), (2, 0.5)], False, [(2, 0.5), (1, 0.5), (1, 0.9)]),
        ([(1, 0.5), (2, 0.9)], True, [(1, 0.5), (2, 0.5), (2, 0.9)]),
        ([(1, 0.5), (2, 0.9), (2, 0.4), (3, 0.9), (3, 0.7)], True, [(1, 0.5), (2, 0.5), (2, 0.9)]),
        ([(2, 0.9), (1, 0.5)], False, [(2, 0.9)]),
        ([], True, []),
    ],
)
def test_the_step_line_joins_what_nothing_beats(pairs, cheaper, corners):
    assert efficiency.steps(pairs, cheaper) == corners


def test_the_frontier_compares_at_what_all_models_have(twin):
    assert len(efficiency.frontier(twin)) == 4
    speed, memory = efficiency.costs(twin)
    assert speed.label == "decode tokens/s, batch 8, context 512"  # the teacher has no figure beyond
    assert memory.values["teacher"] == 30 * 768 * 32768
    tasks = efficiency.shared_tasks(twin)
    assert set(tasks) == {("hellaswag_100", "acc_norm"), ("truthfulqa_mc1_100", "acc"), ("mmlu_dev", "acc")}
    means = efficiency.qualities(twin)[0]
    scores = [t["score"] for t in twin["teacher"]["benchmark"]["tasks"]]
    assert means.values["teacher"] == pytest.approx(sum(scores) / 3)
    widest = max(t["ci_high"] - t["ci_low"] for t in twin["teacher"]["benchmark"]["tasks"]) / 2
    assert 0 < means.half["teacher"] < widest


def test_a_task_that_one_model_lacks_is_not_in_the_mean(twin):
    twin["variants"][1]["benchmark"]["tasks"] = twin["variants"][1]["benchmark"]["tasks"][1:]
    assert len(efficiency.shared_tasks(twin)) == 2


def test_a_metric_that_is_compared_goes_before_the_task_s_others(twin):
    for m in models(twin):
        first = next(t for t in m.benchmark["tasks"] if t["task"] == "hellaswag_100")
        m.benchmark["tasks"].insert(0, first | {"metric": "acc"})
    assert ("hellaswag_100", "acc_norm") in efficiency.shared_tasks(twin)


def test_verdicts_of_the_judge_are_counted_in_the_bars(twin):
    chart = judge.pairwise(twin)
    assert "half: win 2 of 8 prompts" in notes(chart) and "quarter: lose 3 of 8 prompts" in notes(chart)


def test_categories_that_one_model_lacks_have_no_mark_of_it(twin):
    twin["variants"][0]["benchmark"]["judge"]["mt_bench"] |= {
        "by_category": {"coding": 3.0},
        "category_n": {"coding": 6},
    }
    assert judge.categories(twin) == ["writing", "math", "coding"]
    assert [note for note in notes(judge.by_category(twin)) if note.startswith("half")] == ["half, coding: 3.00, n=6"]


def test_curves_say_what_they_cost(twin):
    charts = training.curves(twin)
    assert texts(charts[0])[0] == "Training loss of align" and texts(charts[-1])[0] == "Training loss of draft"
    assert f"half, {count(104_000)} tokens, 4\u202fmin 20\u202fs" in texts(charts[0])


def test_a_student_s_first_draft_has_the_student_s_marker(twin):
    chart = speculation.sweep(twin)[0]
    legend = [e for e in parse(chart).iter("g") if e.find("title") is None and len(e) == 1]
    assert [e.get("class") for e in legend] == ["s1", "s4", "s2"]
    assert [t for t in texts(chart)[1:] if "," in t] == ["half, ngram", "half, layers:[0, 14, 29]", "quarter, ngram"]


def test_reliability_has_the_line_of_perfect_calibration_and_the_bins_sizes(twin):
    chart = fidelity.calibration(twin)["mmlu_dev"]
    dashed = next(e for e in parse(chart).iter("polyline") if "dashed" in e.get("class"))
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in dashed.get("points").split())
    assert x0 < x1 and y0 > y1
    assert "confidence, mean of a bin of 56 items" in texts(chart)
    assert len([e for e in parse(chart).iter("line") if e.get("class") == "whisker"]) == 15


def test_many_models_have_reliability_diagrams_of_fewer_tasks(twin):
    for model in (twin["teacher"], *twin["variants"]):
        (own,) = model["benchmark"]["calibration"]
        model["benchmark"]["calibration"] = [own | {"task": f"task {i}"} for i in range(9)]
    assert list(fidelity.calibration(twin)) == [f"task {i}" for i in range(fidelity.DIAGRAMS)]
    twin["variants"] *= 5
    assert list(fidelity.calibration(twin)) == ["task 0"]


def test_drawing_leaves_the_twin_as_it_was(twin):
    before = copy.deepcopy(twin)
    figures.draw(twin)
    assert twin == before
