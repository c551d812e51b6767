"""`mamba_config.json` and the base model's config.json as one `HybridConfig`."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hybrid.config import HybridConfig, UnsupportedModel

MAMBA_CONFIG = "mamba_config.json"
GATED_NORM_EPS = 1e-5
"""Of the norm in a Mamba-2 mixer, whatever the base's is."""
DEFAULT_EXPAND = 2

Mixer = Literal["mamba1", "mamba2"]

# What ssm_cfg may say, with the defaults of the code that reads it: what makes a mixer's form, what is supported with
# this value alone, and what has no effect on a trained model.
_FORM: dict[Mixer, dict[str, Any]] = {
    "mamba1": {"d_state": 16, "d_conv": 4, "dt_rank": "auto"},
    "mamba2": {"d_state": 128, "d_conv": 4, "ngroups": 1},
}
_FIXED: dict[Mixer, dict[str, Any]] = {
    "mamba1": {
        "repeat_kv_before_conv": True,
        "conv_bias": True,
        "proj_x_bias": False,
        "proj_z_bias": False,
        "out_proj_bias": False,
    },
    "mamba2": {
        "repeat_kv_before_conv": False,
        "conv_bias": True,
        "bias": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "D_has_hdim": False,
        "d_ssm": None,
    },
}
_WITHOUT_EFFECT = (
    *("expand", "headdim", "conv_init", "A_init_range", "dt_init", "dt_min", "dt_max", "dt_scale", "dt_init_floor"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path"),
)


def read_config(source: Path, base: Path | None, weights: Collection[str]) -> HybridConfig:
    """weights: the names of the checkpoint's weights, which tell Mamba-1 from Mamba-2 and M1 from MambaInLlama.

    Raises FileNotFoundError, UnsupportedModel or, where the files contradict each other, ValueError.
    """
    settings = _read(source, MAMBA_CONFIG)
    folder = next((f for f in (source, base) if f is not None and (f / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{source}: no config.json; name a folder that has the base model's by --base")
    llama = _llama(folder)
    try:
        ssm = settings["ssm_cfg"] or {}
        inner = settings.get("d_inner") or ssm.get("expand", DEFAULT_EXPAND) * settings["d_model"]
        claims = {
            "d_model": (settings["d_model"], llama.d_model),
            "d_inner": (inner, llama.d_inner),
            "d_xb": (settings["d_xb"], llama.d_xb),
            "intermediate_size": (settings["intermediate_size"], llama.intermediate_size),
            "n_layer": (settings["n_layer"], llama.n_layers),
            "rms_norm_eps": (settings["rms_norm_eps"], llama.rms_norm_eps),
            "hidden_act": (settings["hidden_act"], "silu"),
        }
        attention = tuple(sorted(settings["attn_layers"]))
    except KeyError as error:
        raise ValueError(f"{source / MAMBA_CONFIG}: has no {error}") from None
    wrong = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in claims.items() if theirs != ours]
    if wrong:
        raise ValueError(f"{source / MAMBA_CONFIG}: contradicts {folder / 'config.json'}: {', '.join(wrong)}")
    mixer: Mixer = "mamba1" if any(name.endswith(".mamba.dt_proj.weight") for name in weights) else "mamba2"
    form = _mixer_form(mixer, ssm, llama, source / MAMBA_CONFIG)
    if any(".mha." in name for name in weights):
        form["rope"] = {"rope_type": "default", "rope_theta": llama.rope["rope_theta"]}
    return replace(llama, attention_layers=attention, mixer=mixer, conv_silu=True, proj_bias=False, **form)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is not there; a checkpoint of MambaInLlama or M1 has one")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got a {type(found).__name__}")
    return found


def _llama(folder: Path) -> HybridConfig:
    """The base model's configuration; every token that ends a reply by config.json or generation_config.json ends
    one."""
    raw = _read(folder, "config.json")
    files = [raw]
    if (folder / "generation_config.json").is_file():
        files.append(_read(folder, "generation_config.json"))
    ends: set[int] = set()
    for said in (file.get("eos_token_id") for file in files):
        ends.update(said if isinstance(said, list) else [] if said is None else [said])
    try:
        return HybridConfig.from_dict(raw | {"eos_token_id": sorted(ends)})
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: has no {error}") from None


def _mixer_form(mixer: Mixer, ssm: dict[str, Any], llama: HybridConfig, path: Path) -> dict[str, Any]:
    """Fields of HybridConfig; refuses what these mixers could be but ours are not."""
    form, fixed = _FORM[mixer], _FIXED[mixer]
    for name, value in ssm.items():
        if name in fixed and value != fixed[name]:
            raise UnsupportedModel(f"{path}: ssm_cfg has {name} {value}; supported: {fixed[name]}")
        if name not in (*form, *fixed, *_WITHOUT_EFFECT):
            known = ", ".join((*form, *fixed, *_WITHOUT_EFFECT))
            raise UnsupportedModel(f"{path}: ssm_cfg has {name}, which no {mixer} mixer has; known: {known}")
    said = {name: ssm.get(name, default) for name, default in form.items()}
    if mixer == "mamba1":
        rank = None if said["dt_rank"] == "auto" else said["dt_rank"]
        return {"d_state": said["d_state"], "d_conv": said["d_conv"], "dt_rank": rank, "ngroups": llama.n_heads}
    if (said["ngroups"], said["d_state"]) != (llama.n_heads, llama.head_dim):
        raise UnsupportedModel(
            f"{path}: ssm_cfg has ngroups {said['ngroups']} and d_state {said['d_state']}; supported: the base's "
            f"number of heads {llama.n_heads} and their width {llama.head_dim}"
        )
    if llama.rms_norm_eps != GATED_NORM_EPS:
        raise UnsupportedModel(
            f"{path}: rms_norm_eps is {llama.rms_norm_eps}, but that of the mixers' own norm is {GATED_NORM_EPS} in "
            "these checkpoints; supported: the same in both"
        )
    return {"d_conv": said["d_conv"]}
