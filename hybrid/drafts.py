"""Who proposes: the text itself, or a smaller model with the same tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hybrid.cache import HybridCache
from hybrid.model import HybridForCausalLM
from kernels_ext import dispatch

if TYPE_CHECKING:
    from hybrid.engine import DecodeEngine


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
    """

    def __init__(self, model: HybridForCausalLM) -> None:
        self.model = model
        self.cache: HybridCache | None = None

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

    def readers(self) -> list[tuple[HybridCache, HybridForCausalLM]]:
        assert self.cache is not None
        return [(self.cache, self.model)]

    def propose(self, engine: DecodeEngine) -> Tensor | None:
        assert self.cache is not None
        k, sampling = engine.k, engine.sampling
        features = engine.features if self.model.config.reads_features else None
        drawn = []
        for i in range(k):
            x = self.model.read(engine.tokens[:, i : i + 1], self.cache, engine.slots, i, features)
            logits = self.model.logits(x, engine.logits_dtype)
            features = None if features is None else x
            if sampling.greedy:
                token = dispatch.greedy(logits)
            else:
                q = dispatch.filtered_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
                token = dispatch.sample(q.log(), engine.uniforms[:, i], 1.0, 0, 1.0)
                drawn.append(q)
            engine.tokens[:, i + 1].copy_(token)
        # The last proposal is read too: if all are accepted, the next round begins after it.
        self.model.read(engine.tokens[:, k:], self.cache, engine.slots, k, features)
        engine.n_draft.fill_(k)
        return torch.stack(drawn, dim=1) if drawn else None
