from __future__ import annotations

import json

import pytest

from hybrid.bench import memory


def test_every_step_writes_weights_and_says_what_it_held(tmp_path):
    for step in ("teacher", *memory.STEPS):
        found = memory._measured(step, "tiny-llama", tmp_path)
        assert found["written"] > 50_000 and found["peak"] >= 0, step


@pytest.mark.parametrize(("peak", "code"), [(130, 0), (131, 1)])
def test_the_limit_decides_the_exit_code(monkeypatch, capsys, peak, code):
    monkeypatch.setattr(memory, "_in_own_process", lambda *_: {"peak": peak * 10**7, "written": 100 * 10**7})
    assert memory.main(["--shape", "tiny"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", *memory.STEPS]
    assert lines[1].split()[1:] == ["1.00", f"{peak / 100:.2f}", f"{peak / 100:.2f}"]


def test_a_step_answers_with_one_line_of_json(tmp_path, capsys):
    assert memory.main(["--shape", "tiny", "--step", "teacher", "--folder", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"peak", "written"}
