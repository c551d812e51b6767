"""A model with its tokenizer and how it is to be decoded, from the options that serving and chatting share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer

from hybrid.checkpoint import load_pretrained
from hybrid.drafts import Draft, ModelDraft, NGramDraft, load_draft
from hybrid.engine import DecodeEngine
from hybrid.model import HybridForCausalLM

MAX_LENGTH = 4096
"""Tokens of a prompt and its reply together, unless an option says otherwise or the model was made for fewer."""
PROPOSALS = 4
"""Tokens that a draft proposes per round, unless an option says otherwise."""
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """name: the folder's. draft: None, "ngram" or a model; draft_tokens: of those that a model proposes among, None for
    all; k: its proposals per round, 0 without one."""

    name: str
    model: HybridForCausalLM
    tokenizer: Any
    max_length: int
    draft: str | HybridForCausalLM | None = None
    k: int = 0
    draft_tokens: Tensor | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a reply: the model's own ids and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys((*self.model.config.eos_token_ids, *(() if own is None else (own,)))))

    def engine(self, batch: int) -> DecodeEngine:
        draft: Draft | None = None
        if isinstance(self.draft, HybridForCausalLM):
            draft = ModelDraft(self.draft, self.draft_tokens)
        elif self.draft is not None:
            draft = NGramDraft()
        return DecodeEngine(
            self.model,
            batch=batch,
            max_length=self.max_length,
            draft=draft,
            k=self.k,
            eos_token_ids=self.eos_token_ids,
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the reply begins; ValueError if the template is missing or refuses."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.name} has no chat template")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load` reads."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of config.json, safetensors and a tokenizer")
    add("--draft", metavar="ngram|FOLDER", help="speculate: by look-up in the text, or with a smaller model")
    add("--k", metavar="K", type=positive, help=f"tokens that the draft proposes per round ({PROPOSALS})")
    add(
        "--max-length",
        metavar="TOKENS",
        type=positive,
        help=f"a prompt and its reply together ({MAX_LENGTH}, or what the model was made for if that is less)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s here")
    add("--dtype", choices=_DTYPES, help="of the weights (bfloat16 on cuda, float32 elsewhere)")


def load(folder: Path, options: argparse.Namespace) -> Loaded:
    """The model of `folder`, to be decoded as the options say; ValueError or OSError for what cannot be loaded."""
    if options.k is not None and options.draft is None:
        raise ValueError(f"--k {options.k} is about a draft, and there is none: add --draft ngram or --draft FOLDER")
    folder = folder.resolve()
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32"))
    model = load_pretrained(folder, options.device, dtype)
    proposer: str | HybridForCausalLM | None = options.draft
    tokens: Tensor | None = None
    if proposer not in (None, "ngram"):
        made = load_draft(Path(options.draft), options.device, dtype)
        proposer, tokens = made.model, made.tokens
    return Loaded(
        name=folder.name,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        max_length=options.max_length or min(MAX_LENGTH, model.config.max_position_embeddings),
        draft=proposer,
        k=0 if proposer is None else options.k or PROPOSALS,
        draft_tokens=tokens,
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
