"""A Mamba-2 student as a plain `BambaForCausalLM`, which transformers, vLLM and llama.cpp's converter know.

Bamba gives each of its groups one B, one C and one norm. The student has C and the norm by head and x and B by
group of heads, so the export has one group for each head, with the rows of x and B repeated: the same numbers.

**Students without SiLU after the convolution.** Bamba applies SiLU there in any case. Near zero it is linear:

    silu(2hu) = h·u·(1 + h·u − …)  for a small h

So the convolution is made 2h times as large, with an h_x for x and one h for B and C. What the mixer feeds to its norm
then comes out s = h_x·h² times as large (D is multiplied by s / h_x, so that its term agrees). RMSNorm forgets the
factor if its eps is multiplied by s², and as all norms share one eps, the residual stream is made s times as large too,
by what writes to it: embedding, o_proj, out_proj, down_proj. All factors are powers of two, so every weight keeps its
digits, and s is as small as s²·eps can be in float32, 2⁻⁵⁴ where eps is 10⁻⁵. float16 cannot hold such numbers; float32
and bfloat16 can.

By default B and C are there twice, once negated, in a state of twice the size. Then

    silu(2hC)·silu(2hB) + silu(−2hC)·silu(−2hB) = 2h²·C·B·(1 + h²·C·B − …)

has no error of first order, s is 2·h_x·h², h = 2⁻¹⁴ is small enough, and h_x can be 2⁻²⁷: the logits differ by rounding
alone. `compact` keeps the state as it is, with h = h_x = 2⁻¹⁸ and an error of 4·10⁻⁶·u in an activation u: more than
the rounding of float32, far less than that of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.export.errors import refuse
from hybrid.init_map import in_proj_rows

TRANSFORMERS = "5.23"
"""The first release whose Bamba normalises by groups, as vLLM and mamba-ssm do; older ones take one group."""
SMALLEST_EPS = -125
"""Binary logarithm; float32 is normal from −126 on, and what is smaller may count as zero."""
PAIRED = 14
"""−log₂ h where B and C are there twice."""


def check(config: HybridConfig) -> None:
    """Raises CannotExport with every reason against an export."""
    reasons = []
    if config.mamba_layers and config.mixer != "mamba2":
        reasons.append(f'its mixers are {config.mixer}, Bamba\'s are Mamba-2 (init_from_attention.mixer = "mamba2")')
    if config.mamba_layers and config.mixer_rope:
        reasons.append("B and C are rotated by position, which Bamba does not do (init_from_attention.rope = false)")
    if config.mamba_layers and config.mixer_window:
        reasons.append(
            f"its mixers also see the last {config.mixer_window} tokens by attention, Bamba's do not "
            "(init_from_attention.window = 0)"
        )
    if config.n_heads * config.head_dim != config.d_model:
        reasons.append(
            f"{config.n_heads} heads of {config.head_dim} make {config.d_inner} channels, and Bamba's attention has as "
            f"many as the model is wide, {config.d_model}"
        )
    if config.qk_norm:
        reasons.append("its attention normalises q and k, Bamba's does not")
    if config.sliding_window is not None:
        reasons.append(f"its attention sees a window of {config.sliding_window} tokens, Bamba's sees all")
    if set(config.no_rope_layers) & set(config.attention_layers):
        reasons.append(f"the attention of layers {list(config.no_rope_layers)} has no rotary positions, Bamba's has")
    if not config.attention_layers:
        reasons.append("it has no layer of attention, and transformers' cache of a Bamba needs one")
    if config.reads_features:
        reasons.append("it is a draft that reads another model's features")
    refuse("Bamba", reasons)


@dataclass(frozen=True)
class Scales:
    """How many times as large the export's numbers are; all 1 where the student has SiLU itself."""

    x: float = 1.0
    BC: float = 1.0
    stream: float = 1.0
    copies: int = 1
    """Of B and C in the state; the second is negated."""


def scales(config: HybridConfig, compact: bool) -> Scales:
    if config.conv_silu or not config.mamba_layers:
        return Scales()
    total = math.floor((math.log2(config.rms_norm_eps) - SMALLEST_EPS) / 2)
    BC = total // 3 if compact else PAIRED
    x = total - 2 * BC + (not compact)  # two copies add up to twice the product
    return Scales(2.0**-x, 2.0**-BC, 2.0**-total, 1 if compact else 2)


