"""`HybridConfig`: a Llama and which of its layers are Mamba mixers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from hybrid.families import MODEL_TYPE, UnsupportedModel, settings

Mixer = Literal["mamba2", "mamba1"]
GQAMapping = Literal["heads", "legacy"]


@dataclass(frozen=True)
class HybridConfig:
    """Shapes of the model; names as in transformers' configurations and in mamba-ssm.

    The mixer of a replaced layer has d_inner = n_heads·head_dim, `groups` groups of x and B and n_heads heads of C.
    Mamba-2 has headdim = d_state = head_dim; Mamba-1 cuts B and C of a head into pieces of d_state channels.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    attention_layers: tuple[int, ...] = ()
    d_conv: int = 4
    conv_silu: bool = False
    """SiLU after the convolution, as in the paper's code; an identity convolution starts without it."""
    proj_bias: bool = True
    """Bias of the mixers' in_proj; it can hold the gate open."""
    mixer: Mixer = "mamba2"
    """What stands in place of attention in the replaced layers, the same in all of them."""
    d_state: int | None = None
    """State numbers per channel. Mamba-1: a divisor of head_dim, None is 16. Mamba-2: head_dim, which None is too."""
    ngroups: int | None = None
    """Groups of x and B in the mixers: None is attention's n_kv_heads; or a multiple of them that divides n_heads, so
    that heads which share keys and values in attention write states of their own."""
    mixer_rope: bool = False
    """Mamba-2 only: B and C are rotated by position as keys and queries are, so that C_t·B_s depends on t − s."""
    mixer_window: int = 0
    """Mamba-2 only: tokens, the token itself among them, that a mixer also sees by softmax attention with its own C, B
    and x, beside one learned sink; 0 is none."""
    dt_rank: int | None = None
    """Mamba-1 only: width of the projection that dt comes from; None is ceil(d_model / 16)."""
    gqa_mapping: GQAMapping = "heads"
    """Mamba-1 only: which x and B a head reads. `heads`: those of its group, as in attention. `legacy`: as the released
    checkpoints of 2408.15237, which repeat pieces of d_state channels instead of heads: with R = n_heads / n_kv_heads,
    piece i of all heads reads piece i // R of x and B; x is convolved only then, each head by its own weights."""
    family: str = "llama"
    """The teacher's, as transformers' model_type; see `hybrid.families`."""
    attention_bias: bool = False
    """Biases of q_proj, k_proj and v_proj, not of o_proj."""
    qk_norm: bool = False
    """RMSNorm over the head_dim numbers of each query and key, before they are rotated."""
    sliding_window: int | None = None
    """Tokens that attention sees, the token itself among them; None is all."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers whose queries and keys, or whose mixer's C and B, are not rotated by position."""
    reads_features: bool = False
    """A draft of `features:`: with each token it reads what the model it drafts for made of the token before."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.n_heads % self.groups or self.groups % self.n_kv_heads:
            raise ValueError(
                f"ngroups {self.groups} must be a multiple of n_kv_heads {self.n_kv_heads} and divide n_heads "
                f"{self.n_heads}"
            )
        wrong = [i for i in self.attention_layers if not 0 <= i < self.n_layers]
        if wrong:
            raise ValueError(f"attention_layers {wrong} do not exist; the model has layers 0 to {self.n_layers - 1}")
        wrong = [i for i in self.no_rope_layers if not 0 <= i < self.n_layers]
        if wrong:
            raise ValueError(f"no_rope_layers {wrong} do not exist; the model has layers 0 to {self.n_layers - 1}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be >= 1, or None for all tokens, got {self.sliding_window}")
        if self.mixer not in get_args(Mixer):
            raise UnsupportedModel(f"mixer {self.mixer!r} is not supported; supported: {', '.join(get_args(Mixer))}")
        if self.mixer == "mamba2" and self.d_state not in (None, self.head_dim):
            raise ValueError(f"d_state {self.d_state} of a mamba2 mixer must be head_dim {self.head_dim}; leave it out")
        if self.mixer == "mamba2" and self.dt_rank is not None:
            raise ValueError(f"dt_rank {self.dt_rank} belongs to mamba1; the mixer is mamba2: leave it out")
        if self.gqa_mapping not in get_args(GQAMapping):
            raise ValueError(f"gqa_mapping must be one of {', '.join(get_args(GQAMapping))}, got {self.gqa_mapping!r}")
        if self.gqa_mapping == "legacy" and (self.mixer != "mamba1" or self.ngroups is not None):
            raise ValueError(
                f"gqa_mapping 'legacy' belongs to mamba1 without ngroups; the mixer is {self.mixer}, ngroups "
                f"{self.ngroups}: leave gqa_mapping out"
            )
        if self.mixer != "mamba2" and self.mixer_rope:
            raise ValueError(f"mixer_rope belongs to mamba2; the mixer is {self.mixer}: leave it out")
        if self.mixer_window < 0 or (self.mixer_window and self.mixer != "mamba2"):
            raise ValueError(
                f"mixer_window must be at least 0 (none) and belongs to mamba2; it is {self.mixer_window} and the "
                f"mixer {self.mixer}"
            )
        if self.state_size < 1 or self.head_dim % self.state_size:
            raise ValueError(
                f"d_state {self.state_size} does not divide head_dim {self.head_dim}; set d_state to a divisor of it"
            )
        if self.dt_size < 1:
            raise ValueError(f"dt_rank must be >= 1, got {self.dt_size}")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        kept = set(self.attention_layers)
        return tuple(i for i in range(self.n_layers) if i not in kept)

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def d_features(self) -> int:
        """Channels that enter a mixer's out_proj: the scan's, and the window's where there is one."""
        return 2 * self.d_inner if self.mixer_window else self.d_inner

    @property
    def groups(self) -> int:
        """ngroups with its default filled in."""
        return self.n_kv_heads if self.ngroups is None else self.ngroups

    @property
    def d_xb(self) -> int:
        return self.groups * self.head_dim

    @property
    def scan_groups(self) -> int:
        """Groups of x and B that the scan and its caches see: under `legacy` every head has its own."""
        return self.n_heads if self.gqa_mapping == "legacy" else self.groups

    @property
    def conv_channels(self) -> int:
        """Mamba-2 convolves x, B and C; Mamba-1 only x, before the heads of a group share it, but see gqa_mapping."""
        return self.scan_groups * self.head_dim if self.mixer == "mamba1" else 2 * self.d_xb + self.d_inner

    @property
    def state_size(self) -> int:
        """N: d_state with its default filled in."""
        if self.d_state is not None:
            return self.d_state
        return 16 if self.mixer == "mamba1" else self.head_dim

    @property
    def dt_size(self) -> int:
        """Rows of in_proj that dt comes from: dt_rank with its default filled in; Mamba-2 has one per head."""
        if self.mixer == "mamba2":
            return self.n_heads
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank

    def of_layer(self, layer: int) -> HybridConfig:
        """What the mixer of that layer is made of: as the model's, but not rotary where the teacher's attention is
        not."""
        return replace(self, mixer_rope=False) if self.mixer_rope and layer in self.no_rope_layers else self

    def of_layers(self, layers: Sequence[int]) -> HybridConfig:
        """A model of these layers of this one, numbered anew."""

        def among(old: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(new for new, layer in enumerate(layers) if layer in old)

        return replace(
            self,
            n_layers=len(layers),
            attention_layers=among(self.attention_layers),
            no_rope_layers=among(self.no_rope_layers),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, "architectures": ["HybridForCausalLM"], **asdict(self)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> HybridConfig:
        """From this project's config.json or from transformers' of a family that is supported (`hybrid.families`).

        Raises UnsupportedModel for any other.
        """
        if raw.get("model_type") == MODEL_TYPE:
            known = {f.name for f in fields(cls)}
            values: dict[str, Any] = {k: v for k, v in raw.items() if k in known}
            values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
            return cls(**values)
        return cls(**settings(raw))

    @classmethod
    def from_folder(cls, folder: Path | str) -> HybridConfig:
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text()))
