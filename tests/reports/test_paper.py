import pytest

from evals.comparison import PRIMARY
from evals.tasks import TASKS
from reports import paper


@pytest.mark.parametrize(
    ("benchmark", "metric", "text", "note"),
    [
        ("held_out", "ppl_ratio", "1.03 → 1.09 → 1.22 → 1.66", "table 6"),
        ("mmlu", "acc", "60.43 → 53.12", "Llama-3.2-3B → Mamba2 50 %, table 3"),
        ("mmlu_dev", "acc", "60.43 → 53.12", "table 3; the dev split here"),
        ("gsm8k", "acc", "78.47 → 59.36 → 38.13", "table 4"),
        ("mmlu_5", "acc", "— → 56.67 → 53.94", "table 4"),
        ("mt_bench", "mean", "8 → 7.6", "judged by GPT-4, table 2"),
        ("speculation", "speedup", "1.81", "RTX 3090, table 5"),
    ],
)
def test_published_figures(benchmark, metric, text, note):
    found = paper.beside(benchmark, metric)
    assert found["text"] == text and note in found["note"]


@pytest.mark.parametrize(("benchmark", "metric"), [("squad", "f1"), ("hellaswag", "acc"), ("held_out", "kl"), ("", "")])
def test_nothing_stands_beside_what_the_paper_has_not(benchmark, metric):
    assert paper.beside(benchmark, metric) is None


def test_tables_are_whole_and_speak_of_benchmarks_that_exist():
    known = {*TASKS, *PRIMARY, "speculation"}
    tables = paper.tables(known)
    assert [t["number"] for t in tables] == ["1", "2", "3", "4", "5", "6", "7"]
    for table in tables:
        models = [row["model"] for row in table["rows"]]
        assert len(set(models)) == len(models) and set(table["shown"]) <= set(models)
        assert all(len(row["values"]) == len(table["columns"]) for row in table["rows"])
        for column in table["columns"]:
            assert {column.get("benchmark", "mmlu"), *column.get("also", {})} <= known


def test_the_paper_has_a_table_for_every_task_that_says_so():
    for task in TASKS.values():
        if task.paper:
            assert f"table {paper.tables([task.name])[0]['number']}" == task.paper
            assert any(paper.beside(task.name, metric) for metric in task.metrics)
