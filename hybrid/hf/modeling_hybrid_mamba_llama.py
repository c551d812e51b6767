"""A Llama in which some layers are Mamba mixers, for transformers: plain PyTorch, every device, no kernels.

A copy of this file travels with every saved model (`trust_remote_code=True`), so it imports nothing but torch and
transformers. Weights, names and numbers are those of `hybrid.model.HybridForCausalLM`, which decodes faster.

Shapes: B batch, L length, S cached and new tokens, H heads, G groups, P head_dim, N state, J = P / N pieces of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, scaled_dot_product_attention, silu, softplus
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hybrid_mamba_llama import HybridLlamaConfig

CHUNK_SIZE = 64


class HybridLlamaCache(Cache):
    """State of all layers after `length` tokens: (keys, values), both (B, n_kv_heads, S, P), for attention; (last
    inputs of the convolution (B, d_conv − 1, channels), state) for Mamba, the state float32 of shape (B, H, P, N) for
    Mamba-2 and (B, H·P, N) for Mamba-1.

    An SSM state cannot be taken back by a few tokens, so `crop` is refused, and with it assisted decoding.
    """

    is_compileable = False
    is_initialized = True

    def __init__(self, config: HybridLlamaConfig) -> None:
        self.layers: list[Any] = []
        self.offloading = False
        self.length = 0
        self.states: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layers

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0
        self.states = [None] * len(self.states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("the state of a Mamba layer cannot be taken back: decode without an assistant model")

    def _each(self, change: Any) -> None:
        self.states = [None if pair is None else (change(pair[0]), change(pair[1])) for pair in self.states]


class HybridLlamaRMSNorm(nn.Module):
    """weight · x / √(mean(x²) + eps), normalised in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class HybridLlamaGatedRMSNorm(nn.Module):
    """RMSNorm(y · silu(z)) over groups of `group_size` channels."""

    def __init__(self, size: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size, self.eps = group_size, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        grouped = (y.float() * silu(z.float())).unflatten(-1, (-1, self.group_size))
        normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(y.dtype)


def rope_frequencies(config: HybridLlamaConfig, device: torch.device) -> Tensor:
    """Inverse frequencies (P / 2,) of the types `default`, `linear` and `llama3`."""
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "default":
        return inv_freq
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported; supported: default, linear, llama3")
    trained = rope["original_max_position_embeddings"]
    turns = trained * inv_freq / (2 * math.pi)  # of each frequency over the trained context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: slowed by `factor`
    return (1 - kept) * inv_freq / rope["factor"] + kept * inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, ·, ·, P) by tables that broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class HybridLlamaAttention(nn.Module):
    def __init__(self, config: HybridLlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.ratio = config.n_heads // config.n_kv_heads
        self.is_rotary = layer not in config.no_rope_layers
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm = HybridLlamaRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = HybridLlamaRMSNorm(config.head_dim, config.rms_norm_eps)
        self.has_norm = config.qk_norm

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_live: Tensor | None,
        cache: HybridLlamaCache | None,
    ) -> Tensor:
        """hidden (B, L, d_model) → (B, L, d_model); mask (B, 1, L, S), True where visible, or None for plain causal."""
        q, k, v = (
            proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, L, H, P)
        if self.has_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.is_rotary:
            cos, sin = (table[:, :, None].to(q.dtype) for table in rope)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, P)
        if cache is not None:
            if (before := cache.states[self.layer]) is not None:
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            cache.states[self.layer] = (k, v)
        k, v = (t.repeat_interleave(self.ratio, dim=1) for t in (k, v))
        is_causal = mask is None and q.shape[2] > 1
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class HybridLlamaMixer(nn.Module):
    """What both mixers share: projections, convolution, state. `is_live` (B, L) is False for padding, which leaves
    convolution and state as they were."""

    def __init__(self, config: HybridLlamaConfig, layer: int, sections: tuple[int, ...], conv_channels: int) -> None:
        super().__init__()
        self.config, self.layer, self.sections = config, layer, sections
        self.in_proj = nn.Linear(config.d_model, sum(sections), bias=config.proj_bias)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, config.d_conv, groups=conv_channels)
        self.out_proj = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(hidden.to(self.in_proj.weight.dtype)).split(self.sections, dim=-1)

    def convolve(self, inputs: Tensor, before: tuple[Tensor, Tensor] | None, is_live: Tensor | None) -> tuple:
        """The convolution of inputs (B, L, channels), and its last d_conv − 1 inputs."""
        if is_live is not None:
            inputs = inputs.masked_fill(~is_live[..., None], 0)
        kept = self.config.d_conv - 1
        history = inputs.new_zeros(len(inputs), kept, inputs.shape[-1]) if before is None else before[0]
        inputs = torch.cat([history, inputs], dim=1)
        out = conv1d(inputs.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, groups=inputs.shape[-1])
        out = out.transpose(1, 2)
        return silu(out) if self.config.conv_silu else out, inputs[:, inputs.shape[1] - kept :]


