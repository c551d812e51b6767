import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import Project

STAGES_OF_HALF = ["init_from_attention", "kl_distill", "dpo"]


def plan_of(said):
    """Stage label → state, as the start step printed it."""
    lines = [line.partition("] ")[2].split() for line in said.splitlines() if "/start/" in line]
    return {words[0]: words[1] for words in lines if len(words) > 1 and words[1] in ("run", "reuse", "off")}


def ask(project, expression):
    """A value of Metaflow's client, asked where the project keeps its runs."""
    program = f"import json, metaflow; metaflow.namespace(None); print(json.dumps({expression}))"
    environment = project.environment | {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(project.root), "METAFLOW_USER": "test"}
    return json.loads(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True))


def test_a_first_run_runs_every_stage_and_makes_the_report(finished):
    project, said = finished
    plan = plan_of(said)
    assert list(plan) == [
        *("teacher", "corpus", "layer_scores", "benchmark_teacher", "half/init_from_attention", "half/align"),
        *("half/kl_distill", "half/sft", "half/dpo", "half/draft", "half/benchmark", "half/speculative_profile"),
    ]
    off = {"layer_scores", "half/align", "half/sft", "half/draft", "half/speculative_profile"}
    assert {label for label, state in plan.items() if state == "off"} == off
    assert project.executed() == ["teacher", "corpus", "benchmark", *STAGES_OF_HALF, "benchmark"]
    (page,) = (project.root / "reports" / "out").glob("*/report.html")
    assert f"report: {page}" in said
    assert re.findall("<li>(.*?)</li>", page.read_text()) == ["benchmark_teacher", "half.benchmark", "lineage"]


def test_progress_is_shown_in_the_terminal(finished):
    assert "half/kl_distill: 2/2 steps  1 steps/s  0 s left  loss 0.5" in finished[1]


def test_runs_are_kept_in_the_project_and_not_in_a_stray_folder(finished):
    project, _ = finished
    assert (project.root / ".metaflow" / "DistillFlow").is_dir()
    assert not list((project.home / ".metaflow").iterdir())


def test_the_report_is_a_card_and_progress_another(finished):
    project, _ = finished
    (page,) = (project.root / "reports" / "out").glob("*/report.html")
    cards = ask(
        project,
        "{s: [c.get() for c in metaflow.cards.get_cards(metaflow.Flow('DistillFlow').latest_run[s].task)]"
        " for s in ('report', 'kl_distill')}",
    )
    assert cards["report"] == [page.read_text()]
    assert len(cards["kl_distill"]) == 1 and "Error Card" not in cards["kl_distill"][0]
    drawn = {path.name for path in (project.root / ".metaflow" / "mf.cards").glob("DistillFlow/runs/*/steps/*")}
    assert drawn == {"corpus", "benchmark_teacher", "kl_distill", "dpo", "benchmark", "report"}  # not what is off


def test_steps_declare_the_resources_of_the_configuration(finished):
    found = ask(
        finished[0],
        "{name: {d['name']: d['attributes'] for d in node['decorators']}.get('resources') for name, node in"
        " metaflow.Flow('DistillFlow').latest_run['start'].task['_graph_info'].data['steps'].items()}",
    )
    wanted = {"gpu": 2, "cpu": 3, "memory": 12345}
    assert {name: int(found["kl_distill"][name]) for name in wanted} == wanted
    assert {name: int(found["dpo"][name]) for name in wanted} == {"gpu": 0, "cpu": 2, "memory": 8192}


def test_a_second_variant_joins_and_only_its_stages_run(again):
    changes = ["--set", 'variants.none.attention="0"', "--set", "variants.none.from=half"]
    changes += ["--set", "speculative_profile.enabled=true"]
    changes += ["--set", "draft.kind=layers:[0, 1]"]
    code, said = again.call("run", *changes, MAMBALLAMA_LIVE_CARDS="0")
    assert code == 0, said
    new = {f"none/{stage}" for stage in (*STAGES_OF_HALF, "benchmark", "draft", "speculative_profile")}
    new |= {"half/draft", "half/speculative_profile"}
    assert {label for label, state in plan_of(said).items() if state == "run"} == new
    assert sorted(again.executed()) == sorted([*STAGES_OF_HALF, "benchmark", *2 * ["draft", "speculative_profile"]])
    first = {name: again.executed().index(name) for name in ("draft", "speculative_profile")}
    assert first["draft"] < first["speculative_profile"]
    page = max((again.root / "reports" / "out").glob("*/report.html"), key=lambda path: path.stat().st_mtime)
    assert "<li>half.benchmark</li>" in page.read_text() and "<li>none.benchmark</li>" in page.read_text()


