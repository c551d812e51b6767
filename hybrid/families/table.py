"""The families in words: apart from what reads them, so that no stage is computed anew for a word."""

from __future__ import annotations

from hybrid.families import FAMILIES

WORDS = {  # checkpoints; what their attention has that Llama 2's has not
    "llama": ("Llama 2, 3, 3.1, 3.2, SmolLM2, others of their form", "scaled rotary positions (`llama3`, `linear`)"),
    "mistral": ("Mistral 7B", "sliding window"),
    "qwen2": ("Qwen2, Qwen2.5", "biases of q, k and v; sliding window if all layers have it"),
    "qwen3": ("Qwen3 (dense)", "norms of q and k, heads of any width; sliding window if all layers have it"),
    "smollm3": ("SmolLM3", "layers without rotary positions"),
}


def table() -> str:
    """In Markdown."""
    rows = [("Family", "Checkpoints", "Attention beyond Llama 2's", "GGUF architecture"), ("---",) * 4]
    rows += [(f"`{name}`", *WORDS[name], f"`{family.gguf}`") for name, family in FAMILIES.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
