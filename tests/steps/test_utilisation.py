import pytest
import torch

from steps import utilisation
from steps.config import TrainConfig
from steps.loop import select_parameters
from tests.hybrid import tiny_hybrid

# Of tiny_hybrid: d_model 48, d_inner 48, d_xb 16, six heads, MLP 64, vocabulary 97; two of four layers are mixers.
IN_PROJ, MIXER = 48 * (48 + 16 + 16 + 48 + 6), 48 * (48 + 16 + 16 + 48 + 6) + 48 * 48
ATTENTION = 2 * 48 * 48 + 2 * 48 * 16
MLP, HEAD = 3 * 48 * 64, 97 * 48


def test_matrix_weights_are_those_that_a_token_passes():
    model = tiny_hybrid.model()
    assert utilisation.matrix_weights(model.blocks[0]) == MIXER + MLP
    assert utilisation.matrix_weights(model.blocks[1]) == ATTENTION + MLP
    whole = 2 * MIXER + 2 * ATTENTION + 4 * MLP + HEAD
    assert utilisation.matrix_weights(model) == whole
    assert utilisation.matrix_weights(tiny_hybrid.model(tie_word_embeddings=False)) == whole


@pytest.mark.parametrize(
    ("rates", "trained"),
    [
        ({"mixer_lr": 1e-3, "rest_lr": 1e-3}, 2 * MIXER + 2 * ATTENTION + 4 * MLP + HEAD),
        ({"mixer_lr": 1e-3, "rest_lr": 0.0}, 2 * MIXER),
        ({"mixer_lr": 0.0, "rest_lr": 1e-3}, 2 * ATTENTION + 4 * MLP + HEAD),
    ],
)
def test_frozen_weights_cost_no_gradient_of_their_own(rates, trained):
    model = tiny_hybrid.model()
    select_parameters(model, TrainConfig(**rates))
    assert utilisation.training_flops(model) == 4 * utilisation.matrix_weights(model) + 2 * trained


def test_mixers_alone_take_no_gradient_of_their_input():
    model = tiny_hybrid.model()
    select_parameters(model, TrainConfig(mixer_lr=1e-3))
    mixers = [block.mamba for block in model.blocks if not block.is_attention]
    assert utilisation.training_flops(model, mixers) == 2 * (6 * MIXER - 2 * IN_PROJ)


def test_utilisation_is_of_all_gpus_and_unknown_without_a_peak():
    assert utilisation.utilisation(1e9, 2e5, 1e15, 1) == pytest.approx(0.2)
    assert utilisation.utilisation(1e9, 2e5, 1e15, 2) == pytest.approx(0.1)
    assert utilisation.utilisation(1e9, 2e5, None, 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_go_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert utilisation.peak_flops("cuda") == peak
    assert utilisation.peak_flops("cpu") is None
