"""How prompts become shapes, and what is read as which shape."""

from __future__ import annotations

import pytest
import torch

from hybrid import prefill
from hybrid.prefill import PromptReader, Prompts, pieces

CPU = torch.device("cpu")


def asked() -> Prompts:
    return Prompts.of([[5, 6, 7], [8], [9, 10]], [4, 1, 2], [2, 0, 5])


def test_prompts_are_padded_on_the_right():
    prompts = asked()
    assert prompts.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert prompts.counts.tolist() == [3, 1, 2]
    assert prompts.ends.tolist() == [7, 2, 4]


def test_a_larger_shape_holds_the_last_row_again():
    padded = asked().padded(5, 4)
    assert padded.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0], [9, 10, 0, 0], [9, 10, 0, 0]]
    assert padded.slots.tolist() == [2, 0, 5, 5, 5]
    assert padded.counts.tolist() == [3, 1, 2, 2, 2] and padded.ends.tolist() == [7, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("rows", "length", "shape"),
    [
        (1, 1, (1, 16)),
        (1, 17, (1, 32)),
        (3, 64, (4, 64)),
        (5, 65, (6, 90)),  # no larger than the engine itself
        (6, 90, (6, 90)),
        (2, 40, (2, 64)),
    ],
)
def test_shapes_are_powers_of_two_that_the_engine_has(rows, length, shape):
    reader = PromptReader(lambda prompts: None, CPU, 1.0, (6, 90), graphs=True)
    assert reader.shape(rows, length) == shape


def test_what_costs_much_is_read_as_it_comes():
    cheap = prefill.GRAPHED_FLOPS / (4 * 64)
    assert PromptReader(print, CPU, cheap, (9, 900), graphs=True).shape(3, 50) == (4, 64)
    assert PromptReader(print, CPU, cheap * 1.01, (9, 900), graphs=True).shape(3, 50) is None
    assert PromptReader(print, CPU, cheap, (9, 900), graphs=False).shape(3, 50) is None


@pytest.mark.parametrize("graphs", [False, True])
def test_a_shape_that_came_once_is_no_graph_yet(graphs):
    seen: list[Prompts] = []
    reader = PromptReader(seen.append, CPU, 1.0, (9, 90), graphs)
    reader(asked())
    assert seen[0].tokens.shape == ((4, 16) if graphs else (3, 3))
    assert seen[0].slots.tolist()[:3] == [2, 0, 5]


def test_pieces_hold_so_many_tokens_with_padding(monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 20)
    assert [[*range(5)][piece] for piece in pieces([3, 7, 2, 5, 6])] == [[0, 1], [2, 3], [4]]
    assert [[*range(2)][piece] for piece in pieces([3, 70])] == [[0], [1]]
