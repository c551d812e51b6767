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
from torch import Tensor

from hybrid.attention import Attention
from hybrid.config import HybridConfig
from hybrid.mamba2 import Mamba2Mixer
from hybrid.model import HybridForCausalLM

Method = Literal["paper", "copy"]


def in_proj_rows(config: HybridConfig) -> dict[str, slice]:
    """Rows of a mixer's in_proj by what they produce: z, x, B, C, dt."""
    rows, start = {}, 0
    for name, size in (
        ("z", config.d_inner),
        ("x", config.d_xb),
        ("B", config.d_xb),
        ("C", config.d_inner),
        ("dt", config.n_heads),
    ):
        rows[name] = slice(start, start + size)
        start += size
    return rows


def from_attention(
    base: HybridForCausalLM,
    attention_layers: tuple[int, ...],
    method: Method = "copy",
    *,
    gate_bias: float = 3.0,
    gate_scale: float = 0.1,
    a_min: float = 8.0,
    a_max: float = 64.0,
    rope: bool = False,
    ngroups: int | None = None,
    seed: int = 0,
) -> HybridForCausalLM:
    """A student with mixers in all layers but `attention_layers`; shares no tensor with `base`.

    base: the teacher, or a student that keeps more attention: its mixers and all else stay as they were trained, and
    new mixers are made of its own attention, as the released code does from one ratio to the next (there embeddings,
    final norm and head fall back to the teacher's). Raises ValueError if `base` lacks attention that is to be kept, or
    if its mixers were made by a method of another form.

    `paper`: convolution, gate and dt weights as PyTorch draws them, SiLU on x, B, C, A ~ U(1, 16), as the released
    code. `copy`: identity convolution without SiLU, gate held open by silu(z + gate_bias) with z weights times
    gate_scale, A spread geometrically over [a_min, a_max]. In both dt_bias puts dt log-uniform in [1e-3, 0.1]. Mixers
    are float32. rope: their B and C are rotated by position, as the k and q that they come from. ngroups: groups of x
    and B, as `HybridConfig`'s; more than attention has begin as copies.
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
        proj_bias=method != "paper",
        mixer_rope=rope,
        ngroups=ngroups,
    )
    if base.config.mamba_layers and replace(config, attention_layers=base.config.attention_layers) != base.config:
        raise ValueError(
            f"method {method!r}, rope {str(rope).lower()} and ngroups {config.groups} make mixers of another form than "
            "those that are carried over: variants that continue from one another need one "
            "init_from_attention.method, `paper` or another, one init_from_attention.rope and one "
            "init_from_attention.ngroups"
        )
    with torch.device("meta"):
        student = HybridForCausalLM(config)
    shared = {name: p.detach().clone() for name, p in base.named_parameters()}
    names = {name for name, _ in student.named_parameters()}
    student.load_state_dict({n: p for n, p in shared.items() if n in names}, strict=False, assign=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in new_mixers(base, student):
            mixer = Mamba2Mixer(config)
            _init_new_parts(mixer, config, method, gate_bias, gate_scale, a_min, a_max)
            copy_projections(base.blocks[layer].self_attn, mixer)
            student.blocks[layer].mamba = mixer.to(base.device)
    student.inv_freq = base.inv_freq.clone()
    verify(base, student)
    return student.requires_grad_(False).eval()


def new_mixers(base: HybridForCausalLM, student: HybridForCausalLM) -> tuple[int, ...]:
    """Layers whose attention in `base` became a mixer in the student."""
    return tuple(i for i in student.config.mamba_layers if i in base.config.attention_layers)


@torch.no_grad()
def copy_projections(attention: Attention, mixer: Mamba2Mixer) -> None:
    for _, source, target in _map(attention, mixer):
        target.copy_(source)


def _map(attention: Attention, mixer: Mamba2Mixer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(projection, its weights as the mixer has them, the mixer's own); k and v once for each group that is made of
    them."""
    config, rows, weight = mixer.config, in_proj_rows(mixer.config), mixer.in_proj.weight

    def grouped(projection: Tensor) -> Tensor:
        heads = projection.unflatten(0, (config.n_kv_heads, config.head_dim))
        return heads.repeat_interleave(config.groups // config.n_kv_heads, dim=0).flatten(0, 1)

    yield "q_proj", attention.q_proj.weight, weight[rows["C"]]
    yield "k_proj", grouped(attention.k_proj.weight), weight[rows["B"]]
    yield "v_proj", grouped(attention.v_proj.weight), weight[rows["x"]]
    yield "o_proj", attention.o_proj.weight, mixer.out_proj.weight


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
        mixer = student.blocks[layer].mamba
        assert isinstance(mixer, Mamba2Mixer)
        for name, source, copied in _map(base.blocks[layer].self_attn, mixer):
            if not torch.equal(source.to(copied), copied):
                raise RuntimeError(f"layer {layer}: the mixer's weights differ from the {name} they were copied from")
    theirs = dict(base.named_parameters())
    new = tuple(f"model.layers.{layer}.mamba." for layer in made)
    for name, ours in student.named_parameters():
        if not name.startswith(new) and not torch.equal(theirs[name], ours):
            raise RuntimeError(f"{name} differs from what it was copied from")


@torch.no_grad()
def _init_new_parts(
    mixer: Mamba2Mixer,
    config: HybridConfig,
    method: Method,
    gate_bias: float,
    gate_scale: float,
    a_min: float,
    a_max: float,
) -> None:
    heads = config.n_heads
    dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).clamp(min=1e-4)
    mixer.dt_bias.copy_(inverse_softplus(dt))
    if method == "paper":
        mixer.A_log.copy_(torch.log(torch.empty(heads).uniform_(1, 16)))
        return
    rows = in_proj_rows(config)
    mixer.A_log.copy_(torch.linspace(math.log(a_min), math.log(a_max), heads))
    mixer.in_proj.weight[rows["z"]] *= gate_scale
    mixer.in_proj.bias.zero_()
    mixer.in_proj.bias[rows["z"]] = gate_bias
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    assert mixer.conv1d.bias is not None
    mixer.conv1d.bias.zero_()


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))
