"""Configuration of a Llama in which some layers are Mamba mixers, for transformers.

A copy of this file travels with every saved model, so it imports nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

MIXERS = ("mamba1", "mamba2")


class HybridLlamaConfig(PreTrainedConfig):
    """Fields and defaults are those of `hybrid.config.HybridConfig`, whose config.json this reads and writes.

    The names that transformers expects (hidden_size, num_hidden_layers, …) lead to the same values. eos_token_ids:
    all tokens that end a reply; `eos_token_id` holds the same list, or None where there are none.
    """

    model_type = "hybrid_mamba_llama"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 49152,
        d_model: int = 576,
        n_layers: int = 30,
        n_heads: int = 9,
        n_kv_heads: int = 3,
        head_dim: int = 64,
        intermediate_size: int = 1536,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_ids: list[int] | tuple[int, ...] = (),
        pad_token_id: int | None = None,
        attention_layers: list[int] | tuple[int, ...] = (),
        d_conv: int = 4,
        conv_silu: bool = False,
        proj_bias: bool = True,
        mixer: str = "mamba2",
        d_state: int | None = None,
        ngroups: int | None = None,
        mixer_rope: bool = False,
        mixer_window: int = 0,
        dt_rank: int | None = None,
        gqa_mapping: str = "heads",
        attention_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        no_rope_layers: list[int] | tuple[int, ...] = (),
        reads_features: bool = False,
        family: str = "llama",
        **kwargs: Any,
    ) -> None:
        if mixer not in MIXERS:
            raise ValueError(f"mixer {mixer!r} is not supported; supported: {', '.join(MIXERS)}")
        if reads_features:
            raise ValueError(
                "a draft that reads another model's features is no model by itself: decode with mamballama"
            )
        if gqa_mapping != "heads":
            raise ValueError(
                f"gqa_mapping {gqa_mapping!r} is not supported here; supported: 'heads'; "
                "hybrid.load_pretrained reads it"
            )
        if mixer_window:
            raise ValueError(
                f"mixers that see {mixer_window} tokens by attention (mixer_window) are not supported here; "
                "hybrid.load_pretrained reads them"
            )
        eos_token_id = kwargs.pop("eos_token_id", None)
        if not eos_token_ids and eos_token_id is not None:
            eos_token_ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope: dict[str, Any] = rope or {"rope_type": "default", "rope_theta": 10000.0}
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_ids = list(eos_token_ids)
        self.eos_token_id = list(eos_token_ids) or None
        self.pad_token_id = pad_token_id
        self.attention_layers = list(attention_layers)
        self.d_conv = d_conv
        self.conv_silu = conv_silu
        self.proj_bias = proj_bias
        self.mixer = mixer
        self.d_state = d_state
        self.ngroups = ngroups
        self.mixer_rope = mixer_rope
        self.mixer_window = mixer_window
        self.dt_rank = dt_rank
        self.gqa_mapping = gqa_mapping
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.sliding_window = sliding_window
        self.no_rope_layers = list(no_rope_layers)
        self.reads_features = reads_features
        self.family = family
        super().__init__(**kwargs)

    @property
    def groups(self) -> int:
        """Groups of x and B in the mixers."""
        return self.n_kv_heads if self.ngroups is None else self.ngroups

    @property
    def state_size(self) -> int:
        """N: state numbers per channel."""
        if self.d_state is not None:
            return self.d_state
        return 16 if self.mixer == "mamba1" else self.head_dim

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields, also those that have their defaults: the file is read without this class, too."""
        return self.to_dict()
