"""Who proposes: the text itself, or a smaller model with the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from hybrid.cache import HybridCache
from hybrid.checkpoint import load_pretrained
from hybrid.model import HybridForCausalLM
from kernels_ext import dispatch

if TYPE_CHECKING:
    from hybrid.engine import DecodeEngine

TOKENS = "draft_tokens.npy"
"""Beside the weights of a draft that proposes among some tokens alone: their ids, int32."""


class Draft(Protocol):
    """Proposes tokens for the rows of one engine at a time."""

    def allocate(self, engine: DecodeEngine) -> None:
        """Make the buffers for an engine's slots; ValueError if it cannot propose for its model."""

    def readers(self) -> list[tuple[HybridCache, HybridForCausalLM]]:
        """Models that must read what the engine reads, and their caches, which the engine resets for new prompts."""

    def propose(self, engine: DecodeEngine) -> Tensor | None:
        """Write K proposals to engine.tokens[:, 1:] and how many are real to engine.n_draft.

        Gives the distributions they were drawn from, (B, K, V) float32, or None if nothing was drawn. Must not wait for
        the device, nor depend on anything that a replayed graph would not see.
        """


class NGramDraft:
    """Prompt look-up: what followed the latest earlier occurrence of the text's longest known suffix. No weights.

    longest: tokens of the longest suffix that is looked up.
    """

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"the longest suffix must be at least 1 token, got {longest}")
        self.longest = longest

    def allocate(self, engine: DecodeEngine) -> None:
        pass

    def readers(self) -> list[tuple[HybridCache, HybridForCausalLM]]:
        return []

    def propose(self, engine: DecodeEngine) -> None:
        proposals, count = dispatch.ngram_propose(
            engine.text, engine.cache.cursors.lengths, engine.slots, self.longest, engine.k
        )
        engine.tokens[:, 1:].copy_(proposals)
        engine.n_draft.copy_(count)


class ModelDraft:
    """A smaller `HybridForCausalLM`: any layers, any mixers, the same tokenizer.

    It shares the engine's cursors, so that what the engine forgets it forgets too. One that reads features takes
    the model's for the first token of a round and its own for the later ones, whose place in its cache they keep even
    if the tokens are accepted.

    tokens: ids of those that it proposes among, None for all (Zhao et al., 2502.14856); it reads any. Its head is then
    a copy of their rows, so that a proposal costs no more than those; weights that change where they lie are not seen
    there. Raises ValueError for ids that the vocabulary does not have, or that come twice, and for none.
    """

    def __init__(self, model: HybridForCausalLM, tokens: Tensor | None = None) -> None:
        self.model = model
        self.tokens = None if tokens is None else _checked(tokens, model.config.vocab_size)
        self.cache: HybridCache | None = None
        self._whole = self._head = torch.empty(0)

    def allocate(self, engine: DecodeEngine) -> None:
        if self.model.config.vocab_size != engine.model.config.vocab_size:
            raise ValueError(
                f"the draft has a vocabulary of {self.model.config.vocab_size} tokens and the model one of "
                f"{engine.model.config.vocab_size}: take a draft with the model's own tokenizer"
            )
        if self.model.config.reads_features and self.model.config.d_model != engine.model.config.d_model:
            raise ValueError(
                f"the draft reads features of d_model {self.model.config.d_model} and the model has "
                f"{engine.model.config.d_model}: take a draft that was made of this model"
            )
        if self.model.device != engine.device:
            raise ValueError(f"the draft is on {self.model.device} and the model on {engine.device}: put both on one")
        target = engine.cache
        self.cache = self.model.new_cache(
            engine.batch, target.max_length, window=target.window, ring=target.ring, cursors=target.cursors
        )
        self._take_head()

    def readers(self) -> list[tuple[HybridCache, HybridForCausalLM]]:
        assert self.cache is not None
        return [(self.cache, self.model)]

    def propose(self, engine: DecodeEngine) -> Tensor | None:
        assert self.cache is not None
        k, sampling = engine.k, engine.sampling
        features = engine.features if self.model.config.reads_features else None
        if self.model.lm_head_weight.data_ptr() != self._whole.data_ptr():  # then the engine captures anew
            self._take_head()
        norm = self.model.model.norm
        drawn = []
        for i in range(k):
            x = self.model.read(engine.tokens[:, i : i + 1], self.cache, engine.slots, i, features)
            logits = dispatch.norm_linear(x, norm.weight, norm.eps, self._head, out_dtype=engine.logits_dtype)
            features = None if features is None else x
            if sampling.greedy:
                token = dispatch.greedy(logits)
            else:
                q = dispatch.filtered_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
                token = dispatch.sample(q.log(), engine.uniforms[:, i], 1.0, 0, 1.0)
                drawn.append(q)
            engine.tokens[:, i + 1].copy_(token if self.tokens is None else self.tokens[token.long()])
        # The last proposal is read too: if all are accepted, the next round begins after it.
        self.model.read(engine.tokens[:, k:], self.cache, engine.slots, k, features)
        engine.n_draft.fill_(k)
        return self._over_all(torch.stack(drawn, dim=1)) if drawn else None

    def _take_head(self) -> None:
        self._whole = self.model.lm_head_weight.detach()
        self._head = self._whole
        if self.tokens is not None:
            self.tokens = self.tokens.to(self._whole.device)
            self._head = self._whole[self.tokens]

    def _over_all(self, q: Tensor) -> Tensor:
        """Distributions over the tokens that are proposed among, as (B, K, V) float32: 0 for all others."""
        if self.tokens is None:
            return q
        return q.new_zeros(*q.shape[:2], len(self._whole)).index_copy_(2, self.tokens, q)


def save_tokens(folder: Path | str, tokens: Sequence[int] | np.ndarray) -> None:
    """Beside a draft's weights: what `load_draft` has it propose among."""
    np.save(Path(folder) / TOKENS, np.asarray(tokens, np.int32))


def load_draft(folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None) -> ModelDraft:
    """The draft of a folder, with the tokens that it proposes among where the folder names some.

    Arguments and errors as `load_pretrained`, and ValueError for tokens that the model does not have.
    """
    model = load_pretrained(folder, device, dtype)
    path = Path(folder) / TOKENS
    if not path.exists():
        return ModelDraft(model)
    try:
        return ModelDraft(model, torch.from_numpy(np.load(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(tokens: Tensor, vocabulary: int) -> Tensor:
    """Ids in ascending order, int64: of equal logits the first is taken, which is then the one of the whole head."""
    if tokens.ndim != 1 or tokens.is_floating_point() or not len(tokens):
        raise ValueError(
            f"a draft's tokens must be a list of at least one id, got {tokens.dtype} of shape {tuple(tokens.shape)}; "
            "None proposes among all"
        )
    ordered = tokens.long().sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"a draft's tokens are {low} to {high}, but its vocabulary has {vocabulary}: 0 to {vocabulary - 1}"
        )
    if twice := ordered[1:][ordered[1:] == ordered[:-1]].unique().tolist():
        raise ValueError(f"a draft's tokens must differ, but {twice[:3]} come more than once")
    return ordered
