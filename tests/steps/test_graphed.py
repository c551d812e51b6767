from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steps.loop import train
from tests.steps import training

pytestmark = pytest.mark.gpu


def trained(one_shape: bool) -> tuple[dict[str, torch.Tensor], list]:
    torch._dynamo.reset()
    model = training.student(head_dim=16).cuda()
    context = replace(training.context(), device="cuda")
    summary = train(model, training.batches, training.loss_function, training.CONFIG, context, one_shape=one_shape)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, summary["curve"]


def test_replayed_passes_train_as_eager_ones_and_always_alike():
    weights, curve = trained(one_shape=False)
    replayed, replayed_curve = trained(one_shape=True)
    assert replayed_curve == [[step, pytest.approx(loss, rel=2e-3)] for step, loss in curve]
    for name in weights:
        torch.testing.assert_close(replayed[name], weights[name], rtol=0, atol=2e-3, msg=name)
    again, again_curve = trained(one_shape=True)
    assert again_curve == replayed_curve
    assert all(torch.equal(again[name], replayed[name]) for name in again)
