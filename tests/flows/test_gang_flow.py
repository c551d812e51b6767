"""Two nodes on one machine: what Metaflow's local `@parallel` gives, with real processes and fake stages."""

import os
import sys
from pathlib import Path

import pytest
from test_distill_flow import plan_of

from steps.gang import Seat, _meeting


@pytest.fixture
def trained(project):
    """A project whose training stages ran on two nodes, and what was said."""
    said = call(project, "gang_flow.py", "run", "--nodes", "2")
    return project, said


def call(project, flow, *arguments):
    project.command = lambda *words: [sys.executable, str(project.root / "flows" / flow), *words]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # Metaflow calls nodes `python`
    code, said = project.call(*arguments, PATH=path, MAMBALLAMA_LIVE_CARDS="0")
    assert code == 0, said
    return said


def test_nodes_make_the_students_together_and_the_flow_reuses_them(trained):
    project, _ = trained
    ran = project.executed()
    assert sorted(ran) == sorted(["teacher", "corpus", "init_from_attention", *2 * ["kl_distill", "dpo"]])
    said = call(project, "distill_flow.py", "run")
    reused = {label for label, state in plan_of(said).items() if state == "reuse"}
    assert reused == {"teacher", "corpus", "half/init_from_attention", "half/kl_distill", "half/dpo"}
    assert set(project.executed()[len(ran) :]) == {"benchmark"}


def test_stages_side_by_side_meet_at_ports_of_their_own():
    meetings = [_meeting(key * 64, Seat(1, 2, "10.0.0.7")) for key in "0f"]
    assert [set(m[:3]) for m in meetings] == 2 * [{"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.7"}]
    assert meetings[0][3] != meetings[1][3]
    assert _meeting("0" * 64, Seat()) == ["--standalone"]
