import json
import os

import pytest

from steps import command_line
from steps.command_line import CommandLineError
from steps.config import ConfigError

TOML = '[teacher]\nsource = "file:t"\n[corpus]\nsources = ["file:x"]\n[variants.half]\n'
STAGES = ("teacher", "dpo")


@pytest.fixture
def default(tmp_path):
    (tmp_path / "default.toml").write_text(TOML)
    return tmp_path / "default.toml"


def translate(default, *argv):
    return command_line.translate(argv, default, STAGES)


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "--max-workers", "1", "--force", "dpo"],
        ["show"],
        ["resume", "--origin-run-id", "3"],
        ["--quiet", "--local-config-file", "f", "--config-value", "config", "kv.config", "step", "align"],
    ],
)
def test_what_needs_no_translation_is_left_as_it_is(default, argv):
    assert translate(default, *argv) == argv


@pytest.mark.parametrize("argv", [["run", "--set", "dpo.beta=0.3"], ["--set=dpo.beta=0.3", "run"]])
def test_set_becomes_a_config_value_before_the_command(default, argv):
    option, name, value, *rest = translate(default, *argv)
    assert (option, name, rest) == ("--config-value", "config", ["run"])
    assert json.loads(value)["dpo"]["beta"] == 0.3


def test_several_sets_apply_in_order_to_the_given_file(default, tmp_path):
    (tmp_path / "other.toml").write_text(TOML + "[dpo]\nbeta = 0.7\n")
    argv = [
        "--config",
        "config",
        str(tmp_path / "other.toml"),
        "run",
        "--set",
        "seed=1",
        "--set",
        "seed=2",
        "--tag",
        "t",
    ]
    _, _, value, *rest = translate(default, *argv)
    assert (json.loads(value)["dpo"]["beta"], json.loads(value)["seed"]) == (0.7, 2)
    assert rest == ["run", "--tag", "t"]


def test_set_on_top_of_a_config_value(default):
    _, _, value, *rest = translate(
        default, "--config-value", "config", "seed = 5\n" + TOML, "run", "--set", "dpo.steps=2"
    )
    assert json.loads(value)["dpo"]["steps"] == 2
    assert rest == ["run"]


@pytest.mark.parametrize(
    ("argv", "error", "said"),
    [
        (["run", "--set", "dpo.bta=1"], ConfigError, "--set: dpo.bta: unknown key"),
        (["--config", "config", "nowhere.toml", "run"], ConfigError, "nowhere.toml: cannot be read"),
        (["--config-value", "config", "[dpo", "run"], ConfigError, "--config-value: not valid TOML"),
        (["--config", "cfg", "a.toml", "run"], CommandLineError, "--config: given 'cfg'"),
        (["--config", "config", "a", "--config", "config", "b", "run"], CommandLineError, "once, not 2"),
        (["run", "--set"], CommandLineError, "--set needs 1 value after it"),
        (["run", "--force", "dpoo"], CommandLineError, "--force: given 'dpoo'; allowed: teacher, dpo"),
        (["resume", "--set", "dpo.beta=1"], CommandLineError, "use `run` with them instead"),
        (["--config", "config", "a.toml", "resume"], CommandLineError, "use `run` with them instead"),
        (["resume", "--force", "dpo"], CommandLineError, "use `run` with them instead"),
    ],
)
def test_what_cannot_work_is_refused(default, argv, error, said):
    with pytest.raises(error) as caught:
        translate(default, *argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "user"),
    [({"USER": "root"}, "mamballama"), ({}, "mamballama"), ({"USER": "eva"}, None), ({"METAFLOW_USER": "ci"}, "ci")],
)
def test_metaflow_gets_a_user_where_it_would_refuse_to_run(monkeypatch, tmp_path, given, user):
    for name in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # so that what the function sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METAFLOW_DATASTORE_SYSROOT_LOCAL", "set before")
    command_line.complete_environment(tmp_path, checkout=True)
    assert os.environ.get("METAFLOW_USER") == user
    assert os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] == "set before"


@pytest.mark.parametrize("checkout", [True, False])
def test_metaflow_keeps_its_data_in_the_checkout_and_where_it_likes_in_a_code_package(monkeypatch, tmp_path, checkout):
    monkeypatch.setenv("METAFLOW_USER", "ci")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("METAFLOW_DATASTORE_SYSROOT_LOCAL", "")
    monkeypatch.delenv("METAFLOW_DATASTORE_SYSROOT_LOCAL")
    command_line.complete_environment(tmp_path, checkout)
    assert os.environ.get("METAFLOW_DATASTORE_SYSROOT_LOCAL") == (str(tmp_path) if checkout else None)


@pytest.mark.parametrize(("visible", "name"), [(True, "smollm2_gpu.toml"), (False, "smollm2_cpu.toml")])
def test_the_default_configuration_follows_the_machine(monkeypatch, tmp_path, visible, name):
    monkeypatch.setattr(command_line.device, "gpu_visible", lambda: visible)
    assert command_line.default_config(tmp_path) == tmp_path / "configs" / name
