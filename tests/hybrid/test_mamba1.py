"""The Mamba-1 mixer against its definition, and its decoding against its own forward."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from hybrid import HybridConfig, UnsupportedModel
from hybrid.cache import HybridCache, Span, SSMCache
from hybrid.decode import DecodeStep
from hybrid.mamba1 import Mamba1Mixer
from hybrid.rms_norm import RMSNorm
from tests.hybrid import tiny_hybrid

NO_ROPE = (torch.empty(0), torch.empty(0))


def random_mixer(seed: int = 0, **changes) -> Mamba1Mixer:
    """Six heads of eight in two groups, four numbers of state per channel."""
    torch.manual_seed(seed)
    mixer = Mamba1Mixer(tiny_hybrid.config(**{"mixer": "mamba1", "d_state": 4, **changes}))
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if name == "A_log":
                p.uniform_(-1.5, 1.0)
            elif name == "dt_bias":
                p.uniform_(-2.0, 0.0)
            else:
                p.normal_(std=1.0 if name == "D" else 0.3)
    return mixer.requires_grad_(False)


def hidden_states(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("conv_silu", [True, False])
@pytest.mark.parametrize("proj_bias", [True, False])
def test_is_the_recurrence_written_out(conv_silu, proj_bias):
    """A loop over tokens and heads in float64; head h reads x and B of its group, by the channels of the head."""
    mixer = random_mixer(conv_silu=conv_silu, proj_bias=proj_bias, dt_rank=5)
    config, hidden = mixer.config, hidden_states(2, 11)
    weights = {name: p.double() for name, p in mixer.named_parameters()}
    assert ("in_proj.bias" in weights) == proj_bias
    projected = hidden.double() @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0)
    z, x, B, C, dt = projected.split((48, 16, 16, 48, 5), dim=-1)
    dt = torch.nn.functional.softplus(dt @ weights["dt_proj.weight"].T + weights["dt_bias"])
    history = torch.cat([torch.zeros(2, 3, 16), x], dim=1)
    x = sum(history[:, k : k + 11] * weights["conv1d.weight"][:, 0, k] for k in range(4)) + weights["conv1d.bias"]
    x = torch.nn.functional.silu(x) if conv_silu else x
    A = -torch.exp(weights["A_log"])
    y = torch.empty(2, 11, 48, dtype=torch.float64)
    for h in range(config.n_heads):
        for p in range(config.head_dim):
            channel, shared, piece = h * 8 + p, h // 3 * 8 + p, p // 4 * 4
            state = torch.zeros(2, 4, dtype=torch.float64)
            for t in range(11):
                step = dt[:, t, channel, None]
                B_t = B[:, t, h // 3 * 8 + piece : h // 3 * 8 + piece + 4]
                C_t = C[:, t, h * 8 + piece : h * 8 + piece + 4]
                state = torch.exp(A[channel] * step) * state + step * x[:, t, shared, None] * B_t
                y[:, t, channel] = (C_t * state).sum(-1) + weights["D"][channel] * x[:, t, shared]
    wanted = (y * torch.nn.functional.silu(z)) @ weights["out_proj.weight"].T
    torch.testing.assert_close(mixer(hidden).double(), wanted, rtol=1e-4, atol=1e-4)


def test_legacy_is_the_released_code():
    """Pieces of d_state channels of x and B are repeated, x before its convolution, which then has weights for every
    channel; in the scan each channel reads B and C of its own piece."""
    mixer = random_mixer(gqa_mapping="legacy", conv_silu=True, proj_bias=False)
    hidden = hidden_states(2, 9)
    w = {name: p.double() for name, p in mixer.named_parameters()}
    assert w["in_proj.weight"].shape == (48 + 16 + 16 + 48 + 3, 48), "x and B are still shared"
    assert w["conv1d.weight"].shape == (48, 1, 4)
    z, x, B, C, dt = (hidden.double() @ w["in_proj.weight"].T).split((48, 16, 16, 48, 3), dim=-1)
    repeated = [piece * 4 + n for piece in range(4) for _ in range(3) for n in range(4)]
    x, B = x[..., repeated], B[..., repeated]
    history = torch.cat([torch.zeros(2, 3, 48), x], dim=1)
    x = sum(history[:, k : k + 9] * w["conv1d.weight"][:, 0, k] for k in range(4)) + w["conv1d.bias"]
    x = torch.nn.functional.silu(x)
    dt = torch.nn.functional.softplus(dt @ w["dt_proj.weight"].T + w["dt_bias"])
    state, y = torch.zeros(2, 48, 4, dtype=torch.float64), torch.empty(2, 9, 48, dtype=torch.float64)
    for t in range(9):
        B_t, C_t = (m[:, t].view(2, 12, 1, 4).expand(-1, -1, 4, -1).reshape(2, 48, 4) for m in (B, C))
        write = (dt[:, t] * x[:, t])[..., None] * B_t
        state = torch.exp(dt[:, t, :, None] * -torch.exp(w["A_log"])) * state + write
        y[:, t] = (state * C_t).sum(-1) + w["D"] * x[:, t]
    wanted = (y * torch.nn.functional.silu(z)) @ w["out_proj.weight"].T
    torch.testing.assert_close(mixer(hidden).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "groups", "wrong"), [(32, 8, 3584), (24, 8, 2560), (12, 2, 1344), (8, 8, 0)])
def test_legacy_gives_most_channels_of_the_published_shapes_another_head(heads, groups, wrong):
    """Llama-3-8B's and Llama-3.2-3B's heads, a Qwen2.5-1.5B's, and one without groups."""
    shape = {"d_model": 16, "n_heads": heads, "n_kv_heads": groups, "head_dim": 128, "n_layers": 1}
    config = tiny_hybrid.config(**shape, attention_layers=(), mixer="mamba1", gqa_mapping="legacy")
    source = Mamba1Mixer(config)._shared(torch.arange(groups * 128)[None, None])[0, 0]
    channel = torch.arange(heads * 128)
    by_heads = channel // 128 // (heads // groups) * 128 + channel % 128
    assert (source != by_heads).sum() == wrong


