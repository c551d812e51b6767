"""Checkpoints of jxiw/MambaInLlama (2408.15237, Mamba-1 and Mamba-2) and jxiw/M1 (2504.10449, Mamba-1).

A folder of theirs has the base model's config.json, which says nothing of the mixers, `mamba_config.json`, which does,
and the weights of the whole model. What the two files leave open, the weights' names tell. Of a layer with attention:

    MambaInLlama        self_attn.{q,k,v,o}_proj
    M1                  mha.in_proj (q, k, v), mha.out_proj

Of a mixer, besides conv1d, A_log, D and out_proj, and with Mamba-2 `norm`:

    MambaInLlama, 1     in_proj_z, in_proj_x, B_proj, C_proj, dt_proj_down; dt_proj with a bias
    M1                  in_proj (z, x, B, C, what dt_proj reads); dt_proj with a bias
    MambaInLlama, 2     in_proj (z, x, B, C, dt); dt_bias

In both Mamba-1 forms x and B are shared among heads by pieces of d_state channels instead of by heads, and x is
convolved only then, so that heads which share it have convolutions of their own. Here every head has its own rows of
in_proj for both (`ngroups` = n_heads), which are the shared ones repeated: the same numbers, with 2·(d_inner − d_xb)
rows more in each mixer.

M1's attention has the base's rope_theta but not its scaling of the rotary frequencies, in training as in inference;
MambaInLlama was trained with the base's own attention.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybrid.checkpoint import FLOAT32, copy_code, copy_tokenizer, save_weights, write_config
from hybrid.config import HybridConfig
from hybrid.imports.files import open_weights
from hybrid.imports.settings import MAMBA_CONFIG, read_config
from hybrid.model import HybridForCausalLM

SPLIT_IN_PROJ = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")


@dataclass(frozen=True)
class Recipe:
    """How one of our weights comes about: `make` of the weights that are named in `theirs`."""

    theirs: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


def convert(
    source: Path | str, out: Path | str, base: Path | str | None = None, dtype: torch.dtype | None = None
) -> HybridConfig:
    """Write the checkpoint in the folder `source` to a new folder `out` in this project's form.

    base: a folder with the base model's config.json and tokenizer, for what `source` lacks of them. dtype: of the
    weights, None keeps what the files have; A_log, dt_bias and D become float32 in any case. Holds one file of the
    result (1 GiB) and one weight at a time. Returns the configuration. Raises FileNotFoundError, FileExistsError,
    UnsupportedModel or, where files contradict each other, ValueError.
    """
    source, out, base = Path(source), Path(out), None if base is None else Path(base)
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder")
    weights = open_weights(source)
    config = read_config(source, base, weights)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in HybridForCausalLM(config).named_parameters()}
    recipes = {name: _recipe(name, config, weights) for name in shapes}
    _check_names(source, config, recipes, weights)

    types: set[torch.dtype] = set()

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, recipe in recipes.items():
            tensor = _made(source, recipe, weights, shapes[name])
            if name.endswith(FLOAT32):
                yield name, tensor.float()
            else:
                tensor = tensor if dtype is None else tensor.to(dtype)
                types.add(tensor.dtype)
                yield name, tensor

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        made = Path(unfinished) / "model"
        made.mkdir()
        save_weights(made, converted())
        write_config(made, config, torch.float32 if torch.float32 in types else types.pop())
        copy_code(made)
        for folder in (base, source):
            if folder is not None:
                copy_tokenizer(folder, made)
        made.rename(out)
    return config


def _recipe(name: str, config: HybridConfig, weights: Mapping[str, Tensor]) -> Recipe:
    layer, _, part = name.partition(".self_attn.")
    if part and f"{layer}.mha.in_proj.weight" in weights:
        projection, _, kind = part.partition(".")
        if projection == "o_proj":
            return Recipe((f"{layer}.mha.out_proj.{kind}",))
        d_kv = config.n_kv_heads * config.head_dim
        rows, index = (config.d_inner, d_kv, d_kv), "qkv".index(projection[0])
        return Recipe((f"{layer}.mha.in_proj.{kind}",), lambda joined: joined.split(rows)[index])
    layer, _, part = name.partition(".mamba.")
    if part and config.mixer == "mamba1":
        if part == "dt_bias":
            return Recipe((f"{layer}.mamba.dt_proj.bias",))
        if part == "in_proj.weight":
            split = tuple(f"{layer}.mamba.{piece}.weight" for piece in SPLIT_IN_PROJ)
            return Recipe((name,) if name in weights else split, lambda *theirs: _in_proj(config, torch.cat(theirs)))
    return Recipe((name,))


def _in_proj(config: HybridConfig, joined: Tensor) -> Tensor:
    """Rows z, x, B, C, dt with those of x and B repeated: piece i of d_state rows is what pieces i·R to i·R + R − 1 of
    the heads read, where R heads share a key-value head in attention."""
    d_xb = config.n_kv_heads * config.head_dim
    z, x, B, C, dt = joined.split((config.d_inner, d_xb, d_xb, config.d_inner, config.dt_size))

    def shared(rows: Tensor) -> Tensor:
        pieces = rows.unflatten(0, (-1, config.state_size))
        return pieces.repeat_interleave(config.n_heads // config.n_kv_heads, dim=0).flatten(0, 1)

    return torch.cat([z, shared(x), shared(B), C, dt])


def _check_names(source: Path, config: HybridConfig, recipes: dict[str, Recipe], weights: Mapping[str, Tensor]) -> None:
    found = {name for name in weights if not name.endswith("rotary_emb.inv_freq")}  # computed, not trained
    if config.tie_word_embeddings and "lm_head.weight" in found:
        if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise ValueError(
                f"{source}: config.json ties lm_head to the embeddings, but the two differ; set tie_word_embeddings to "
                "false in it"
            )
        found.discard("lm_head.weight")
    wanted = {name for recipe in recipes.values() for name in recipe.theirs}
    missing, surplus = sorted(wanted - found), sorted(found - wanted)
    if missing or surplus:
        raise ValueError(
            f"{source}: weights missing {missing[:3]}, not expected {surplus[:3]}; by {MAMBA_CONFIG} layers "
            f"{list(config.attention_layers)} are attention, by the weights the others are {config.mixer}"
        )


def _made(source: Path, recipe: Recipe, weights: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    theirs = [weights[name] for name in recipe.theirs]
    try:
        made = recipe.make(*theirs)
    except RuntimeError:
        made = None
    if made is None or made.shape != shape:
        found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(recipe.theirs, theirs, strict=True))
        raise ValueError(f"{source}: {found} cannot become {tuple(shape)}, which the configuration asks for")
    return made
