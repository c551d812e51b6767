"""What all tests share: no network, no user's settings, no GPU tests where there is no GPU."""

import importlib.util
import os

import pytest

# Before anything imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Models this small gain nothing from threads, which spin and slow each other down tenfold where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("MAMBALLAMA_STORE", "MAMBALLAMA_LIVE_CARDS", "METAFLOW_FLOW_CONFIG", "METAFLOW_FLOW_CONFIG_VALUE"):
    os.environ.pop(name, None)


def _import_triton():
    """Without CUDA, Triton's own library must be imported as interpreted code too, before anything else imports it."""
    if not _cuda() and importlib.util.find_spec("triton") is not None:
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("triton.experimental.gluon.language")  # and with it triton.language
        del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


_import_triton()
pytest_plugins = ["s3_server"]  # the fixtures `s3_environment` and `s3_url`; the server starts with their first use
