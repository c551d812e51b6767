"""Tiny random models in float32, whose figures can be recomputed in float64, and a tokenizer of single bytes with a
ChatML template: small, and every text has tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals.benchmark import Subject
from hybrid import HybridConfig, HybridForCausalLM

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTE_VOCAB = 259


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.add_special_tokens({"additional_special_tokens": specials})
    fast.chat_template = TEMPLATE
    return fast


def tiny(seed: int, attention_layers: tuple[int, ...], vocab: int = 61) -> HybridForCausalLM:
    config = HybridConfig(
        vocab_size=vocab,
        d_model=24,
        n_layers=2,
        n_heads=3,
        n_kv_heads=1,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=256,
        eos_token_ids=(2,),
        attention_layers=attention_layers,
    )
    torch.manual_seed(seed)
    model = HybridForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name:
                p.normal_(std=0.3)
    return model.requires_grad_(False).eval()


def subject_of(
    model: HybridForCausalLM,
    teacher: HybridForCausalLM | None,
    corpus: Path,
    progress: Callable[[float, str], None] = lambda share, phrase: None,
) -> Subject:
    """A subject for benchmarks of tokens alone: its tokenizer is not asked."""
    return Subject(
        name="teacher" if teacher is None else "student",
        model=model,
        tokenizer=None,
        teacher=teacher,
        corpus=corpus,
        teacher_rows=None,
        seed=0,
        batch_size=2,
        train_length=32,
        work=corpus,
        progress=progress,
    )
