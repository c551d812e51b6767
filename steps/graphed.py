"""Forward and backward pass of a micro-batch as one CUDA graph.

A small model's step is thousands of launches, which take the host longer than the device; replayed, they take it one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pass = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""A micro-batch's data on the device → loss and figures."""

WARM_UP_PASSES = 2
"""The first pass compiles; the second has the allocations that later ones have."""


class GraphedPass:
    """`step(data, scale, first)` adds scale · d loss / d p to the gradient of each parameter, as eager code does.

    For passes that are alike: tensors of the same shapes, nothing that waits for the device, no random numbers. The
    graph is captured at the first step. Gradients lie where the graph writes them, so they are put in place at the
    first micro-batch of an update, however the optimiser left them.

    alone: every update is of one micro-batch. The graph then writes gradients instead of adding to zeros.
    """

    def __init__(
        self,
        run: Pass,
        parameters: Sequence[Tensor],
        each_tensor: Callable[[Any, Callable], Any],
        alone: bool = False,
    ) -> None:
        self.run, self.parameters, self.each_tensor, self.alone = run, parameters, each_tensor, alone
        self.graph: torch.cuda.CUDAGraph | None = None
        self.gradients: list[Tensor | None] = []

    def step(self, data: Any, scale: float, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The scaled loss and the figures, good until the next step. first: of the micro-batches of an update."""
        if self.graph is None:
            self._capture(data)
        assert self.graph is not None
        fresh = iter(_tensors(data, self.each_tensor))
        for static in self.inputs:
            static.copy_(next(fresh), non_blocking=True)
        self.scale.fill_(scale)
        if first:
            if not self.alone:
                torch._foreach_zero_([gradient for gradient in self.gradients if gradient is not None])
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        self.graph.replay()
        return self.loss, self.figures

    def _capture(self, data: Any) -> None:
        self.data = self.each_tensor(data, Tensor.clone)
        self.inputs = _tensors(self.data, self.each_tensor)
        self.scale = torch.ones((), device=self.inputs[0].device)
        self._clear_gradients()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._clear_gradients()
        self.graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a capture allows: another packs batches into pinned memory meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss, self.figures = self._pass()
        self.gradients = [parameter.grad for parameter in self.parameters]

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None if self.alone else torch.zeros_like(parameter)

    def _pass(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = self.run(self.data)
        loss = loss * self.scale
        loss.backward()
        return loss.detach(), {name: value.detach() for name, value in figures.items()}


def _tensors(data: Any, each_tensor: Callable[[Any, Callable], Any]) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(data, keep)
    return found
