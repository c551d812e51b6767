"""Prompts on their way into an engine's slots: right-padded, in pieces that fit, and as CUDA graphs where starting
kernels is what reading them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.cache import HybridCache
from hybrid.model import HybridForCausalLM

PREFILL_TOKENS = 65536
"""Prompts are read in pieces of about so many tokens, padding included."""
GRAPHED_FLOPS = 4e12
"""Pieces of at most so many operations are padded to powers of two, so that graphs of few shapes serve them: an H200
does them in less time than a host takes to start the kernels of some thirty layers."""
SHORTEST = 16
"""Tokens of the shortest such shape."""


@dataclass(frozen=True)
class Prompts:
    """Of B rows: tokens (B, L), right-padded; counts (B,) of the tokens that are real; ends (B,), the length at which
    prompt and reply together end; slots (B,). All int64. Two rows of one slot must be the same."""

    tokens: Tensor
    counts: Tensor
    ends: Tensor
    slots: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], slots: Sequence[int]) -> Prompts:
        tokens, counts = right_pad(prompts, "cpu")
        return cls(tokens, counts, counts + torch.tensor(max_new_tokens), torch.tensor(slots))

    def to(self, device: torch.device) -> Prompts:
        return Prompts(*(t.to(device) for t in (self.tokens, self.counts, self.ends, self.slots)))

    def padded(self, rows: int, length: int) -> Prompts:
        """The same in a larger shape: the last row is there again, which reading twice does not change."""
        index = torch.arange(rows).clamp(max=len(self.counts) - 1)
        tokens = torch.nn.functional.pad(self.tokens, (0, length - self.tokens.shape[1]))
        return Prompts(*(t[index] for t in (tokens, self.counts, self.ends, self.slots)))


def pieces(lengths: Sequence[int]) -> Iterator[slice]:
    """Runs of rows with these lengths that are read at once: PREFILL_TOKENS of them, or one row."""
    rows = max(1, PREFILL_TOKENS // max(lengths))
    for start in range(0, len(lengths), rows):
        yield slice(start, start + rows)


def read(
    model: HybridForCausalLM,
    cache: HybridCache,
    tokens: Tensor,
    counts: Tensor,
    features: Tensor | None = None,
    keep: bool = False,
) -> Tensor | None:
    """Append counts (B,) tokens of each row of tokens (B, L) to a cache of B slots; nothing waits for the device while
    the cache is fresh and L at most PREFILL_TOKENS.

    features (B, L, d_model): of a draft that reads them. keep: give the residual stream after the last block,
    (B, L, d_model).
    """
    kept = tokens.new_zeros(*tokens.shape, model.config.d_model, dtype=model.dtype) if keep else None
    if not model.config.reads_features:
        features = None
    for column in range(0, tokens.shape[1], PREFILL_TOKENS):
        part = slice(column, column + PREFILL_TOKENS)
        given = None if features is None else features[:, part]
        part_counts = (counts - column).clamp(0, tokens[:, part].shape[1])
        x = model.residual(tokens[:, part], cache=cache, counts=part_counts, features=given)
        if kept is not None:
            kept[:, part] = x
    return kept


class PromptReader:
    """Calls `read` with prompts on its device; small ones as a CUDA graph from the second time a shape comes.

    read: reads the prompts and nothing else, without waiting for the device; twice is as once. token_flops: operations
    that a token costs. most: (rows, tokens) that no shape may exceed. graphs: whether to capture at all.
    """

    def __init__(
        self,
        read: Callable[[Prompts], None],
        device: torch.device,
        token_flops: float,
        most: tuple[int, int],
        graphs: bool,
    ) -> None:
        self.read, self.device, self.token_flops, self.most, self.graphs = read, device, token_flops, most, graphs
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Prompts] | None] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Drop all graphs: the weights that they read are elsewhere now."""
        self._graphs.clear()

    def __call__(self, prompts: Prompts) -> None:
        shape = self.shape(*prompts.tokens.shape)
        if shape is None:
            self.read(prompts.to(self.device))
            return
        prompts = prompts.padded(*shape).to(self.device)
        if shape not in self._graphs:
            self._graphs[shape] = None  # most shapes of one evaluation come once
            self.read(prompts)
            return
        found = self._graphs[shape]
        if found is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            found = self._graphs[shape] = (captured(lambda: self.read(prompts), self._pool), prompts)
        graph, inputs = found
        for ours, theirs in zip(vars(inputs).values(), vars(prompts).values(), strict=True):
            ours.copy_(theirs)
        graph.replay()

    def shape(self, rows: int, length: int) -> tuple[int, int] | None:
        """(rows, tokens) that such prompts are padded to; None if they are read as they come."""
        if not self.graphs:
            return None
        rows = min(1 << (rows - 1).bit_length(), self.most[0])
        length = min(max(SHORTEST, 1 << (length - 1).bit_length()), self.most[1])
        return (rows, length) if rows * length * self.token_flops <= GRAPHED_FLOPS else None


def captured(call: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `call`, which is run twice before. pool: of graphs that never hold results for one another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(B, L) tokens, padded on the right with 0, and their counts (B,)."""
    counts = torch.tensor([len(r) for r in rows], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return padded.to(device), counts
