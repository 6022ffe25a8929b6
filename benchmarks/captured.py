"""Work of PyTorch as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch


class Captured:
    """Repeats `run` as a graph, without its launches' time on the host.

    The graph reads and writes the arrays of `run` where they lay. So `run` is kept: freed arrays would
    be read all the same, and a race gives freed memory back to the GPU between its contestants.

    Args:
      run: what has been called once before, so that its kernels are compiled.
    """

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def __call__(self) -> None:
        self._graph.replay()
