from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steps.loop import train
from tests.steps import training

pytestmark = pytest.mark.gpu


def trained(one_shape: bool, accumulation: int) -> tuple[dict[str, torch.Tensor], list]:
    torch._dynamo.reset()
    model = training.student(head_dim=16).cuda()
    context = replace(training.context(), device="cuda")
    config = training.CONFIG.model_copy(update={"accumulation": accumulation})
    summary = train(model, training.batches, training.loss_function, config, context, one_shape=one_shape)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, summary["curve"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_passes_train_as_eager_ones_and_always_alike(accumulation):
    weights, curve = trained(False, accumulation)
    replayed, replayed_curve = trained(True, accumulation)
    assert replayed_curve == [[step, pytest.approx(loss, rel=2e-3)] for step, loss in curve]
    for name in weights:
        torch.testing.assert_close(replayed[name], weights[name], rtol=0, atol=2e-3, msg=name)
    again, again_curve = trained(True, accumulation)
    assert again_curve == replayed_curve
    assert all(torch.equal(again[name], replayed[name]) for name in again)
