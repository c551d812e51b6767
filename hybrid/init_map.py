"""From attention to Mamba: the one map q→C, k→B, v→x, o→out_proj (2408.15237 §2.2, Algorithm 1).

Everything that attention does not have (gate z, convolution, dt, A, D, norm) is drawn as the method says; everything
else (embeddings, MLP, norms, kept attention, mixers of an earlier student) is carried over as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hybrid.config import GQAMapping, HybridConfig, Mixer
from hybrid.mamba2 import Mamba2Mixer
from hybrid.mixer import MambaMixer
from hybrid.model import MIXERS, Block, HybridForCausalLM
from hybrid.rms_norm import RMSNorm

Method = Literal["paper", "copy"]


def in_proj_rows(config: HybridConfig) -> dict[str, slice]:
    """Rows of a mixer's in_proj by what they produce: z, x, B, C, dt; with Mamba-1 the last are what dt_proj reads."""
    rows, start = {}, 0
    for name, size in (
        ("z", config.d_features),
        ("x", config.d_xb),
        ("B", config.d_xb),
        ("C", config.d_inner),
        ("dt", config.dt_size),
    ):
        rows[name] = slice(start, start + size)
        start += size
    return rows


def from_attention(
    base: HybridForCausalLM,
    attention_layers: tuple[int, ...],
    method: Method = "copy",
    *,
    mixer: Mixer = "mamba2",
    gqa_mapping: GQAMapping = "heads",
    d_state: int | None = None,
    gate_bias: float = 3.0,
    gate_scale: float = 0.1,
    a_min: float = 8.0,
    a_max: float = 64.0,
    rope: bool = False,
    ngroups: int | None = None,
    window: int = 0,
    seed: int = 0,
    share: bool = False,
) -> HybridForCausalLM:
    """A student with mixers in all layers but `attention_layers`; shares no tensor with `base` unless `share`.

    base: the teacher, or a student that keeps more attention: its mixers and all else stay as they were trained, and
    new mixers are made of its own attention, as the released code does from one ratio to the next (there embeddings,
    final norm and head fall back to the teacher's). Raises ValueError if `base` lacks attention that is to be kept, or
    if its mixers were made by a method of another form.

    `paper`: convolution, gate and dt weights as PyTorch draws them, SiLU after the convolution, A ~ U(1, 16), as the
    released code. `copy`: identity convolution without SiLU, gate held open by silu(z + gate_bias) with z weights times
    gate_scale, A spread geometrically over [a_min, a_max]. In both, Mamba-1 mixers have A = 1 … N and dt_proj as
    `Mamba1Mixer` begins with them, dt_bias puts dt log-uniform in [1e-3, 0.1] by head (Mamba-1: by channel), biases
    of q, k and v become in_proj's, and norms of q and k are folded into the rows that are made of them. Mixers are
    float32. mixer, gqa_mapping, d_state and ngroups are `HybridConfig`'s; more groups than attention has begin as
    copies. rope: B and C of the mixers are rotated by position, as the k and q that they come from. window: tokens that
    mixers see by softmax attention besides; o_proj is then that of the scan's and of the window's channels, and in
    `copy` the window's gate is open by exactly 1. share: what is
    carried over is base's own tensors, for a student that is saved or scored beside it but not trained: memory then
    holds the weights once.
    """
    missing = sorted(set(attention_layers) - set(base.config.attention_layers))
    if missing:
        raise ValueError(
            f"attention of layers {missing} is to be kept, but they have none; "
            f"choose among layers {list(base.config.attention_layers)}"
        )
    config = replace(
        base.config,
        attention_layers=tuple(attention_layers),
        conv_silu=method == "paper",
        proj_bias=method != "paper" or base.config.attention_bias,
        mixer=mixer,
        gqa_mapping=gqa_mapping,
        d_state=d_state,
        mixer_rope=rope,
        ngroups=ngroups,
        mixer_window=window,
    )
    if base.config.mamba_layers and replace(config, attention_layers=base.config.attention_layers) != base.config:
        raise ValueError(
            f"method {method!r}, rope {str(rope).lower()} and ngroups {config.groups} with {mixer} (gqa_mapping "
            f"{gqa_mapping!r}, d_state {config.state_size}, window {window}) make mixers of another form than those "
            "that are carried over: variants that continue from one another need one init_from_attention.method, "
            "`paper` or another, and the same mixer, gqa_mapping, d_state, rope, window and ngroups in it"
        )
    with torch.device("meta"):
        student = HybridForCausalLM(config)
    names = {name for name, _ in student.named_parameters()}
    carried: dict[str, Tensor] = {n: p.detach() for n, p in base.named_parameters() if n in names}
    if not share:
        carried = {name: p.clone() for name, p in carried.items()}
    student.load_state_dict(carried, strict=False, assign=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in new_mixers(base, student):
            made = MIXERS[mixer](config.of_layer(layer))
            _init_new_parts(made, config, method, gate_bias, gate_scale, a_min, a_max)
            copy_projections(base.blocks[layer], made)
            student.blocks[layer].mamba = made.to(base.device)
    student.inv_freq = base.inv_freq.clone()
    verify(base, student)
    return student.requires_grad_(False).eval()


def new_mixers(base: HybridForCausalLM, student: HybridForCausalLM) -> tuple[int, ...]:
    """Layers whose attention in `base` became a mixer in the student."""
    return tuple(i for i in student.config.mamba_layers if i in base.config.attention_layers)


@torch.no_grad()
def copy_projections(block: Block, mixer: MambaMixer) -> None:
    for _, source, target in _map(block, mixer):
        target.copy_(source)


def _map(block: Block, mixer: MambaMixer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(projection, its weights or bias as the mixer has them, the mixer's own); k and v once for each group that is
    made of them."""
    config, rows, attention = mixer.config, in_proj_rows(mixer.config), block.self_attn
    gain = block.input_layernorm.weight

    def grouped(projection: Tensor) -> Tensor:
        heads = projection.unflatten(0, (config.n_kv_heads, config.head_dim))
        return heads.repeat_interleave(config.groups // config.n_kv_heads, dim=0).flatten(0, 1)

    for name, projection, norm, part in (
        ("q_proj", attention.q_proj, attention.q_norm, "C"),
        ("k_proj", attention.k_proj, attention.k_norm, "B"),
        ("v_proj", attention.v_proj, None, "x"),
    ):
        weight: Tensor = projection.weight
        bias: Tensor | None = projection.bias
        if norm is not None:
            scale = _folded_norm(projection, norm, gain)
            weight, bias = weight * scale[:, None], None if bias is None else bias * scale
        yield name, weight if part == "C" else grouped(weight), mixer.in_proj.weight[rows[part]]
        if bias is not None:
            yield f"{name}.bias", bias if part == "C" else grouped(bias), mixer.in_proj.bias[rows[part]]
    for columns in mixer.out_proj.weight.split(mixer.config.d_inner, dim=1):
        yield "o_proj", attention.o_proj.weight, columns


def _folded_norm(projection: nn.Linear, norm: RMSNorm, gain: Tensor) -> Tensor:
    """Factor of each row of a projection that stands for the RMSNorm of its heads, which mixers have not.

    The norm's own gain divided by the RMS that a head has on average, √(mean over its rows of ‖w · gain‖² + bias²), for
    inputs as the norm before the block gives them, gain times uncorrelated numbers of RMS 1. (H·P,) float32.
    """
    power = (projection.weight.float() * gain.float()).pow(2).sum(1)
    if projection.bias is not None:
        power = power + projection.bias.float().pow(2)
    heads = power.unflatten(0, (-1, len(norm.weight)))
    return (norm.weight.float() * torch.rsqrt(heads.mean(1, keepdim=True) + norm.eps)).flatten()


@torch.no_grad()
def scale_out_proj(base: HybridForCausalLM, student: HybridForCausalLM, factor: float) -> None:
    """Multiply out_proj of the new mixers: with a small factor their blocks start near x + mlp(norm(x)), and with them
    the residual stream near the identity (the principle of 2003.04887, which scales every branch by 0 at first)."""
    for layer in new_mixers(base, student):
        student.blocks[layer].mamba.out_proj.weight.mul_(factor)


def verify(base: HybridForCausalLM, student: HybridForCausalLM) -> None:
    """Raises RuntimeError unless every copied weight equals its source: a silent miss has cost others whole runs."""
    made = new_mixers(base, student)
    for layer in made:
        for name, source, copied in _map(base.blocks[layer], student.blocks[layer].mamba):
            if not torch.equal(source.to(copied), copied):
                raise RuntimeError(f"layer {layer}: the mixer's weights differ from the {name} they were copied from")
    theirs = dict(base.named_parameters())
    new = tuple(f"model.layers.{layer}.mamba." for layer in made)
    for name, ours in student.named_parameters():
        if not name.startswith(new) and not torch.equal(theirs[name], ours):
            raise RuntimeError(f"{name} differs from what it was copied from")


@torch.no_grad()
def _init_new_parts(
    mixer: MambaMixer,
    config: HybridConfig,
    method: Method,
    gate_bias: float,
    gate_scale: float,
    a_min: float,
    a_max: float,
) -> None:
    heads = config.n_heads
    if config.proj_bias:
        mixer.in_proj.bias.zero_()
    if isinstance(mixer, Mamba2Mixer):  # the other is made with steps and decays as in mamba-ssm
        dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).clamp(min=1e-4)
        mixer.dt_bias.copy_(inverse_softplus(dt))
        if method == "paper":
            mixer.A_log.copy_(torch.log(torch.empty(heads).uniform_(1, 16)))
        else:
            mixer.A_log.copy_(torch.linspace(math.log(a_min), math.log(a_max), heads))
    if method == "paper":
        return
    rows = in_proj_rows(config)
    mixer.in_proj.weight[rows["z"]] *= gate_scale
    mixer.in_proj.bias[rows["z"]] = gate_bias
    if isinstance(mixer, Mamba2Mixer) and config.mixer_window:
        mixer.norm.weight[config.d_inner :] = 1.0 / max(float(silu(torch.tensor(gate_bias))), 1e-3)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    assert mixer.conv1d.bias is not None
    mixer.conv1d.bias.zero_()


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))