def bamba_config(config: HybridConfig, dtype: torch.dtype, compact: bool = False) -> dict[str, Any]:
    """config.json of the export."""
    scale = scales(config, compact)
    return {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps * scale.stream**2,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope | {"partial_rotary_factor": 1.0},
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "attn_layer_indices": list(config.attention_layers),
        "mamba_n_heads": config.n_heads,
        "mamba_d_head": config.head_dim,
        "mamba_n_groups": config.n_heads,
        "mamba_d_state": scale.copies * config.head_dim,
        "mamba_d_conv": config.d_conv,
        "mamba_expand": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": config.proj_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }


def bamba_weights(
    config: HybridConfig, weights: Mapping[str, Tensor], compact: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the export, one after the other, of a student's weights by name."""
    scale = scales(config, compact)

    def read(name: str, factor: float = 1.0) -> Tensor:
        return weights[name] * factor

    yield "model.embed_tokens.weight", read("model.embed_tokens.weight", scale.stream)
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", read(f"{prefix}input_layernorm.weight")
        yield f"{prefix}pre_ff_layernorm.weight", read(f"{prefix}post_attention_layernorm.weight")
        for projection in ("gate_proj", "up_proj"):
            yield f"{prefix}feed_forward.{projection}.weight", read(f"{prefix}mlp.{projection}.weight")
        yield f"{prefix}feed_forward.down_proj.weight", read(f"{prefix}mlp.down_proj.weight", scale.stream)
        if layer not in config.attention_layers:
            yield from _mixer(config, weights, f"{prefix}mamba.", scale)
            continue
        for projection in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias") if config.attention_bias else ("weight",):
                name = f"{prefix}self_attn.{projection}.{kind}"
                yield name, read(name)
        out = read(f"{prefix}self_attn.o_proj.weight", scale.stream)
        yield f"{prefix}self_attn.o_proj.weight", out
        if config.attention_bias:
            yield f"{prefix}self_attn.o_proj.bias", out.new_zeros(config.d_model)
    if config.tie_word_embeddings:  # the head is as small as the embedding
        yield "model.final_layernorm.weight", read("model.norm.weight", 1 / scale.stream)
    else:
        yield "model.final_layernorm.weight", read("model.norm.weight")
        yield "lm_head.weight", read("lm_head.weight")


def _mixer(
    config: HybridConfig, weights: Mapping[str, Tensor], prefix: str, scale: Scales
) -> Iterator[tuple[str, Tensor]]:
    rows = in_proj_rows(config)

    def heads(t: Tensor) -> Tensor:
        """(H, P, ·) of the rows of heads or groups, those of a group once for each of its heads."""
        t = t.unflatten(0, (-1, config.head_dim))
        return t.repeat_interleave(config.n_heads // len(t), dim=0)

    def state(t: Tensor) -> Tensor:
        """Rows of B or C, copies next to each other in each head."""
        return heads(t).repeat(1, scale.copies, *[1] * (t.ndim - 1)).flatten(0, 1)

    def signed(t: Tensor) -> Tensor:
        """`state` of the convolution of B or C."""
        signs = t.new_tensor([1.0, -1.0][: scale.copies]).repeat_interleave(config.head_dim).repeat(config.n_heads)
        return state(t) * (_before_silu(scale.BC) * signs).view(-1, *[1] * (t.ndim - 1))

    for kind in ("weight", "bias") if config.proj_bias else ("weight",):
        t = weights[f"{prefix}in_proj.{kind}"]
        parts = (t[rows["z"]], heads(t[rows["x"]]).flatten(0, 1), state(t[rows["B"]]), state(t[rows["C"]]))
        yield f"{prefix}in_proj.{kind}", torch.cat([*parts, t[rows["dt"]]])
    for kind in ("weight", "bias"):
        x, B, C = weights[f"{prefix}conv1d.{kind}"].split((config.d_xb, config.d_xb, config.d_inner))
        x = heads(x).flatten(0, 1) * _before_silu(scale.x)
        yield f"{prefix}conv1d.{kind}", torch.cat([x, signed(B), signed(C)])
    for name in ("dt_bias", "A_log", "norm.weight"):
        yield prefix + name, weights[prefix + name]
    yield f"{prefix}D", weights[f"{prefix}D"] * (scale.stream / scale.x)
    out = weights[f"{prefix}out_proj.weight"] * scale.stream
    yield f"{prefix}out_proj.weight", out
    if config.proj_bias:
        yield f"{prefix}out_proj.bias", out.new_zeros(config.d_model)


def _before_silu(scale: float) -> float:
    """2h of the module's text; 1 where SiLU is the student's own."""
    return 1.0 if scale == 1.0 else 2 * scale