class HybridLlamaMamba2(HybridLlamaMixer):
    """in_proj rows are z (H·P), x (G·P), B (G·P), C (H·P), dt (H); N = P."""

    def __init__(self, config: HybridLlamaConfig, layer: int) -> None:
        width, grouped = config.n_heads * config.head_dim, config.groups * config.head_dim
        super().__init__(config, layer, (width, width + 2 * grouped, config.n_heads), width + 2 * grouped)
        self.dt_bias = nn.Parameter(torch.zeros(config.n_heads))
        self.A_log = nn.Parameter(torch.zeros(config.n_heads))
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.norm = HybridLlamaGatedRMSNorm(width, config.head_dim, config.rms_norm_eps)
        self.is_rotary = config.mixer_rope and layer not in config.no_rope_layers

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_live: Tensor | None,
        cache: HybridLlamaCache | None,
    ) -> Tensor:
        config, before = self.config, None if cache is None else cache.states[self.layer]
        z, xBC, dt = self.project(hidden)
        dt = softplus(dt.float() + self.dt_bias.float())  # (B, L, H)
        if is_live is not None:
            dt = dt * is_live[..., None]
        convolved, last = self.convolve(xBC, before, is_live)
        grouped = config.groups * config.head_dim
        x, B, C = (
            t.unflatten(-1, (-1, config.head_dim))
            for t in convolved.split((grouped, grouped, config.n_heads * config.head_dim), dim=-1)
        )
        if self.is_rotary:
            B, C = (rotate(t.float(), *(table[:, :, None] for table in rope)).to(t.dtype) for t in (B, C))
        y, state = ssd(x, dt, -self.A_log.float().exp(), B, C, self.D.float(), None if before is None else before[1])
        if cache is not None:
            cache.states[self.layer] = (last, state)
        return self.out_proj(self.norm(y.flatten(-2).to(z.dtype), z)).to(hidden.dtype)


