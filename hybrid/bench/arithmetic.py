"""What decoding must move, and what speculation should gain."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybrid.cache import cache_bytes
from hybrid.checkpoint import FLOAT32
from hybrid.config import HybridConfig
from hybrid.model import HybridForCausalLM


def weight_bytes(config: HybridConfig, itemsize: int = 2) -> int:
    """Bytes of the weights that decoding one token reads: all but the embedding, of which it reads a row, unless that
    is the head too. A_log, dt_bias and D are float32."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    return sum(
        p.numel() * (4 if name.endswith(FLOAT32) else itemsize)
        for name, p in model.named_parameters()
        if config.tie_word_embeddings or "embed_tokens" not in name
    )


def floor_bytes(config: HybridConfig, context: int, batch: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that one step of plain decoding moves at least, by kind.

    weights: read once for the whole batch. kv: keys and values of `context` tokens, read. ssm: float32 states, read and
    written. conv: the d_conv − 1 inputs read and one written. Activations, which stay in the cache, do not count.
    """
    state = cache_bytes(config, batch, context, itemsize)
    return {
        "weights": weight_bytes(config, itemsize),
        "kv": state["kv"],
        "ssm": 2 * state["ssm"],
        "conv": state["conv"],
    }


def tokens_per_round(alpha: float, k: int) -> float:
    """τ: mean tokens out of a round of K proposals, each accepted with probability α if those before it are, the
    model's own token included: (1 − α^(K+1)) / (1 − α) (2211.17192, eq. 1)."""
    return sum(alpha**i for i in range(k + 1))


def predicted_speedup(
    alpha: float, k: int, t_plain: float, t_verify: float, t_draft: float = 0.0, t_other: float = 0.0
) -> float:
    """S = τ(α)·t_plain / (t_verify + K·t_draft + t_other), all times in one unit.

    t_plain: a round of plain decoding. t_verify: the model on K + 1 tokens. t_draft: per proposed token. t_other: what
    else a round takes.
    """
    return tokens_per_round(alpha, k) * t_plain / (t_verify + k * t_draft + t_other)


def round_parts(phases: Mapping[str, float], k: int) -> dict[str, float]:
    """The times of a round that `predicted_speedup` takes, from `DecodeEngine.phase_milliseconds`: t_other is the
    verdict on the proposals and what the round takes beyond its phases."""
    between = max(0.0, phases["round"] - phases["draft"] - phases["verify"] - phases["accept"])
    return {
        "t_verify": phases["verify"],
        "t_draft": phases["draft"] / max(k, 1),
        "t_other": phases["accept"] + between,
    }


def break_even(k: int, t_plain: float, t_verify: float, t_draft: float = 0.0, t_other: float = 0.0) -> float | None:
    """The acceptance above which the predicted speed-up exceeds 1; None if even an acceptance of 1 does not."""

    def pays(alpha: float) -> bool:
        return predicted_speedup(alpha, k, t_plain, t_verify, t_draft, t_other) > 1.0

    if not pays(1.0):
        return None
    low, high = 0.0, 1.0
    if pays(low):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
