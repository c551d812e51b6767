from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hybrid.compiled import compile_blocks, compiled_blocks
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens

ROOT = Path(__file__).resolve().parents[2]
SEQ_IDX = torch.tensor([[0] * 30 + [1] * 34, [0] * 5 + [1] * 40 + [2] * 19], dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model) -> dict[str, torch.Tensor]:
    model.requires_grad_(True).zero_grad()
    model.hidden(tokens(2, 64).to(model.device), SEQ_IDX.to(model.device)).float().pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixer", [{}, {"mixer": "mamba1", "d_state": 4}], ids=["mamba2", "mamba1"])
def test_blocks_of_a_kind_share_one_graph_without_breaks(mixer):
    plain = tiny_hybrid.model(**mixer)
    model = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    found, wanted = gradients(model), gradients(plain)
    assert counter.frame_count == 2, "one for attention, one for Mamba"
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_cpu_runs_as_before():
    model = tiny_hybrid.model()
    with compiled_blocks(model):
        assert all(block._compiled_call_impl is None for block in model.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": "mamba1"},
        {"sliding_window": 20},
        {"attention_bias": True, "qk_norm": True, "no_rope_layers": (1,)},
    ],
    ids=str,
)
def test_compiled_is_eager_and_leaves_no_trace(changes):
    plain = tiny_hybrid.model(head_dim=16, **changes).cuda()
    model = copy.deepcopy(plain)
    with compiled_blocks(model):
        found = gradients(model)
    wanted = gradients(plain)
    assert not model.blocks_compiled and all(block._compiled_call_impl is None for block in model.blocks)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-2, atol=2e-2 * wanted[name].abs().max().item())


def test_the_compiler_is_not_imported_with_the_model():
    """Its modules cost seconds, and every stage and command imports the model."""
    code = "import sys, hybrid, hybrid.engine; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
