"""Reading MT-Bench's and AlpacaEval's files, by small ones of the same form."""

import json

import pytest

from evals.judge import data
from evals.judge.data import Prompt


@pytest.fixture
def files(tmp_path, monkeypatch):
    def lines(name: str, records: list[dict]) -> None:
        (tmp_path / name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
        monkeypatch.setattr(data, name.upper(), f"file:{tmp_path / name}")

    lines(
        "questions",
        [{"question_id": 81 + i, "category": "writing", "turns": [f"Say\u2028{i}", "Why?"]} for i in range(4)]
        + [{"question_id": 101, "category": "reasoning", "turns": ["Who?", "And then?"], "reference": ["old", "old"]}],
    )
    lines("references", [{"question_id": 101, "model_id": "g", "choices": [{"index": 0, "turns": ["She.", "He."]}]}])
    lines("judge_prompts", [{"name": "single-v1", "system_prompt": "Be fair.\n\n", "prompt_template": "{question}?"}])
    text = '<|im_start|>system\nYou judge.\n<|im_end|>\n<|im_start|>user\n{\n "{instruction}"\n}\n\n## Best\n<|im_end|>'
    (tmp_path / "alpaca_prompt").write_text(text)
    monkeypatch.setattr(data, "ALPACA_PROMPT", f"file:{tmp_path / 'alpaca_prompt'}")


def test_questions_come_with_the_corrected_references(files):
    found = data.questions(0, 0)
    assert [q.id for q in found] == ["81", "82", "83", "84", "101"]
    assert found[0] == data.Question("81", "writing", ("Say\u20280", "Why?"), None)
    assert found[-1].references == ("She.", "He.")


def test_a_subset_is_drawn_by_the_seed_and_keeps_the_order(files):
    draws = {tuple(q.id for q in data.questions(3, seed)) for seed in range(8)}
    assert len(draws) > 1
    assert all(list(d) == sorted(d, key=int) and len(d) == 3 for d in draws)
    assert data.questions(3, 1) == data.questions(3, 1)
    assert len(data.questions(9, 0)) == 5


def test_prompts_become_messages(files):
    said = data.judge_prompts()["single-v1"].messages(question="Who is {answer}", answer="nobody")
    assert said == [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Who is {answer}?"}]
    assert Prompt("", "x").messages() == [{"role": "user", "content": "x"}]
    system, user = data.alpaca_prompt().messages(instruction="{output_1}")
    assert system == {"role": "system", "content": "You judge."}
    assert user["content"] == '{\n "{output_1}"\n}\n\n## Best'


@pytest.mark.parametrize("whole", [True, False])
def test_alpacas_records_are_json_or_lines(tmp_path, whole):
    records = [{"instruction": f"say {i}", "output": "x", "dataset": "d"} for i in range(3)]
    (tmp_path / "a").write_text(json.dumps(records) if whole else "\n".join(map(json.dumps, records)))
    found = data.instructions(f"file:{tmp_path / 'a'}", 0, 0)
    assert [(i.id, i.text, i.output) for i in found] == [(f"000{i}", f"say {i}", "x") for i in range(3)]