def test_the_code_package_runs_elsewhere_and_an_identical_run_executes_nothing(again, tmp_path):
    """Same keys from another folder, another current folder and without the checkout on the path."""
    code, said = again.call("package", "save", str(tmp_path / "code.tgz"))
    assert code == 0, said
    elsewhere = Project(tmp_path / "other machine", tmp_path)
    with tarfile.open(tmp_path / "code.tgz") as archive:
        archive.extractall(elsewhere.root, filter="data")
    for name in ("teacher.txt", "talk.jsonl"):
        (elsewhere.root / name).write_bytes((again.root / name).read_bytes())
    store = again.root / ".mamballama"
    again.root.rename(again.root.with_name("gone"))
    done = subprocess.run(
        [sys.executable, str(elsewhere.root / "distill_flow.py"), "run"],
        cwd=tmp_path,
        env=elsewhere.environment
        | {
            "MAMBALLAMA_STORE": str(again.root.with_name("gone") / store.name / "store"),
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path),
            "PYTHONPATH": str(elsewhere.root / ".mf_code"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert set(plan_of(done.stdout).values()) == {"reuse", "off"}
    assert elsewhere.executed() == []
    assert list((elsewhere.root / "reports" / "out").glob("*/report.html"))


def test_a_failure_is_one_line_and_resume_goes_on_from_it(again):
    code, said = again.call("run", "--set", "kl_distill.steps=5", FAKE_FAIL="kl_distill", MAMBALLAMA_LIVE_CARDS="0")
    assert code != 0
    assert "half/kl_distill: FakeError: the loss is NaN at step 5" in said
    assert "Traceback" not in said
    assert again.executed() == ["kl_distill"]
    again.log.unlink()
    code, said = again.call("resume", MAMBALLAMA_LIVE_CARDS="0")
    assert code == 0, said
    assert again.executed() == ["kl_distill", "dpo", "benchmark"]
    assert ask(again, "metaflow.Flow('DistillFlow').latest_run['corpus'].task.origin_pathspec")  # not even looked up


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_nothing_is_left_running_when_the_scheduler_is_killed(again, how):
    environment = again.environment | {"FAKE_HANG": "corpus", "MAMBALLAMA_LIVE_CARDS": "0"}
    command = again.command("run", "--set", "corpus.max_tokens=1")
    with open(again.home / "said", "w") as said:
        scheduler = subprocess.Popen(command, cwd=again.home, env=environment, stdout=said, stderr=said)
    task = int(_wait_for(again.log.with_suffix(".hanging").read_text, scheduler))
    assert _alive(task)
    scheduler.send_signal(how)
    assert scheduler.wait(30) != 0
    _wait_for(lambda: not _alive(task) or None, None)
    store = again.root / ".mamballama" / "store" / "corpus"
    assert len(list(store.glob("*/MANIFEST.json"))) == 1  # the finished one of before; the interrupted one is not there


def test_set_errors_stop_before_anything_runs(project):
    code, said = project.call("run", "--set", "dpo.bta=1")
    assert code != 0
    assert said.startswith("configuration: --set: dpo.bta: unknown key (given 1); did you mean 'beta'?")
    assert said.count("\n") == 1
    assert not (project.root / ".metaflow").exists()


@pytest.mark.parametrize("command", ["run", "show"])
def test_a_wrong_file_is_one_line_through_metaflows_own_option(project, command):
    (project.home / "wrong file.toml").write_text("[dpo]\nbeta = 11\n")
    code, said = project.call("--config", "config", "wrong file.toml", command)
    assert code != 0
    assert re.search(r"dpo\.beta: given 11; input should be less than or equal to 10", said)
    assert "Traceback" not in said


def test_resume_with_changes_says_what_to_do_instead(project):
    code, said = project.call("resume", "--set", "dpo.beta=0.1")
    assert code != 0
    assert "use `run` with them instead: finished stages are reused from the store" in said


def test_a_missing_source_stops_at_the_plan(project):
    (project.root / "talk.jsonl").unlink()
    code, said = project.call("run", MAMBALLAMA_LIVE_CARDS="0")
    assert code != 0
    assert "plan: SourceError: file:talk.jsonl: there is no file" in said
    assert "Traceback" not in said
    assert project.executed() == []


def test_show_and_check_from_another_folder(project):
    code, said = project.call("show")
    assert code == 0 and "Fit every mixer to the attention that it replaces" in said
    code, said = project.call("--no-pylint", "check")
    assert code == 0 and "The graph looks good!" in said


def _alive(pid):
    """Whether a process runs; one that ended and was not yet asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(value, process):
    """What `value` returns as soon as it returns something; fails after a minute or when the process has ended."""
    for _ in range(600):
        try:
            if found := value():
                return found
        except FileNotFoundError:
            pass
        assert process is None or process.poll() is None
        time.sleep(0.1)
    raise AssertionError("waited for a minute")