def test_without_groups_both_mappings_are_one():
    heads, legacy = (random_mixer(n_kv_heads=6, gqa_mapping=mapping) for mapping in ("heads", "legacy"))
    hidden = hidden_states(1, 9)
    assert torch.equal(heads(hidden), legacy(hidden))


def test_starts_as_mamba_ssm_does():
    mixer = Mamba1Mixer(tiny_hybrid.config(mixer="mamba1", d_state=8))
    assert mixer.in_proj.weight.shape == (48 + 16 + 16 + 48 + 3, 48), "dt_rank is ceil(d_model / 16)"
    assert mixer.conv1d.weight.shape == (16, 1, 4), "the convolution is of x, before it is shared"
    torch.testing.assert_close(mixer.A, -torch.arange(1.0, 9.0).expand(48, 8))
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() > 0.999e-3 and dt.max() < 0.1001
    assert dt.log().std() > 0.3 * math.log(100) / math.sqrt(12), "spread over the range"
    assert mixer.dt_proj.weight.abs().max() <= 3**-0.5


def test_config_comes_back(tmp_path):
    config = tiny_hybrid.config(mixer="mamba1", d_state=2, dt_rank=7, gqa_mapping="heads")
    assert (config.conv_channels, config.state_size, config.dt_size) == (16, 2, 7)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert HybridConfig.from_folder(tmp_path) == config
    assert tiny_hybrid.config(mixer="mamba1", head_dim=32).state_size == 16
    legacy = tiny_hybrid.config(mixer="mamba1", d_state=2, gqa_mapping="legacy")
    assert (legacy.groups, legacy.d_xb, legacy.scan_groups, legacy.conv_channels) == (2, 16, 6, 48)
    assert HybridConfig.from_dict(json.loads(json.dumps(legacy.to_dict()))) == legacy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixer": "gla"}, "'gla' .* mamba2, mamba1"),
        ({"mixer": "mamba1"}, "d_state 16 does not divide head_dim 8"),
        ({"mixer": "mamba1", "d_state": 3}, "d_state 3 does not divide head_dim 8"),
        ({"mixer": "mamba1", "d_state": 4, "dt_rank": 0}, "dt_rank must be >= 1, got 0"),
        ({"d_state": 4}, "d_state 4 of a mamba2 mixer must be head_dim 8"),
        ({"dt_rank": 4}, "dt_rank 4 belongs to mamba1"),
        ({"gqa_mapping": "legacy"}, "'legacy' belongs to mamba1 without ngroups; the mixer is mamba2, ngroups None"),
        (
            {"mixer": "mamba1", "d_state": 4, "gqa_mapping": "legacy", "ngroups": 6},
            "'legacy' belongs to mamba1 without ngroups; the mixer is mamba1, ngroups 6",
        ),
        ({"mixer": "mamba1", "d_state": 4, "gqa_mapping": "head"}, "one of heads, legacy, got 'head'"),
    ],
)
def test_impossible_mixers_are_refused(changes, said):
    with pytest.raises(UnsupportedModel if changes.get("mixer") == "gla" else ValueError, match=said):
        tiny_hybrid.config(**changes)


@pytest.mark.parametrize("gqa_mapping", ["heads", "legacy"])
def test_every_weight_has_a_gradient(gqa_mapping):
    mixer = random_mixer(gqa_mapping=gqa_mapping).requires_grad_()
    mixer(hidden_states(1, 9)).square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("gqa_mapping", ["heads", "legacy"])
def test_packed_documents_see_nothing_of_each_other(gqa_mapping):
    mixer = random_mixer(gqa_mapping=gqa_mapping)
    hidden = hidden_states(1, 30)
    seq_idx = torch.zeros(1, 30, dtype=torch.int32)
    seq_idx[:, 7:] = 1
    seq_idx[:, 25:] = 2
    alone = torch.cat([mixer(part) for part in hidden.split((7, 18, 5), dim=1)], dim=1)
    torch.testing.assert_close(mixer(hidden, seq_idx), alone, rtol=1e-4, atol=1e-5)
    assert (mixer(hidden) - alone).abs().max() > 1e-2