class HybridLlamaMamba1(HybridLlamaMixer):
    """in_proj rows are z (H·P), x (G·P), B (G·P), C (H·P) and what dt_proj makes dt from."""

    def __init__(self, config: HybridLlamaConfig, layer: int) -> None:
        width, grouped = config.n_heads * config.head_dim, config.groups * config.head_dim
        dt_rank = math.ceil(config.d_model / 16) if config.dt_rank is None else config.dt_rank
        super().__init__(config, layer, (width, grouped, grouped, width, dt_rank), grouped)
        self.dt_proj = nn.Linear(dt_rank, width, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.A_log = nn.Parameter(torch.zeros(width, config.state_size))
        self.D = nn.Parameter(torch.ones(width))

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_live: Tensor | None,
        cache: HybridLlamaCache | None,
    ) -> Tensor:
        config, before = self.config, None if cache is None else cache.states[self.layer]
        z, x, B, C, dt = self.project(hidden)
        dt = softplus(self.dt_proj(dt).float() + self.dt_bias.float())  # (B, L, H·P)
        if is_live is not None:
            dt = dt * is_live[..., None]
        x, last = self.convolve(x, before, is_live)
        ratio = config.n_heads // config.groups
        pieces = (config.head_dim // config.state_size, config.state_size)
        x = x.unflatten(-1, (-1, config.head_dim)).repeat_interleave(ratio, dim=2).flatten(2)  # (B, L, H·P)
        B = B.unflatten(-1, (-1, *pieces)).repeat_interleave(ratio, dim=2)  # (B, L, H, J, N)
        C = C.unflatten(-1, (-1, *pieces))
        y, state = selective_scan(
            x, dt, -self.A_log.float().exp(), B, C, self.D.float(), None if before is None else before[1]
        )
        if cache is not None:
            cache.states[self.layer] = (last, state)
        return self.out_proj(y.to(z.dtype) * silu(z)).to(hidden.dtype)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2 in float32, quadratic inside a chunk (2405.21060 §6): y (B, L, H, P), state (B, H, P, N).

    x (B, L, G, P); dt (B, L, H), 0 leaves the state as it is; A, D (H,); B (B, L, G, N); C (B, L, H, N).
    """
    ratio = C.shape[2] // x.shape[2]
    x, B, C = x.float(), B.float(), C.float()
    x, B = x.repeat_interleave(ratio, dim=2), B.repeat_interleave(ratio, dim=2)
    if state is None:
        state = x.new_zeros(len(x), C.shape[2], x.shape[3], C.shape[3])
    ys = []
    for x_c, dt_c, B_c, C_c in zip(*(t.split(CHUNK_SIZE, dim=1) for t in (x, dt, B, C)), strict=True):
        decay = (dt_c * A).cumsum(1)  # (B, Q, H), logarithm since the chunk's start
        span = (decay[:, :, None] - decay[:, None]).permute(0, 3, 1, 2)  # (B, H, Q, Q)
        future = torch.ones(span.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = span.masked_fill(future, float("-inf")).exp() * torch.einsum("bihn,bjhn->bhij", C_c, B_c)
        written = x_c * dt_c[..., None]
        entering = torch.einsum("bihn,bhpn->bihp", C_c, state) * decay.exp()[..., None]
        ys.append(torch.einsum("bhij,bjhp->bihp", weights, written) + entering)
        to_end = (decay[:, -1:] - decay).exp()[..., None]
        added = torch.einsum("bjhp,bjhn->bhpn", written * to_end, B_c)
        state = state * decay[:, -1].exp()[..., None, None] + added
    return torch.cat(ys, dim=1) + D[:, None] * x, state


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-1 in float32, token by token (2312.00752 §3.2): y (B, L, H·P), state (B, H·P, N).

    x and dt (B, L, H·P), dt = 0 leaves the state as it is; A (H·P, N); B and C (B, L, H, J, N); D (H·P,).
    """
    width, d_state = A.shape
    x, B, C = x.float(), B.float(), C.float()
    if state is None:
        state = x.new_zeros(len(x), width, d_state)
    ys = []
    for t in range(x.shape[1]):
        B_t, C_t = (v[:, t].repeat_interleave(d_state, dim=2).flatten(1, 2) for v in (B, C))  # (B, H·P, N)
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B_t
        ys.append((state * C_t).sum(-1))
    return torch.stack(ys, dim=1) + D * x, state


class HybridLlamaMLP(nn.Module):
    def __init__(self, config: HybridLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class HybridLlamaBlock(nn.Module):
    def __init__(self, config: HybridLlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = HybridLlamaRMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = HybridLlamaRMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = HybridLlamaMLP(config)
        self.is_attention = layer in config.attention_layers
        if self.is_attention:
            self.self_attn = HybridLlamaAttention(config, layer)
        else:
            self.mamba = (HybridLlamaMamba1 if config.mixer == "mamba1" else HybridLlamaMamba2)(config, layer)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        mixer = self.self_attn if self.is_attention else self.mamba
        x = x + mixer(self.input_layernorm(x), *arguments)
        return x + self.mlp(self.post_attention_layernorm(x))


class HybridLlamaPreTrainedModel(PreTrainedModel):
    config: HybridLlamaConfig
    config_class = HybridLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HybridLlamaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "mamba.D"]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own


class HybridLlamaModel(HybridLlamaPreTrainedModel):
    def __init__(self, config: HybridLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(HybridLlamaBlock(config, layer) for layer in range(config.n_layers))
        self.norm = HybridLlamaRMSNorm(config.d_model, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridLlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids (B, L) or inputs_embeds (B, L, d_model), L new tokens; attention_mask (B, S), 0 for padding;
        position_ids (B, L), counted from each row's first token where they are not given.

        Raises ValueError where a cache is to be filled from rows that are padded on the right.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = HybridLlamaCache(self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention_mask = self._checked(attention_mask, past, length, past_key_values is not None)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        angles = position_ids[..., None].float() * rope_frequencies(self.config, x.device)  # (B, L, P / 2)
        angles = torch.cat([angles, angles], dim=-1)
        mask = self._visible(attention_mask, past, length, x.device)
        is_live = None if attention_mask is None else attention_mask[:, past:]
        arguments = ((angles.cos(), angles.sin()), mask, is_live, past_key_values)
        hidden_states = [x]
        for block in self.layers:
            x = block(x, *arguments)
            hidden_states.append(x)
        if past_key_values is not None:
            past_key_values.length = past + length
        x = hidden_states[-1] = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _checked(self, mask: Tensor | None, past: int, length: int, is_cached: bool) -> Tensor | None:
        """attention_mask as bool (B, S), None if nothing is masked."""
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected (batch, {past + length}), one column for each "
                "of the tokens before and in this call"
            )
        mask = mask.bool()
        if length == 1:
            return mask
        if is_cached and not mask[:, -1].all():
            raise ValueError("a cache is filled from rows padded on the left: set tokenizer.padding_side = 'left'")
        return None if mask.all() else mask

    def _visible(self, padding: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
        """Mask (B or 1, 1, L, S); None where plain causal attention says the same."""
        window = self.config.sliding_window
        is_whole = window is None or past + length <= window
        if padding is None and is_whole and (past == 0 or length == 1):
            return None
        queries = torch.arange(past, past + length, device=device)[:, None]
        keys = torch.arange(past + length, device=device)
        visible = keys <= queries
        if window is not None:
            visible = visible & (queries - keys < window)
        visible = visible[None, None]
        if padding is not None:
            visible = visible & padding[:, None, None] | (keys == queries)  # padding sees itself: no row is empty
        return visible


class HybridLlamaForCausalLM(HybridLlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridLlamaConfig) -> None:
        super().__init__(config)
        self.model = HybridLlamaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridLlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, L, V), or of the last `logits_to_keep` tokens; loss where there are labels (B, L), −100 ignored.

        Other arguments as `HybridLlamaModel`.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output
