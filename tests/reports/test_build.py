import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from evals.stats import wilson
from reports.build import write_report
from reports.rows import load
from reports.text import TEXTS, count, interval, number, percent, points, signed
from reports.twin import SAMPLE_CHARACTERS, teacher_name, thin

SECTIONS = {"verdict", "comparison", "differences", "stages", "training", "cost", "speculation", "samples", "lineage"}
SECTIONS |= {
    "configuration",
    "rerun",
    "reading",
    "fidelity",
    "calibration",
    "long-context",
    "frontier",
    "judge",
    "flips",
}
VOID = {"meta", "input", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Checks that tags close in order and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.images = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg" and attrs.get("role") == "img":
            self.images.append([len(self.tags), False])
        if tag == "title" and self.open[-2:-1] == ["svg"]:
            self.images[-1][1] = True

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def build(inputs, out, samples=6):
    out.mkdir(exist_ok=True)
    twin = write_report(load(inputs), out, title="A title", samples=samples, interval=wilson)
    return twin, (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def built(example, tmp_path):
    return build(example, tmp_path / "out")


def body_text(html):
    return re.sub(r"[ \n]+", " ", " ".join(Page(html).text))


def test_every_section_is_there_once(built):
    ids = Page(built[1]).ids
    assert set(ids) >= SECTIONS
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_runs_nothing(built):
    _, html = built
    page = Page(html)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form", "base"})
    assert not any(a.startswith("on") or a == "style" for _, attrs in page.tags for a in attrs)
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_policy_admits_exactly_the_page_s_own_style(built):
    import base64
    import hashlib

    style = re.search(r"<style>(.*?)</style>", built[1], re.S).group(1)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in built[1]


def test_model_output_stays_text(built, hostile):
    _, html = built
    assert hostile in body_text(html)  # shown as it is
    assert "<script" not in html and "onerror=alert(1)>" not in html


def test_hostile_names_stay_text_everywhere(example, hostile, tmp_path):
    raw = json.loads(example["lineage"].read_text().replace("hellaswag_100", "x"))
    raw |= {
        "run": hostile,
        "command": hostile,
        "git_commit": hostile,
        "host": {hostile: hostile},
        "versions": {hostile: hostile},
    }
    raw["config"]["variants"][hostile] = {}
    raw["stages"].append(raw["stages"][3] | {"variant": hostile, "stage": hostile, "key": hostile, "device": hostile})
    raw["stages"].append(raw["stages"][3] | {"variant": hostile})
    example["lineage"].write_text(json.dumps(raw))
    comparison = example["half.benchmark"] / "comparison.json"
    rows = json.loads(comparison.read_text())
    rows[0]["benchmark"] = rows[1]["metric"] = rows[2]["verdict"] = hostile
    comparison.write_text(json.dumps(rows))
    _, html = build(example, tmp_path / "out")
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "img" not in {tag for tag, _ in Page(html).tags}


def test_control_characters_and_marks_of_direction_become_visible(example, tmp_path):
    line = {"prompt": "p\x00\u202e", "response": "a\x1b[0m\x85\u2066b\tc\nd\r"}
    (example["benchmark_teacher"] / "samples.jsonl").write_text(
        json.dumps(line | {"prompt": "\ud800" + line["prompt"]})
    )
    twin, html = build(example, tmp_path / "out")
    assert twin["samples"][0]["prompt"] == "\ufffdp\u2400\ufffd"
    assert twin["samples"][0]["responses"][0]["text"] == "a\u241b[0m\ufffd\ufffdb\tc\nd\u240d"
    forbidden = [c for c in html if ord(c) < 32 and c not in "\n\t" or c in "\x7f\x85\u202a\u202b\u202e\u2066\u2069"]
    assert forbidden == []


def test_benchmarks_that_failed_are_told_first_and_the_others_shown(example, tmp_path):
    path = example["half.benchmark"] / "summary.json"
    raw = json.loads(path.read_text())
    raw |= {"failed": [{"benchmark": "needle", "error": "OutOfMemoryError: 9 GiB"}], "recompute": "--force benchmark"}
    del raw["needle"]
    path.write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    half, quarter = twin["variants"]
    assert half["flags"][0]["text"].startswith("FAILED: needle gave no figures: OutOfMemoryError: 9 GiB")
    assert half["benchmark"]["needle"] is None and quarter["benchmark"]["needle"]["cells"]
    card = html[html.index('<ul class="flags">', html.index('class="card s1"')) :]
    assert card.index("FAILED: needle") < card.index("</li>")


def test_what_the_stage_refused_to_compare_is_told(example, tmp_path):
    path = example["quarter.benchmark"] / "summary.json"
    refused = {"benchmark": "natural", "metric": "nll", "reason": "natural/nll: only one cluster of items"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"not_compared": [refused]}))
    twin, html = build(example, tmp_path / "out")
    assert twin["not_comparable"] == [refused | {"model": "quarter"}]
    assert "Not comparable: natural/nll: only one cluster of items (quarter)." in body_text(html)