def test_later_tokens_change_nothing_before():
    mixer = random_mixer()
    hidden = hidden_states(1, 40)
    changed = hidden.clone()
    changed[:, 33:] += 1.0
    torch.testing.assert_close(mixer(changed)[:, :33], mixer(hidden)[:, :33], rtol=0, atol=1e-6)
    assert (mixer(changed)[:, 33] - mixer(hidden)[:, 33]).abs().max() > 1e-2


class Decoding:
    """One mixer over a cache of three slots; the whole of each text is read anew by `forward` to compare."""

    def __init__(self, window: int, gqa_mapping: str) -> None:
        self.mixer = random_mixer(gqa_mapping=gqa_mapping)
        self.norm = RMSNorm(48, 1e-5)
        self.cache = HybridCache(self.mixer.config, 3, 64, "cpu", torch.float32, window=window)
        layer = self.cache.layers[0]
        assert isinstance(layer, SSMCache)
        self.layer, self.cursors, self.window = layer, self.cache.cursors, window
        self.layer.A.copy_(self.mixer.A)
        self.texts = hidden_states(3, 64, seed=7)

    def prefill(self, counts: list[int]) -> Tensor:
        """Right-padded rows after what was read before; (3, max(counts), 48)."""
        start, count = self.cursors.lengths.long(), torch.tensor(counts)
        length = max(counts)
        rows = torch.stack([t[s : s + length] for t, s in zip(self.texts, start.tolist(), strict=True)])
        out = self.mixer(self.norm(rows), cache=self.layer, span=Span(start, count))
        for cursor in (self.cursors.lengths, self.cursors.folded):
            cursor.copy_(start + count)
        return out

    def decode(self, slots: list[int], tokens: Tensor, offset: int = 0) -> Tensor:
        """What the mixer adds to tokens (B, T, 48)."""
        batch, length = tokens.shape[:2]
        step = DecodeStep(
            batch, length, torch.tensor(slots, dtype=torch.int32), self.cursors, self.window, offset, NO_ROPE
        )
        x = tokens.reshape(-1, 48)
        return (self.mixer.decode(x, self.norm, self.layer, step) - x).view_as(tokens)

    def exact(self, slot: int, tokens: Tensor) -> Tensor:
        """The mixer's outputs at tokens (T, 48), read after the slot's text."""
        text = torch.cat([self.texts[slot, : int(self.cursors.lengths[slot])], tokens])
        return self.mixer(self.norm(text[None]))[0, len(text) - len(tokens) :]


@pytest.mark.parametrize("gqa_mapping", ["heads", "legacy"])
def test_prefill_in_parts_then_token_by_token(gqa_mapping):
    decoding = Decoding(1, gqa_mapping)
    whole = decoding.mixer(decoding.norm(decoding.texts))
    first = decoding.prefill([5, 1, 2])
    torch.testing.assert_close(first[0], whole[0, :5], rtol=1e-4, atol=1e-5)
    second = decoding.prefill([2, 4, 3])
    torch.testing.assert_close(second[1], whole[1, 1:5], rtol=1e-4, atol=1e-5)
    for _ in range(9):
        position = decoding.cursors.lengths.long()
        out = decoding.decode([0, 1, 2], decoding.texts[torch.arange(3), position][:, None])
        torch.testing.assert_close(out[:, 0], whole[torch.arange(3), position], rtol=1e-4, atol=1e-5)
        decoding.cursors.lengths += 1
        decoding.cursors.folded += 1


@pytest.mark.parametrize("gqa_mapping", ["heads", "legacy"])
def test_windows_of_which_any_number_is_kept(gqa_mapping):
    """Each round reads three tokens of which the last ones may be wrong, sometimes in two calls; row 1 pauses."""
    decoding = Decoding(3, gqa_mapping)
    decoding.prefill([4, 1, 2])
    lengths, folded = decoding.cursors.lengths, decoding.cursors.folded
    for i in range(20):
        kept = [i % 4, 3 - i % 3, (i * 7) % 4]
        window = hidden_states(3, 3, seed=100 + i)
        for slot, n in enumerate(kept):
            window[slot, :n] = decoding.texts[slot, int(lengths[slot]) : int(lengths[slot]) + n]
        rows = [2, 0, 1] if i % 2 else [2, 0, -1]
        tokens = window[[2, 0, 1]]
        if i % 5 == 4:
            out = torch.cat([decoding.decode(rows, tokens[:, :1]), decoding.decode(rows, tokens[:, 1:], 1)], dim=1)
        else:
            out = decoding.decode(rows, tokens)
        for b, slot in enumerate(rows):
            if slot < 0:
                assert not out[b].any()
                continue
            torch.testing.assert_close(out[b], decoding.exact(slot, tokens[b]), rtol=1e-4, atol=2e-5)
        for slot in rows:
            if slot >= 0:
                if lengths[slot] - folded[slot] + 2 * decoding.window > decoding.cache.ring:
                    folded[slot] = lengths[slot]
                lengths[slot] += kept[slot]
    assert lengths.min() > 2 * decoding.cache.ring
