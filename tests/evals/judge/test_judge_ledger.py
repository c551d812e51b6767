import inspect
import json
import signal
import subprocess
import sys
import time

import pytest

from evals.judge.ledger import Ledger

# By its file: the package around it imports torch, which takes seconds.
WRITER = """
import runpy, sys
from pathlib import Path
ledger = runpy.run_path(sys.argv[1])["Ledger"](Path(sys.argv[2]))
for number in range(10**6):
    ledger.add(str(number), "x" * 100)
"""


def test_what_was_added_is_there_the_next_time(tmp_path):
    with Ledger(tmp_path / "folder" / "l.jsonl") as ledger:
        ledger.add("a", "Zeile\n\u2028 zwei")
        ledger.add("b", [1, {"p": -0.5}])
        ledger.add("a", "again")
        assert ledger.found == {"a": "again", "b": [1, {"p": -0.5}]}
    assert Ledger(tmp_path / "folder" / "l.jsonl").found == {"a": "again", "b": [1, {"p": -0.5}]}


def test_half_a_line_is_cut_off_so_that_the_next_one_stands_alone(tmp_path):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as ledger:
        ledger.add("a", 1)
    path.write_bytes(path.read_bytes() + b'{"key": "b", "val')
    with Ledger(path) as ledger:
        assert ledger.found == {"a": 1}
        ledger.add("c", 3)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"key": "a", "value": 1}\nnonsense\n{"key": "b", "value": 2}\n')
    with pytest.raises(ValueError, match="line 2 is broken"):
        Ledger(path)


def test_a_killed_process_leaves_all_that_it_had_added(tmp_path):
    path = tmp_path / "l.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, inspect.getfile(Ledger), str(path)])
    try:
        while not path.exists() or path.stat().st_size < 2000:
            assert writer.poll() is None
            time.sleep(0.02)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    found = Ledger(path).found
    assert list(found) == [str(number) for number in range(len(found))]
    assert len(found) >= 15
