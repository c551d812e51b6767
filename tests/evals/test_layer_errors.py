from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import subject_of, tiny
from torch.nn.functional import cosine_similarity

from corpora.shards import Shard
from evals import fidelity, layers
from evals.head import EvaluationError
from steps.config import BenchmarkConfig

LENGTHS = [30, 8, 50, 17, 41]
CONFIG = BenchmarkConfig(layer_conversations=4, seq_len=40, skip_positions=10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 61, n).astype(np.uint32) for n in LENGTHS]
    Shard.of(documents, [f"d{i}" for i in range(len(LENGTHS))]).save(folder / "held_out.npz")
    return folder


@pytest.fixture(scope="module")
def student():
    """A Mamba layer below an attention layer, both behind norms that training has changed."""
    model = tiny(1, (1,))
    for block in model.blocks:
        block.input_layernorm.weight.mul_(1 + 0.2 * torch.rand(24))
    return model


def stream(model, tokens):
    """Hidden states (1, L, D) before the first block and after each, of one document alone."""
    states = [model.model.embed_tokens(tokens)]
    hooks = [block.register_forward_hook(lambda *call: states.append(call[2])) for block in model.blocks]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return states


def mixed(block, states, inv_freq):
    """What a block's mixer makes of hidden states (1, L, D), behind the block's own norm."""
    angles = (torch.arange(states.shape[1])[:, None] * inv_freq).repeat(1, 2)[None, None]
    return block(states, (angles.cos(), angles.sin()), None, tapped=True)[2]


def by_hand(student, teacher, corpus) -> dict[str, list[float]]:
    """FIGURES by layer in float64, one document at a time."""
    found: dict[str, list[float]] = {name: [] for name in layers.FIGURES}
    blocks = fidelity.conversation_blocks(corpus / "held_out.npz", 4, 40, 10)
    documents = [torch.tensor(block.tokens.astype(np.int64))[None] for block in blocks]
    for layer in range(2):
        pairs: dict[str, list[tuple]] = {"mixer": [], "hidden": []}
        for tokens in documents:
            ours, theirs = stream(student, tokens), stream(teacher, tokens)
            both = (mixed(m.blocks[layer], theirs[layer], teacher.inv_freq) for m in (student, teacher))
            pairs["mixer"].append(tuple(both))
            pairs["hidden"].append((ours[layer + 1], theirs[layer + 1]))
        for name, parts in pairs.items():
            a, b = (torch.cat([t[0, 10:].double() for t in side]) for side in zip(*parts, strict=True))
            found[f"{name}_cosine"].append(float(cosine_similarity(a, b, dim=-1).mean()))
            found[f"{name}_relative_error"].append(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean()))
    return found


def test_figures_equal_float64_by_hand_for_unequal_documents(teacher, student, corpus):
    said: list[float] = []
    found = layers.measure(subject_of(student, teacher, corpus, lambda share, _: said.append(share)), CONFIG)
    expected = by_hand(student, teacher, corpus)
    assert [(e["layer"], e["replaced"]) for e in found.summary] == [(0, True), (1, False)]
    for name in layers.FIGURES:
        assert [e[name] for e in found.summary] == pytest.approx(expected[name], abs=1e-5)
    # Of the documents with more than 10 tokens the first four, up to 40 tokens each.
    assert {e["tokens"] for e in found.summary} == {20 + 30 + 7 + 30}
    assert found.records == []
    assert said == [0.5, 1.0]


def test_a_model_is_its_own_equal(teacher, corpus):
    for entry in layers.measure(subject_of(teacher, teacher, corpus), CONFIG).summary:
        assert entry["mixer_relative_error"] == entry["hidden_relative_error"] == 0.0
        assert entry["mixer_cosine"] == pytest.approx(1.0)
        assert not entry["replaced"]


def test_errors_of_lower_layers_reach_the_stream_and_not_the_mixers_above(teacher, corpus):
    broken = tiny(0, (0, 1))
    broken.blocks[0].self_attn.o_proj.weight.mul_(2)
    low, high = layers.measure(subject_of(broken, teacher, corpus), CONFIG).summary
    assert low["mixer_relative_error"] == pytest.approx(1.0)
    assert high["mixer_relative_error"] == 0.0
    assert high["hidden_relative_error"] > 0


def test_nothing_for_the_teacher_itself_or_where_it_is_off(teacher, student, corpus):
    assert layers.measure(subject_of(teacher, None, corpus), CONFIG).summary is None
    off = CONFIG.model_copy(update={"layer_conversations": 0})
    assert layers.measure(subject_of(student, teacher, corpus), off).summary is None


def test_broken_output_is_refused(teacher, corpus):
    broken = tiny(0, (0, 1))
    broken.blocks[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="layer 1: its outputs are not finite"):
        layers.measure(subject_of(broken, teacher, corpus), CONFIG)
