"""The hybrid model: configuration, mixers, cache, initialisation from attention, decoding."""

from hybrid.checkpoint import load_pretrained, save_pretrained
from hybrid.config import HybridConfig, UnsupportedModel
from hybrid.layers import attention_layers
from hybrid.model import HybridForCausalLM
from hybrid.registration import register

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "UnsupportedModel",
    "attention_layers",
    "load_pretrained",
    "save_pretrained",
]

register()