def test_a_matrix_shows_every_student_against_the_baseline(built):
    twin, html = built
    table = re.search(r"<h3>Every student against teacher</h3>.*?</table>", html, re.S).group()
    rows = re.findall(r"<tr><th scope=.row.*?</tr>", table, re.S)
    assert len(rows) == 6
    for v in twin["variants"]:
        for c in v["comparisons"]:
            (row,) = [r for r in rows if f">{TEXTS.get(c['benchmark'], c['benchmark'])}<small>{c['metric']}" in r]
            show = points if c["unit"] == "share" else signed
            assert f"{show(c['difference'])}<small>{interval(c['ci_low'], c['ci_high'], show)} n={c['n']}" in row


def test_published_figures_stand_beside_and_are_marked_as_another_model(built):
    text = body_text(built[1])
    assert (
        "1.03 → 1.09 → 1.22 → 1.66 times the teacher's: Zephyr-7B with 50 → 25 → 6.25 → 0 % attention, table 6" in text
    )
    assert "70.43 → 69.13 Llama-3.2-3B → Mamba2 50 %, table 3; 100 items here" in text
    assert "Paper, table 3: Zero-shot accuracy" in text and "Paper, table 4" not in text


def test_sections_that_were_off_are_said_to_be(example, tmp_path):
    for role in ("benchmark_teacher", "half.benchmark", "quarter.benchmark"):
        path = example[role] / "summary.json"
        raw = json.loads(path.read_text())
        for section in ("length", "needle", "efficiency", "judge", "layers"):
            del raw[section]
        path.write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    page = Page(html)
    assert set(page.ids) >= SECTIONS
    assert twin["teacher"]["benchmark"]["efficiency"] is None
    assert twin["variants"][0]["against_teacher"] == {"decode": [], "prefill": [], "state": []}
    for section in ("judge", "frontier", "long-context"):
        shown = html[html.index(f'<section id="{section}">') :]
        assert "not run" in shown[: shown.index("</section>")]


def test_every_chart_is_an_image_with_a_title_and_a_table_follows(built):
    page = Page(built[1])
    assert len(page.images) >= 12
    assert all(titled for _, titled in page.images)
    tables = [i for i, (tag, _) in enumerate(page.tags) if tag == "table"]
    assert all(any(t > at for t in tables) for at, _ in page.images)


def test_twin_and_page_say_the_same(built, tmp_path):
    twin, html = built
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == twin
    assert twin["schema"] == 4
    text = body_text(html)
    for variant in twin["variants"]:
        held_out = variant["benchmark"]["fidelity"]["held_out"]
        for shown in (number(held_out["kl_mean"]), percent(held_out["top1"]), *variant["headline"]):
            assert shown in text
        for c in variant["comparisons"]:
            show = points if c["unit"] == "share" else signed
            assert f"{show(c['difference'])} [{show(c['ci_low'])}, {show(c['ci_high'])}]" in text
        for flag in variant["flags"]:
            assert flag["text"] in text
    for task in twin["teacher"]["benchmark"]["tasks"]:
        assert percent(task["score"]) in text
        assert f"n={task['n']}" in text


def test_the_choice_of_layers_is_shown_with_what_each_variant_keeps(built, example, tmp_path):
    twin, html = built
    assert twin["layer_scores"]["layers"][0] == {"layer": 3, "score": 0.24, "se": 0.02, "round": 0}
    assert [v["layer_choice"] for v in twin["variants"]] == [None, "restore"]
    text = body_text(html)
    assert [v["mixer"] for v in twin["variants"]] == ["Mamba-2", "Mamba-1"]
    assert "filled = Mamba-2" in text and "filled = Mamba-1" in text
    assert "A student without attention starts from 1.75" in text and f"n={count(3456)} in 16 texts" in text
    section = html[html.index("Which layers keep their attention") :]
    first, eighth = (re.search(rf"<tr><td class=.num.>{rank}</td>.*?</tr>", section).group() for rank in (1, 8))
    assert first.count("<td>attention</td>") == 2 and "0.240 ± 0.039" in first
    assert eighth.count("<td>attention</td>") == 0
    raw = json.loads(example["lineage"].read_text())
    raw["stages"] = [s for s in raw["stages"] if s["stage"] != "layer_scores"]
    example["lineage"].write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "without")
    assert twin["layer_scores"] is None and "Which layers keep their attention" not in html


