from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_helpers import compute, damage, payload

from stage_store import Checkpoints, Store, StoreError, stage_key

KEY = stage_key(payload())
CKPT = f"align/{KEY}/ckpt"


@pytest.fixture
def checkpoints(store) -> Checkpoints:
    return Checkpoints(store, "align", KEY)


def writes(text: str):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)
        (folder / "random").write_text(f"state {text}")

    return write


def steps(store) -> set[str]:
    return {path.split("/")[0] for path in store.backend.walk(CKPT)}


def test_none_at_first(checkpoints):
    assert checkpoints.latest() is None


def test_newest_is_returned_and_two_are_kept(store, checkpoints, other_machine):
    for step in (10, 20, 30):
        checkpoints.save(step, writes(str(step)))
    assert steps(store) == {"step-00000020", "step-00000030"}
    for machine in (store, other_machine()):
        step, folder = Checkpoints(machine, "align", KEY).latest()
        assert step == 30
        assert (folder / "model" / "weights").read_text() == "30"
        assert (folder / "random").read_text() == "state 30"


def test_work_outlives_checkpoints_and_ends_with_them(store, checkpoints):
    kept = checkpoints.work() / "costly"
    kept.write_text("kept")
    for step in (10, 20, 30):
        checkpoints.save(step, writes(str(step)))
    assert (Checkpoints(store, "align", KEY).work() / "costly").read_text() == "kept"
    assert checkpoints.latest()[0] == 30
    checkpoints.clear()
    assert checkpoints.latest() is None and not kept.exists()


@pytest.mark.parametrize(
    ("broken", "data"),
    [
        ("model/weights", None),
        ("model/weights", b"3"),
        ("random", b"state 31"),
        ("meta.json", None),
        ("meta.json", b'{"step": 30, "fil'),
        ("meta.json", b'{"step": 31, "files": []}'),
    ],
    ids=["missing", "truncated", "flipped", "no meta", "truncated meta", "meta of another step"],
)
def test_broken_newest_is_skipped_and_removed(store, checkpoints, other_machine, broken, data, caplog):
    checkpoints.save(20, writes("20"))
    checkpoints.save(30, writes("30"))
    damage(store, f"{CKPT}/step-00000030/{broken}", data)
    machine = other_machine()
    step, folder = Checkpoints(machine, "align", KEY).latest()
    assert step == 20
    assert (folder / "model" / "weights").read_text() == "20"
    if not (store.backend.remote and broken == "meta.json" and data is None):  # an upload that never ended is not named
        assert "step-00000030" in caplog.text
        assert steps(store) == {"step-00000020"}


def test_all_broken_is_a_fresh_start(store, checkpoints, other_machine):
    checkpoints.save(10, writes("10"))
    damage(store, f"{CKPT}/step-00000010/random", b"x")
    assert Checkpoints(other_machine(), "align", KEY).latest() is None


def test_machine_with_the_newest_needs_no_download(s3_url):
    store = Store(s3_url)
    checkpoints = Checkpoints(store, "align", KEY)
    checkpoints.save(10, writes("10"))
    damage(store, f"{CKPT}/step-00000010/random", b"x")
    assert checkpoints.latest()[0] == 10


def test_same_step_again_replaces(checkpoints, other_machine):
    checkpoints.save(10, writes("one"))
    checkpoints.save(10, writes("two"))
    for machine in (checkpoints, Checkpoints(other_machine(), "align", KEY)):
        assert (machine.latest()[1] / "model" / "weights").read_text() == "two"


def test_later_steps_of_an_abandoned_history_go(store, checkpoints):
    checkpoints.save(80, writes("old"))
    checkpoints.save(90, writes("old"))
    checkpoints.save(10, writes("new"))
    assert steps(store) == {"step-00000010"}
    assert checkpoints.latest()[0] == 10


def test_failed_write_keeps_the_previous_and_leaves_nothing(store, checkpoints):
    checkpoints.save(10, writes("10"))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoints.save(20, fail)
    assert checkpoints.latest()[0] == 10
    assert not list(store.backend.workspace(CKPT).glob(".draft*"))


def test_full_disk_is_one_clear_line_and_keeps_the_previous(checkpoints):
    checkpoints.save(10, writes("10"))

    def full(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"w")

    with pytest.raises(StoreError, match="no space left"):
        checkpoints.save(20, full)
    assert checkpoints.latest()[0] == 10


def test_name_of_the_stores_own_file_is_refused(checkpoints):
    with pytest.raises(StoreError, match=r"meta\.json is written by the store"):
        checkpoints.save(10, lambda folder: (folder / "meta.json").write_text("{}") and None)


KILLED = """
import os, signal, sys
from pathlib import Path
from stage_store import Checkpoints, Store
checkpoints = Checkpoints(Store(sys.argv[1]), "align", sys.argv[2])
checkpoints.save(10, lambda folder: (folder / "random").write_text("10"))
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "while writing":
    checkpoints.save(20, lambda folder: ((folder / "random").write_text("2"), die()))
elif sys.argv[3] == "before the rename":
    Path.rename = die
elif sys.argv[3] == "before the upload":
    checkpoints._backend.upload = die
checkpoints.save(20, lambda folder: (folder / "random").write_text("20"))
"""


def check_kill(url: str, machine: Store, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run([sys.executable, "-c", KILLED, url, KEY, moment], env=environment)
    assert process.returncode == -9
    checkpoints = Checkpoints(machine, "align", KEY)
    step, folder = checkpoints.latest()
    assert (step, (folder / "random").read_text()) == (10, "10")
    checkpoints.save(20, writes("20"))
    assert checkpoints.latest()[0] == 20


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_killed_while_saving_continues_from_a_whole_checkpoint(url, other_machine, moment):
    check_kill(url, other_machine(), moment)


def test_killed_before_the_upload_continues_elsewhere_from_the_one_uploaded(s3_url, tmp_path):
    check_kill(s3_url, Store(s3_url, cache=tmp_path / "other"), "before the upload")


def test_machines_continue_each_others_checkpoints(s3_url, tmp_path):
    one, two = (Checkpoints(Store(s3_url, cache=tmp_path / name), "align", KEY) for name in "ab")
    one.save(10, writes("10"))
    two.save(20, writes("20"))
    step, folder = one.latest()
    assert (step, (folder / "random").read_text()) == (20, "state 20")
    (folder / "random").write_text("state xx")
    assert (one.latest()[1] / "random").read_text() == "state 20"


def test_stage_continues_from_its_checkpoint_and_drops_it_when_done(store, other_machine):
    def crash(out: Path, checkpoints: Checkpoints) -> dict[str, object]:
        checkpoints.save(10, writes("10"))
        raise ZeroDivisionError

    def finish(out: Path, checkpoints: Checkpoints) -> dict[str, object]:
        step, folder = checkpoints.latest()
        (out / "weights").write_text((folder / "model" / "weights").read_text())
        return {"summary": {"from": step}}

    with pytest.raises(ZeroDivisionError):
        compute(store, work=crash)
    machine = other_machine()
    ref, _ = compute(machine, work=finish)
    assert machine.manifest(ref).meta["summary"] == {"from": 10}
    assert not machine.backend.walk(CKPT)
    assert not machine.backend.workspace(CKPT).exists()


def test_forced_stage_starts_without_the_old_checkpoint(store):
    with pytest.raises(ZeroDivisionError):
        compute(store, work=lambda out, checkpoints: (checkpoints.save(10, writes("10")), 1 / 0))
    found = []
    compute(store, work=lambda out, checkpoints: found.append(checkpoints.latest()) or {}, force=True)
    assert found == [None]
