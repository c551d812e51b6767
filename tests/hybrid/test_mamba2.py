"""The mixer against transformers' Bamba mixer and against the definition of masked linear attention with decay.

Bamba's heads have each their own x; B and C belong to groups, and the norm runs over d_inner / n_groups channels. With
as many groups as heads every head has its own B and C and its own norm, as here. What is shared here by the heads of a
key-value group (x and B) is repeated there, row by row of the projection and channel by channel of the convolution:

    ours    z (H·P) | x (G·P)           | B (G·N)           | C (H·N) | dt (H)
    Bamba   z (H·P) | x (H·P), repeated | B (H·N), repeated | C (H·N) | dt (H)
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid.attention import rope_frequencies
from hybrid.init_map import in_proj_rows
from hybrid.mamba2 import Mamba2Mixer
from tests.hybrid import tiny_hybrid
from tests.hybrid.tiny_hybrid import tokens

ROTARY = {"attention_layers": (1,), "mixer_rope": True}


def random_mixer(**changes) -> Mamba2Mixer:
    return tiny_hybrid.model(3, **changes).model.layers[0].mamba


def by_head(t: Tensor, mixer: Mamba2Mixer) -> Tensor:
    """Rows (G·P, …) of a group repeated for each of its heads: (H·P, …)."""
    config = mixer.config
    grouped = t.unflatten(0, (config.n_kv_heads, config.head_dim))
    return grouped.repeat_interleave(config.n_heads // config.n_kv_heads, dim=0).flatten(0, 1)


def bamba_of(mixer: Mamba2Mixer):
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer

    config = mixer.config
    bamba = BambaMixer(
        BambaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=1,
            mamba_n_heads=config.n_heads,
            mamba_d_head=config.head_dim,
            mamba_n_groups=config.n_heads,
            mamba_d_state=config.head_dim,
            mamba_d_conv=config.d_conv,
            mamba_expand=config.d_inner // config.d_model,
            mamba_chunk_size=16,
            mamba_proj_bias=config.proj_bias,
            rms_norm_eps=config.rms_norm_eps,
        ),
        layer_idx=0,
    ).eval()
    weights = dict(mixer.named_parameters())
    rows = in_proj_rows(config)
    channels = dict(zip("xBC", weights["conv1d.weight"].split((config.d_xb, config.d_xb, config.d_inner)), strict=True))
    biases = dict(zip("xBC", weights["conv1d.bias"].split((config.d_xb, config.d_xb, config.d_inner)), strict=True))

    def projected(t: Tensor) -> Tensor:
        parts = {name: t[rows[name]] for name in rows}
        return torch.cat([parts["z"], by_head(parts["x"], mixer), by_head(parts["B"], mixer), parts["C"], parts["dt"]])

    mapped = {
        "in_proj.weight": projected(weights["in_proj.weight"]),
        "conv1d.weight": torch.cat([by_head(channels["x"], mixer), by_head(channels["B"], mixer), channels["C"]]),
        "conv1d.bias": torch.cat([by_head(biases["x"], mixer), by_head(biases["B"], mixer), biases["C"]]),
        **{name: weights[name] for name in ("dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")},
    }
    if config.proj_bias:  # Bamba's switch also gives out_proj a bias, which ours has not
        mapped |= {"in_proj.bias": projected(weights["in_proj.bias"]), "out_proj.bias": torch.zeros(config.d_model)}
    bamba.load_state_dict(mapped)
    assert bamba.norm.group_size == config.head_dim
    return bamba


@pytest.mark.parametrize("n_kv_heads", [2, 6, 1])
@pytest.mark.parametrize("proj_bias", [True, False])
def test_is_bambas_mixer(proj_bias, n_kv_heads):
    mixer = random_mixer(conv_silu=True, proj_bias=proj_bias, n_kv_heads=n_kv_heads)
    hidden = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(0))
    ours, theirs = mixer(hidden), bamba_of(mixer)(hidden)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_are_bambas():
    mixer = random_mixer(conv_silu=True)
    bamba = bamba_of(mixer)
    hidden = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(1))
    gradients = []
    for module in (mixer.requires_grad_(), bamba.requires_grad_()):
        given = hidden.clone().requires_grad_()
        (module(given) * weights).sum().backward()
        own = dict(module.named_parameters())
        gradients.append(
            [given.grad, *(own[n].grad for n in ("A_log", "dt_bias", "D", "norm.weight", "out_proj.weight"))]
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("mixer_rope", [False, True])
def test_is_masked_linear_attention_with_decay(mixer_rope):
    """y_t = Σ_{s ≤ t} exp(A Σ_{s<r≤t} dt_r) dt_s (C_t·B_s) x_s + D x_t, gated and normed head by head: written out.

    With mixer_rope C_t·B_s is Re Σ_j C_tj · conj(B_sj) · exp(i θ_j (t − s)) over the pairs (j, j + N/2) of channels.
    """
    mixer = random_mixer(conv_silu=False, mixer_rope=mixer_rope)
    config = mixer.config
    with torch.no_grad():  # the identity convolution
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, 0, -1] = 1.0
        mixer.conv1d.bias.zero_()
    hidden = torch.randn(2, 21, 48, generator=torch.Generator().manual_seed(0))
    rows = in_proj_rows(config)
    projected = torch.nn.functional.linear(hidden, mixer.in_proj.weight, mixer.in_proj.bias).double()
    z, x, B, C, dt = (projected[..., rows[name]] for name in ("z", "x", "B", "C", "dt"))
    ratio = config.n_heads // config.n_kv_heads
    x, B = (t.unflatten(-1, (2, 8)).repeat_interleave(ratio, dim=2) for t in (x, B))  # (b, l, H, P)
    C = C.unflatten(-1, (6, 8))
    dt = torch.nn.functional.softplus(dt + mixer.dt_bias)
    elapsed = torch.cumsum(dt, dim=1)  # (b, l, H)
    decay = torch.exp(-torch.exp(mixer.A_log.double()) * (elapsed[:, :, None] - elapsed[:, None, :]))
    scores = torch.einsum("bthn,bshn->btsh", C, B)
    if mixer_rope:
        B, C = (torch.complex(*t.chunk(2, dim=-1)) for t in (B, C))
        apart = torch.arange(21)[:, None] - torch.arange(21)
        turns = torch.exp(1j * apart[..., None] * rope_frequencies(config).double())
        scores = torch.einsum("bthn,bshn,tsn->btsh", C, B.conj(), turns).real
    weights = scores * decay * dt[:, None] * torch.ones(21, 21).tril()[..., None]
    y = torch.einsum("btsh,bshp->bthp", weights, x) + mixer.D[:, None] * x
    gated = y * torch.nn.functional.silu(z.unflatten(-1, (6, 8)))
    normed = gated / (gated.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    wanted = normed.flatten(-2) * mixer.norm.weight
    torch.testing.assert_close(mixer.features(hidden).double(), wanted, rtol=1e-4, atol=1e-4)


def test_later_tokens_change_nothing_before():
    mixer = random_mixer()
    hidden = torch.randn(1, 70, 48, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, 66:] += 1.0
    torch.testing.assert_close(mixer(changed)[:, :66], mixer(hidden)[:, :66], rtol=0, atol=1e-6)
    assert (mixer(changed)[:, 66] - mixer(hidden)[:, 66]).abs().max() > 1e-2


def test_rope_changes_all_but_the_first_token():
    plain, rotary = random_mixer(), random_mixer(mixer_rope=True)
    hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotary(hidden)[:, 0], plain(hidden)[:, 0])
    assert (rotary(hidden) - plain(hidden))[:, 1:].abs().amax(dim=(0, 2)).min() > 1e-2


def test_packed_rotary_mixers_are_unpacked_ones():
    """Positions start anew with each document: far into a row, half precision would not know neighbours apart."""
    mixer = random_mixer(mixer_rope=True)
    lengths = [1, 13, 70, 5]
    hidden = torch.randn(1, sum(lengths), 48, generator=torch.Generator().manual_seed(0))
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int()
    for packed, alone in zip(mixer(hidden, seq_idx).split(lengths, dim=1), hidden.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(packed, mixer(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [[1] * 41, [17, 1, 1, 16, 6]], ids=str)
def test_rotary_prefill_and_steps_are_the_full_pass(calls):
    model = tiny_hybrid.model(**ROTARY)
    text, cache = tokens(2, 41), model.new_cache(2, 41)
    parts = [model(part, cache=cache) for part in text.split(calls, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 4])
def test_rotary_windows_are_the_full_pass(window):
    """Rows of unequal prompts, a padding row between them; all but one token of a window of four is kept."""
    model = tiny_hybrid.model(**ROTARY)
    text, kept = tokens(3, 60), max(1, window - 1)
    cache = model.new_cache(3, 64, window=window, ring=2 * window)
    starts = torch.tensor([5, 20, 9])
    model(text[:, :20], cache=cache, counts=starts)
    slots = torch.tensor([0, -1, 2], dtype=torch.int32)
    wanted = model(text)
    untouched = [
        (layer, {name: t[1].clone() for name, t in vars(layer).items() if t is not None and name != "A"})
        for layer in cache.layers
    ]
    for round_ in range(9):
        at = [int(start) + round_ * kept for start in starts]
        given = torch.stack([row[p : p + window] for row, p in zip(text, at, strict=True)])
        logits = model.decode(given, cache, slots).view(3, window, -1)
        for row in (0, 2):
            torch.testing.assert_close(logits[row], wanted[row, at[row] : at[row] + window], rtol=1e-4, atol=1e-4)
        length, folded = cache.cursors.lengths, cache.cursors.folded
        due = length - folded + 2 * window > 2 * window
        folded.copy_(torch.where(due, length, folded))
        length += kept
    for layer, before in untouched:
        assert all(torch.equal(getattr(layer, name)[1], tensor) for name, tensor in before.items())


def test_rotary_mixers_compile_in_one_piece():
    mixer = random_mixer(mixer_rope=True).requires_grad_()
    hidden, seq_idx = torch.randn(1, 12, 48), torch.tensor([[0] * 5 + [1] * 7])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (mixer, compiled):
        out = call(hidden, seq_idx)
        gradients.append((out, *torch.autograd.grad(out.pow(2).sum(), list(mixer.parameters()))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_rotary_mixers_are_captured_in_a_graph():
    """Nothing is copied to the device and nothing waits for it."""
    mixer = random_mixer(mixer_rope=True, head_dim=16).cuda()
    hidden, seq_idx = torch.randn(1, 12, 48, device="cuda"), torch.tensor([[0] * 5 + [1] * 7], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mixer(hidden, seq_idx)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixer(hidden, seq_idx)
    hidden.neg_()
    graph.replay()
    assert torch.equal(out, mixer(hidden, seq_idx))