def test_rows_are_written_beside(built, tmp_path):
    rows = pd.read_csv(tmp_path / "out" / "rows.csv", keep_default_na=False)
    assert len(rows) == 3 * (481 + 64 + 32) + 2 * 8
    assert list(rows.columns[:4]) == ["run", "model", "benchmark", "item"]


def test_no_winner_in_bold_in_the_tables(built):
    for table in re.findall(r"<table.*?</table>", built[1], re.S):
        assert "<b>" not in table and "<strong>" not in table
    assert "not distinguishable (n=100, MDE=" in built[1]


def test_a_switched_off_stage_reads_not_run(built):
    twin, html = built
    assert [t["stage"] for t in twin["variants"][0]["training"] if not t["ran"]] == ["dpo"]
    assert html.count('<td class="name">dpo</td><td class="off" colspan="5">not run</td>') == 2


def speed_rows(html):
    """Cells of the table that tells how training ran."""
    table = re.search(r"<h3>How training ran</h3>.*?</table>", html, re.S).group()
    return [re.sub(r"<[^>]*>", "|", row).strip("|") for row in re.findall(r"<tr><th scope=.row.*?</tr>", table)]


def test_every_stage_that_trained_tells_its_speed_and_what_it_used(example, tmp_path):
    raw = json.loads(example["lineage"].read_text())
    used = {"tokens_per_second": 223660.4, "utilisation": 0.25, "peak_memory_bytes": 13578412032, "processes": 4}
    next(s for s in raw["stages"] if s["stage"] == "kl_distill")["summary"].update(used)
    example["lineage"].write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    half, quarter = twin["variants"]
    assert half["training"][1].items() >= used.items() and half["draft"]["tokens"] == 60_000
    rows = [re.split(r"\|+", row) for row in speed_rows(html)]
    stages = [["align", "kl_distill", "sft", "draft"], ["align", "kl_distill", "sft"]]
    assert [row[:2] for row in rows] == [
        [v["name"], stage] for v, own in zip(twin["variants"], stages, strict=True) for stage in own
    ]
    expected = [count(250_000), "10\u202fmin 25\u202fs", count(223_660), percent(0.25), "12.6\u202fGiB", "4"]
    assert rows[1][2:8] == expected
    assert rows[0][4:8] == ["412", "—", "—", "1"]  # on a CPU
    assert not quarter["draft"]["ran"]
    assert html.count("model-FLOP utilisation (2204.02311, appendix B) = FLOPs per token × tokens per second /") == 1


def test_summaries_without_those_figures_show_dashes_and_no_training_says_so(example, tmp_path):
    raw = json.loads(example["lineage"].read_text())
    for stage in raw["stages"]:
        stage["summary"].pop("processes", None)
    example["lineage"].write_text(json.dumps(raw))
    assert speed_rows(build(example, tmp_path / "old")[1])[0].split("|")[-5] == "—"
    raw["stages"] = [s for s in raw["stages"] if s["stage"] not in ("align", "kl_distill", "sft", "draft")]
    example["lineage"].write_text(json.dumps(raw))
    assert "Training: not run." in body_text(build(example, tmp_path / "none")[1])


def test_every_text_has_its_table_of_fidelity(built):
    twin, html = built
    own = twin["variants"][1]["benchmark"]["fidelity"]["held_out_text"]
    text = body_text(html)
    titles = [f"Fidelity on {name}" for name in TEXTS.values()]
    assert [text.count(title) for title in titles] == [1, 1, 1]
    section = text[text.index(titles[1]) : text.index(titles[2])]
    assert number(own["kl_mean"]) in section and f"{count(own['tokens'])} tokens, 24 documents" in section


