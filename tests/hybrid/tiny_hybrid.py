"""Tiny random models whose every part matters: four layers, six query and two key-value heads of eight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM

VOCAB = 97


def config(**changes: Any) -> HybridConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 48,
        "n_layers": 4,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "attention_layers": (1, 3),
        "tie_word_embeddings": True,
    }
    return HybridConfig(**{**shape, **changes})


def model(seed: int = 0, **changes: Any) -> HybridForCausalLM:
    """Random weights of a size at which every layer changes the logits; decays and steps differ by head."""
    random = torch.Generator().manual_seed(seed)
    made = HybridForCausalLM(config(**changes))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-1.5, 1.0, generator=random)
            elif "norm" in name or name.endswith(".D"):
                p.uniform_(0.5, 1.5, generator=random)
            elif "embed" in name or "lm_head" in name:
                p.normal_(std=0.3, generator=random)
            else:
                p.normal_(std=0.15, generator=random)
    return made.requires_grad_(False).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [tokens(1, length, seed * 100 + i)[0].tolist() for i, length in enumerate(lengths)]


def greedy(model: HybridForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """The definition: the whole text is read anew for every token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text], device=model.device))[0, -1].argmax()))
    return text[len(prompt) :]


def llama(folder: Path, **changes: Any) -> Any:
    """A transformers Llama of the same shape, saved to the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
    made.save_pretrained(folder)
    return made
