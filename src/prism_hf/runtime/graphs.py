"""CUDA graphs: a function of tensors is recorded once and then replayed, one launch in place of thousands.

A pass of a network launches hundreds of small kernels, and Python takes longer to launch them than a fast GPU to run them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_WARM_UP = 2
"""Calls before recording: the first ones make constants and select kernels, which a graph cannot."""
Outputs = tuple[Tensor | None, ...]


class Replayed:
    """A function of tensors on a GPU whose third call is recorded as a CUDA graph; later calls replay it.

    All calls must have inputs of the same shapes. The function must do the same work at each call and keep no state. A
    function that cannot be recorded runs as it is, and the log says why. `pool` is the memory of the graphs that share it:
    `torch.cuda.graph_pool_handle()`.
    """

    def __init__(self, function: Callable[..., Outputs], pool: Any, what: str) -> None:
        self._function, self._pool, self._what = function, pool, what
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Outputs = ()

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return the outputs of the function."""
        self._calls += 1
        if self._calls == _WARM_UP + 1:
            self._record(inputs)
        if self._graph is None:
            return self._function(*inputs)
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        # The next replay overwrites the outputs.
        return tuple(None if output is None else output.clone() for output in self._outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._inputs = [value.detach().clone() for value in inputs]
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        except RuntimeError as error:
            log.info("%s runs without a CUDA graph (%s)", self._what, str(error).splitlines()[0])
            self._inputs = []
            return
        self._graph = graph
