from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid.calibrate import calibrate_out_proj, solve_ridge
from hybrid.init_map import from_attention
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens

KEPT = (1,)
LAYERS = (0, 2, 3)
SEQ_IDX = torch.tensor([[0] * 40 + [1] * 27, [0] * 3 + [1] * 64])


@pytest.fixture(scope="module")
def teacher():
    return tiny_hybrid.model(attention_layers=(0, 1, 2, 3))


@pytest.fixture
def student(teacher):
    return from_attention(teacher, KEPT)


@pytest.fixture(scope="module")
def batches():
    return [(tokens(2, 67, seed), SEQ_IDX) for seed in range(3)]


def features_and_targets(teacher, student, batches, layer) -> tuple[np.ndarray, np.ndarray]:
    """F (T, d_inner), O (T, d_model) in float64."""
    features, targets = [], []
    for text, seq_idx in batches:
        given, wanted = teacher.mixing(text, seq_idx, [layer])[layer]
        features.append(student.model.layers[layer].mamba.features(given, seq_idx).flatten(0, 1))
        targets.append(wanted.flatten(0, 1))
    return torch.cat(features).double().numpy(), torch.cat(targets).double().numpy()


def relative_error(features, targets, weight) -> float:
    return ((features @ weight.double().numpy().T - targets) ** 2).sum() / (targets**2).sum()


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_is_the_ridge_solution_and_reports_its_own_error(teacher, student, batches, ridge):
    known = {layer: features_and_targets(teacher, student, batches, layer) for layer in LAYERS}
    copied = {layer: student.model.layers[layer].mamba.out_proj.weight.clone() for layer in LAYERS}
    errors = calibrate_out_proj(teacher, student, iter(batches), ridge)
    assert tuple(errors) == LAYERS
    for layer, (features, targets) in known.items():
        penalty = np.sqrt(ridge * (features**2).sum(0).mean()) * np.eye(48)  # as rows of the least squares problem
        rows, wanted = np.concatenate([features, penalty]), np.concatenate([targets, np.zeros((48, 48))])
        solution = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
        weight = student.model.layers[layer].mamba.out_proj.weight
        np.testing.assert_allclose(weight.numpy(), solution, rtol=1e-3, atol=1e-3 * np.abs(solution).max())
        assert errors[layer] == pytest.approx(relative_error(features, targets, weight), rel=1e-3)
        assert errors[layer] < 0.9 * relative_error(features, targets, copied[layer])
        assert errors[layer] < 1.0


def test_only_out_proj_changes(teacher, student, batches):
    before = {name: p.clone() for name, p in student.named_parameters()}
    calibrate_out_proj(teacher, student, batches, 1e-3)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{layer}.mamba.out_proj.weight" for layer in LAYERS}


def test_windows_are_measured_first_and_leave_less_error(teacher, student, batches):
    """Sinks from documents' first tokens of the first batch, features of RMS 1 by head, then the ridge."""
    plain = calibrate_out_proj(teacher, student, batches, 1e-3)
    windowed = from_attention(teacher, KEPT, rope=True, window=8)
    errors = calibrate_out_proj(teacher, windowed, iter(batches), 1e-3)
    text, seq_idx = batches[0]
    firsts = ([0, 0, 1, 1], [0, 40, 0, 3])
    for layer in LAYERS:
        assert errors[layer] < 0.8 * plain[layer]
        mixer, given = windowed.model.layers[layer].mamba, teacher.mixing(text, seq_idx, [layer])[layer][0]
        _, _, x, B, _ = mixer.inputs(given, seq_idx)
        torch.testing.assert_close(mixer.sink, torch.stack([t[firsts].mean(0) for t in (B, x)]))
        power = mixer.features(given, seq_idx).pow(2).mean((0, 1)).unflatten(0, (-1, 8)).mean(1)
        torch.testing.assert_close(power, torch.ones_like(power), rtol=1e-4, atol=1e-4)


def test_half_precision_products(teacher, student, batches):
    exact = calibrate_out_proj(teacher, student, batches, 1e-3)
    low = calibrate_out_proj(teacher, from_attention(teacher, KEPT), batches, 1e-3, torch.bfloat16)
    for layer in LAYERS:
        assert low[layer] == pytest.approx(exact[layer], abs=0.02)


def test_weak_ridge_is_least_squares():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(50, 6)), rng.normal(size=(50, 4))
    gram, cross = (torch.tensor(features.T @ t, dtype=torch.float32) for t in (features, targets))
    wanted = np.linalg.lstsq(features, targets, rcond=None)[0]
    np.testing.assert_allclose(solve_ridge(gram, cross, 1e-9).numpy(), wanted, rtol=1e-4, atol=1e-5)
