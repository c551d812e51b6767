from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from kernels_ext.sampling import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.sampling.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = pytest.mark.parametrize("ops", [reference, kernel], ids=["reference", "kernel"])
FILTERS = [(0, 1.0), (5, 1.0), (0, 0.9), (0, 0.3), (20, 0.8), (1, 1.0), (1000, 0.999)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is not a token and not a number."""
    empty = torch.empty

    def filled(*size, **kwargs):
        out = empty(*size, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", filled)


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * spread + 1).to(dtype).to(DEVICE)


def uniforms_for(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filtered_by_sorting(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row in float64, token by token."""
    logits = logits.astype(np.float64)
    order = sorted(range(len(logits)), key=lambda t: -logits[t])
    if 0 < top_k < len(logits):
        order = [t for t in order if logits[t] >= logits[order[top_k - 1]]]
    weight = {t: math.exp((logits[t] - logits[order[0]]) / temperature) for t in order}
    total, mass, last = sum(weight.values()), 0.0, None
    kept = []
    for t in order:
        if top_p < 1 and mass >= top_p * total and logits[t] != last:
            break
        kept.append(t)
        mass, last = mass + weight[t], logits[t]
    out = np.zeros(len(logits))
    for t in kept:
        out[t] = weight[t] / mass
    return out


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filtered_probabilities_are_the_definition(ops, dtype, top_k, top_p):
    logits = random_logits(5, 97, dtype)
    got = ops.filtered_probabilities(logits, 0.7, top_k, top_p)
    assert got.dtype == torch.float32
    for row, wanted in zip(got.cpu().double().numpy(), logits.float().cpu().numpy(), strict=True):
        wanted = filtered_by_sorting(wanted, 0.7, top_k, top_p)
        assert (row > 0).tolist() == (wanted > 0).tolist()
        assert np.linalg.norm(row - wanted) <= 2e-6 * np.linalg.norm(wanted)


@IMPLEMENTATIONS
def test_ties_at_the_boundary_are_kept(ops):
    logits = torch.tensor([[2.0, 0.0, 2.0, 1.0, 1.0, 1.0, -math.inf, 0.0]], device=DEVICE)
    assert (ops.filtered_probabilities(logits, 1.0, 1, 1.0) > 0).tolist() == [[1, 0, 1, 0, 0, 0, 0, 0]]
    assert (ops.filtered_probabilities(logits, 1.0, 3, 1.0) > 0).tolist() == [[1, 0, 1, 1, 1, 1, 0, 0]]
    assert (ops.filtered_probabilities(logits, 1.0, 0, 0.6) > 0).tolist() == [[1, 0, 1, 1, 1, 1, 0, 0]]
    assert (ops.filtered_probabilities(logits, 1.0, 8, 1.0) > 0).tolist() == [[1, 1, 1, 1, 1, 1, 0, 1]]
    flat = torch.zeros(1, 97, dtype=torch.bfloat16, device=DEVICE)
    for top_k, top_p in ((3, 1.0), (0, 0.5), (3, 0.5)):
        torch.testing.assert_close(
            ops.filtered_probabilities(flat, 1.0, top_k, top_p), torch.full((1, 97), 1 / 97, device=DEVICE)
        )


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_rows(ops, dtype):
    """Negative, huge, tiny, nearly equal and masked logits; a single token; a leading axis."""
    base = random_logits(6, 61, torch.float32, seed=3)
    base[0] -= 300.0
    base[1] *= 30.0
    base[2] *= 1e-3
    base[3] = 8.0 + torch.arange(61, device=DEVICE) * 2.0**-20
    base[4, 5:] = -math.inf
    base[5] = -math.inf
    base[5, 17] = -2.5
    logits = base.to(dtype)
    for top_k, top_p, temperature in ((7, 1.0, 1.0), (0, 0.6, 1.0), (11, 0.6, 0.05), (40, 0.95, 4.0)):
        got = ops.filtered_probabilities(logits.view(2, 3, 61), temperature, top_k, top_p).view(6, 61)
        for row, one in zip(got.cpu().double().numpy(), logits.float().cpu().numpy(), strict=True):
            wanted = filtered_by_sorting(one, temperature, top_k, top_p)
            assert (row > 1e-30).tolist() == (wanted > 1e-30).tolist()  # below, float32 may say 0
            assert np.linalg.norm(row - wanted) <= 2e-6 * np.linalg.norm(wanted)
    one = torch.full((3, 1), -4.0, dtype=dtype, device=DEVICE)
    assert ops.filtered_probabilities(one, 1.0, 3, 0.5).tolist() == [[1.0]] * 3
    assert ops.sample(one, uniforms_for(3), 1.0, 0, 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"BLOCK": 32, "num_warps": 1},
        {"BLOCK": 64, "PIVOTS": 4, "STAGES": 1, "SAMPLE": 32, "num_warps": 2},
        {"BLOCK": 32, "PIVOTS": 16, "STAGES": 2, "SAMPLE": 16, "num_warps": 1},
    ],
    ids=["one block", "blocks", "sample", "pivots"],
)
def test_kernel_samples_what_the_reference_samples(dtype, config):
    logits = random_logits(6, 131, dtype, seed=5)
    for seed, (top_k, top_p) in enumerate(FILTERS):
        uniforms = uniforms_for(6, seed)
        got = kernel.sample(logits, uniforms, 0.9, top_k, top_p, config=config)
        assert got.dtype == torch.int32
        assert got.tolist() == reference.sample(logits, uniforms, 0.9, top_k, top_p).tolist()
    got = kernel.filtered_probabilities(logits, 0.9, 20, 0.8, config=config)
    torch.testing.assert_close(got, reference.filtered_probabilities(logits, 0.9, 20, 0.8), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_row_of_any_shape(dtype):
    """Flat, peaked and ascending rows: what a sample of a row says about the rest may be far off."""
    logits = random_logits(4, 5003, torch.float32, seed=9, spread=1.0)
    logits[1] *= 5.0
    logits[2] = torch.linspace(-9, 9, 5003, device=DEVICE)
    logits[3, 4900:] += 100.0  # as much above the first logits as to make weights overflow
    logits = logits.to(dtype)
    for top_k, top_p in ((0, 0.95), (0, 0.4), (50, 0.9)):
        got = kernel.filtered_probabilities(logits, 0.7, top_k, top_p, config={"BLOCK": 256, "SAMPLE": 512})
        for row, wanted in zip(got.cpu().double().numpy(), logits.float().cpu().numpy(), strict=True):
            wanted = filtered_by_sorting(wanted, 0.7, top_k, top_p)
            assert (row > 0).tolist() == (wanted > 0).tolist()
            assert np.linalg.norm(row - wanted) <= 2e-6 * np.linalg.norm(wanted)


def test_rows_may_be_a_view():
    wide = random_logits(8, 200, torch.bfloat16, seed=6)
    part, uniforms = wide[::2, 10:141], uniforms_for(4)
    for temperature in (0.0, 1.0):
        wanted = reference.sample(part.contiguous(), uniforms, temperature, 9, 0.9)
        assert kernel.sample(part, uniforms, temperature, 9, 0.9).tolist() == wanted.tolist()


@IMPLEMENTATIONS
def test_the_ends_of_the_uniform_are_tokens_of_positive_probability(ops):
    """u = 0 and the largest u below 1, with dead tokens at both ends and whole dead blocks after the last live one."""
    logits = torch.full((2, 131), -math.inf, device=DEVICE)
    logits[:, [40, 41, 77]] = torch.tensor([1.0, 2.0, 1.5], device=DEVICE)
    uniforms = torch.tensor([0.0, 1 - 2.0**-24], device=DEVICE)
    configs = [{}] if ops is reference else [{"config": {"BLOCK": 16, "num_warps": 1}}, {}]
    for config in configs:
        assert ops.sample(logits, uniforms, 1.0, 0, 1.0, **config).tolist() == [40, 77]
        assert ops.sample(logits, uniforms, 1.0, 2, 1.0, **config).tolist() == [41, 77]
        # 1 cannot come from torch.rand; it stands for a target that rounding put beyond the end.
        assert ops.sample(logits, torch.ones_like(uniforms), 1.0, 0, 1.0, **config).tolist() == [77, 77]


def test_draws_follow_the_filtered_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, 1.9, -0.5, 1.2], device=DEVICE)
    count = 100_000
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.8)):
        drawn = reference.sample(logits.expand(count, 8), uniforms_for(count, seed=7), 0.8, top_k, top_p)
        wanted = filtered_by_sorting(logits.cpu().numpy(), 0.8, top_k, top_p)
        seen = np.bincount(drawn.cpu().numpy(), minlength=8)
        assert seen[wanted == 0].sum() == 0
        assert chisquare(seen[wanted > 0], wanted[wanted > 0] * count).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [{}, {"BLOCK": 16, "splits": 1, "num_warps": 1}, {"BLOCK": 16, "splits": 3, "num_warps": 1}]
)
def test_greedy_is_the_first_maximum(dtype, config):
    logits = random_logits(9, 131, dtype, seed=8)
    logits[3] = 0.5  # all equal
    logits[4, [90, 20, 130]] = 50.0
    logits[5] = -math.inf
    logits[6] = -math.inf
    logits[6, 130] = -3e38
    wanted = [int(np.argmax(row)) for row in logits.float().cpu().numpy()]
    assert wanted[3:7] == [0, 20, 0, 130]
    assert reference.greedy(logits).tolist() == wanted
    assert kernel.greedy(logits, config=config).tolist() == wanted
    assert kernel.sample(logits, uniforms_for(9), 0.0, 3, 0.5, config=config).tolist() == wanted


@IMPLEMENTATIONS
def test_no_rows(ops):
    logits, uniforms = torch.zeros(0, 17, device=DEVICE), torch.zeros(0, device=DEVICE)
    assert ops.sample(logits, uniforms, 0.0, 0, 1.0).shape == (0,)
    assert ops.sample(logits, uniforms, 1.0, 3, 0.5).shape == (0,)
    assert ops.filtered_probabilities(logits, 1.0, 3, 0.5).shape == (0, 17)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "message"),
    [
        (-1.0, 0, 1.0, "temperature must be >= 0, got -1.0"),
        (1.0, -2, 1.0, "top_k must be >= 0 .*, got -2"),
        (1.0, 0, 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        (1.0, 0, 1.5, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_filters_are_refused(ops, temperature, top_k, top_p, message):
    logits = torch.zeros(1, 4, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        ops.sample(logits, uniforms_for(1), temperature, top_k, top_p)
    with pytest.raises(ValueError, match=message.replace(">=", ">") if temperature < 0 else message):
        ops.filtered_probabilities(logits, temperature, top_k, top_p)