def test_a_student_that_continues_another_says_so(example, tmp_path):
    raw = json.loads(example["lineage"].read_text())
    raw["config"]["variants"]["quarter"] |= {"from": "half", "from_stage": "kl_distill"}
    for stage in raw["stages"]:
        if stage["variant"] == "quarter" and stage["stage"] == "align":
            stage |= {"hit": None, "config": {"steps": 7}}
    example["lineage"].write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    assert [v["continues"] for v in twin["variants"]] == [None, {"variant": "half", "stage": "kl_distill"}]
    assert "attention in 7 of 30 layers, continues half after kl_distill" in body_text(html)
    # A stage that one variant does not run is one difference, not one for each of its settings.
    assert twin["differences"] == [
        {"leaf": "align", "values": {"half": "on", "quarter": "off"}},
        {"leaf": "kl_distill.steps", "values": {"half": 60, "quarter": 90}},
        {"leaf": "draft", "values": {"half": "on", "quarter": "off"}},
    ]


@pytest.mark.parametrize(
    "missing",
    [
        ["benchmark_teacher"],
        ["half.benchmark"],
        ["half.speculative_profile"],
        ["half.speculative_profile", "quarter.speculative_profile"],
        ["benchmark_teacher", "half.benchmark", "quarter.benchmark"],
    ],
)
def test_missing_stages_are_shown_as_not_run(example, tmp_path, missing):
    _, html = build({k: v for k, v in example.items() if k not in missing}, tmp_path / "out")
    page = Page(html)
    assert set(page.ids) >= SECTIONS
    assert "not run" in html


def test_the_barest_lineage_gives_a_page(tmp_path):
    path = tmp_path / "lineage.json"
    path.write_text("{}")
    twin, html = build({"lineage": path}, tmp_path / "out")
    assert set(Page(html).ids) >= SECTIONS
    assert [f["level"] for f in twin["flags"]] == ["serious", "serious", "caution"]


def test_nothing_found_anywhere_gives_a_page(example, tmp_path):
    """A model that has learnt nothing: no needle, no right answer, no pair won, an endless loss."""
    for role in ("benchmark_teacher", "half.benchmark", "quarter.benchmark"):
        path = example[role] / "summary.json"
        raw = json.loads(path.read_text())
        raw["needle"]["cells"] = [cell | {"k": 0} for cell in raw["needle"]["cells"]]
        raw["needle"]["effective_length"] = None
        for task in raw["tasks"].values():
            task |= dict.fromkeys(task.keys() & {"acc", "acc_norm"}, 0.0)
        for entry in (*raw["length"]["curve"], *raw["length"]["last"]):
            entry |= {"nll": 11.0, "se": None, "documents": 1}
        raw["judge"].pop("pairwise", None)
        path.write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    assert {cell["ci_low"] for cell in twin["teacher"]["benchmark"]["needle"]["cells"]} == {0.0}
    assert set(Page(html).ids) >= SECTIONS
    assert re.findall(r".{20}\b(?:nan|None|inf|undefined)\b.{20}", body_text(html)) == []


def test_files_with_holes_give_a_page(example, tmp_path):
    """Summaries with nothing but their names, comparison and samples left out, a loss that is not a number."""
    for name in ("half", "quarter"):
        folder = example[f"{name}.benchmark"]
        (folder / "summary.json").write_text(json.dumps({"model": name}))
        for file in ("comparison.json", "samples.jsonl", "rows.parquet"):
            (folder / file).unlink()
        (example[f"{name}.speculative_profile"] / "profile.json").write_text("{}")
    raw = json.loads(example["lineage"].read_text())
    for stage in raw["stages"]:
        curve = stage["summary"].get("curve")
        stage["summary"] = (
            {"steps": 3, "loss_last": float("nan"), "curve": [[1, float("nan")], *curve[:2]]} if curve else {}
        )
    example["lineage"].write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    assert set(Page(html).ids) >= SECTIONS
    assert "ended without a finite loss" in html
    assert re.findall(r".{20}\b(?:nan|None|inf|undefined)\b.{20}", body_text(html)) == []
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)


