import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from subprocess import PIPE

import pytest

from steps import device
from steps.device import DeviceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "gpu_visible", lambda: True)
    monkeypatch.setattr(device, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(device, "_nvidia_smi", lambda: (("GPU-a", "H200", "570.1"), ("GPU-b", "H200", "570.1")))


def test_auto_takes_a_gpu_that_torch_can_use(two_gpus, monkeypatch):
    assert (device.resolve("auto"), device.resolve("cuda"), device.resolve("cpu")) == ("cuda", "cuda", "cpu")
    monkeypatch.setattr(device, "_torch_has_cuda", lambda: False)
    assert device.resolve("auto") == "cpu"
    with pytest.raises(DeviceError, match="the installed torch has no CUDA; set device to 'auto' or 'cpu'"):
        device.resolve("cuda")


def test_hidden_gpus_are_not_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.gpu_visible()
    assert device.gpus() == []
    with pytest.raises(DeviceError, match="no NVIDIA GPU is visible"):
        device.resolve("cuda")


def test_each_stage_gets_a_gpu_of_its_own(two_gpus):
    with device.hold("cuda") as first:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first == "GPU-a"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    lock = device._first_free(["GPU-a"], 1)
    with device.hold("cuda") as second:
        assert second == "GPU-b"
    os.close(lock["GPU-a"])


def test_several_gpus_are_held_at_once_or_none_is(two_gpus, monkeypatch):
    with device.hold("cuda", 2) as both:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == both == "GPU-a,GPU-b"
        assert device.gpus() == ["GPU-a", "GPU-b"]
    lock = device._first_free(["GPU-b"], 1)
    free_while_waiting = []

    def other_ends(_):
        free_while_waiting.extend(device._first_free(["GPU-a"], 1).items())
        os.close(lock["GPU-b"])
        os.close(free_while_waiting[0][1])

    monkeypatch.setattr(device.time, "sleep", other_ends)
    with device.hold("cuda", 2):
        assert free_while_waiting[0][0] == "GPU-a", "what it could have had alone was left to others"
    with pytest.raises(DeviceError, match="ask for 3 GPUs, but this machine shows 2"), device.hold("cuda", 3):
        pass


def test_only_allowed_gpus_are_taken(two_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-b")
    assert device.gpus() == ["3", "GPU-b"]
    with device.hold("cuda") as name:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == name == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3, GPU-b"


def test_hardware_names_what_speed_depends_on(two_gpus):
    assert device.hardware("cuda") == {"device": "cuda", "name": "H200", "driver": "570.1"}
    cpu = device.hardware("cpu")
    assert cpu["device"] == "cpu" and cpu["name"] and cpu["cores"] == len(os.sched_getaffinity(0))


def test_a_second_stage_waits_until_the_first_is_done(monkeypatch):
    waiting, entered = threading.Event(), threading.Event()
    monkeypatch.setattr(device.time, "sleep", lambda _: waiting.set())

    def second():
        with device.hold("cpu"):
            entered.set()

    thread = threading.Thread(target=second)
    with device.hold("cpu"):
        thread.start()
        assert waiting.wait(20)
        assert not entered.is_set()
    thread.join(20)
    assert entered.is_set()


def test_a_killed_stage_frees_its_device(tmp_path):
    program = (
        "import signal; from steps import device\nwith device.hold('cpu'): print('held', flush=True); signal.pause()"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=PIPE, text=True, cwd=ROOT, env=environment)
    assert child.stdout.readline() == "held\n"
    child.kill()
    child.wait(20)
    with device.hold("cpu") as name:
        assert name == "cpu"


def test_asking_for_the_device_imports_no_torch():
    program = "import sys; from steps import device; device.resolve('auto'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=PIPE, text=True, cwd=ROOT).stdout == "False\n"
