import math

import pytest
import torch

from steps.config import TrainConfig
from steps.optimizers import Muon, make_optimizers, orthogonal


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 32, 32)])
def test_orthogonal_keeps_the_singular_vectors_and_makes_the_values_about_one(shape):
    torch.manual_seed(0)
    given = torch.randn(shape)
    found = orthogonal(given)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    inner = left.mT @ found @ right.mT  # diagonal where the singular vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_a_step_is_that_of_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in ((8, 16), (8, 16), (24, 8))] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    one, other = Muon(ours, **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        # torch iterates in bfloat16, so by a few percent of what three steps change
        torch.testing.assert_close(a, b, atol=0.03 * 3 * 0.01 * 0.2 * math.sqrt(24), rtol=0)
        assert (a - 1).abs().max() > 0.01


def test_muon_gets_the_matrices_of_blocks_alone():
    names = ("model.layers.0.mamba.in_proj.weight", "model.layers.0.mamba.A_log", "model.embed_tokens.weight")
    groups = [(1e-3, {name: torch.nn.Parameter(torch.ones(4, 4)) for name in names})]
    adamw, muon = make_optimizers(groups, TrainConfig(optimizer="muon", weight_decay=0.1))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    (by_muon,) = muon.param_groups
    assert [p is groups[0][1][names[0]] for p in by_muon["params"]] == [True]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.1]
    assert by_muon["peak_lr"] == 1e-3
    (only,) = make_optimizers(groups, TrainConfig())
    assert sum(len(group["params"]) for group in only.param_groups) == 3


def test_only_matrices_fit():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.ones(3))])