def test_same_inputs_same_bytes(example, tmp_path):
    for out in ("a", "b"):
        build(dict(reversed(example.items())) if out == "b" else example, tmp_path / out)
    for name in ("report.html", "report.json", "rows.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_four_variants_stay_far_below_a_megabyte(example, tmp_path):
    raw = json.loads(example["lineage"].read_text())
    for copy, original in (("half2", "half"), ("quarter2", "quarter")):
        raw["config"]["variants"][copy] = {}
        raw["stages"] += [s | {"variant": copy} for s in raw["stages"] if s["variant"] == original]
        for stage in ("benchmark", "speculative_profile"):
            example[f"{copy}.{stage}"] = example[f"{original}.{stage}"]
    for stage in raw["stages"]:
        if "curve" in stage["summary"]:
            stage["summary"]["curve"] = [[i, 1 / (i + 1)] for i in range(20_000)]
    example["lineage"].write_text(json.dumps(raw))
    for role in ("benchmark_teacher", "half.benchmark", "quarter.benchmark"):
        lines = [json.dumps({"prompt": f"prompt {i}", "response": "word " * 20_000}) for i in range(6)]
        (example[role] / "samples.jsonl").write_text("\n".join(lines))
    twin, html = build(example, tmp_path / "out")
    assert len(twin["variants"]) == 4
    assert len(html.encode()) < 1_000_000


def test_long_answers_are_cut_and_say_so(example, tmp_path):
    line = json.dumps({"prompt": "p", "response": "x" * (SAMPLE_CHARACTERS + 1)})
    (example["benchmark_teacher"] / "samples.jsonl").write_text(line + "\n")
    twin, html = build(example, tmp_path / "out", samples=1)
    assert len(twin["samples"]) == 1
    assert len(twin["samples"][0]["responses"][0]["text"]) == SAMPLE_CHARACTERS
    assert "… cut here" in html


def test_the_teacher_s_words_are_marked_in_a_student_s_answer(built):
    assert '<span class="same">The capital of France is Paris</span>, a city on the Seine.' in built[1]


def test_thin_keeps_ends():
    curve = [[i, 0.0] for i in range(1001)]
    kept = thin(curve)
    assert kept[0] == [0, 0.0] and kept[-1] == [1000, 0.0]
    assert len(kept) <= 121
    assert thin([]) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("wheel:a==1!a/SmolLM2.Q4_1.gguf#sha256=ab", "SmolLM2.Q4_1"),
        ("hf:org/name@main", "org/name"),
        ("file:/some/folder/llama-1b", "llama-1b"),
        ("", "teacher"),
    ],
)
def test_teacher_name(source, expected):
    assert teacher_name({"config": {"teacher": {"source": source}}}) == expected


def test_speculation_shows_every_draft_with_what_was_predicted(built):
    twin, html = built
    text = body_text(html)
    half = twin["variants"][0]["speculation"]
    assert [g["draft"] for g in half["groups"]] == ["ngram", "layers:[0, 14, 29]"]
    for title in ("Acceptance by position", "Tokens gained per verification", "against plain greedy decoding, batch 1"):
        assert title in text
    assert "half, layers:[0, 14, 29], predicted" in text
    row = half["groups"][1]["rows"][2]
    for shown in (row["speedup"], row["predicted_speedup"], row["steady_speedup"]):
        assert f"{shown:.2f}×" in text
    for phase in ("draft", "verify", "round"):
        assert number(row["milliseconds"][phase]) in text
    assert "8 exact" in text and "near-tie" not in text
    assert "KL to the student 7.31 → 0.770 nats per token" in text
    assert half["draft"]["kind"] == "layers:[0, 14, 29]" and twin["variants"][1]["speculation"]["draft"] is None
    assert "SYNTHETIC" not in text


def test_injected_acceptance_is_labelled_wherever_it_shows(example, tmp_path):
    path = example["half.speculative_profile"] / "profile.json"
    raw = json.loads(path.read_text()) | {"synthetic": True, "injected_acceptance": 0.7}
    for group in raw["groups"]:
        for row in group["rows"]:
            row |= {"identity": None, "identical_to_greedy": None}
    path.write_text(json.dumps(raw))
    twin, html = build(example, tmp_path / "out")
    assert twin["variants"][0]["speculation"]["synthetic"] is True
    assert body_text(html).count("SYNTHETIC") >= 5  # headline, flag, label, and each of its two tables


def test_means_over_tasks_stand_in_the_verdict_and_in_a_table(built):
    twin, page = built
    (mean,) = twin["variants"][0]["means"]
    assert mean["family"] == "offline" and mean["tasks"] == ["mmlu_dev", "hellaswag_100", "truthfulqa_mc1_100"]
    text = body_text(page)
    assert f"Mean over 3 offline tasks: {points(mean['difference'])} points" in text
    assert text.count(percent(mean["retention"])) >= 2 and "without logiqa, squad, ifeval" in text
