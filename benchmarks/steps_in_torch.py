"""Optimizer steps in PyTorch, launched one by one or replayed from a CUDA graph."""

import time
from collections.abc import Callable, Sequence

import torch

import torch_ref
from benchmarks.captured import Captured
from benchmarks.race import Prepared
from benchmarks.workloads import DECAY, OUT_IN, RATE, Stack, matrix_sizes

MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Matrices:
    """A model's parameters and gradients, and the optimizers that step them.

    All optimizers share the numbers, so that those of a large model fit beside each other; a state is
    shared by the steps of one optimizer, launched and replayed.
    """

    def __init__(self, shapes: Sequence[Stack]):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = list(matrix_sizes(shapes))
        self._params = [0.02 * torch.randn(size, device=self.device) for size in sizes]
        self._grads = [torch.randn(size, device=self.device) for size in sizes]
        self._made: dict[MakeOptimizer, tuple[torch.optim.Optimizer, dict[str, float]]] = {}

    def params(self) -> list[torch.nn.Parameter]:
        """With gradients. An optimizer that takes them away does so from its own."""
        params = [torch.nn.Parameter(each) for each in self._params]
        for param, grad in zip(params, self._grads, strict=True):
            param.grad = grad
        return params

    def optimizer(
        self, make: MakeOptimizer, *, for_graph: bool
    ) -> tuple[torch.optim.Optimizer, dict[str, float]]:
        """One that has made its first steps, and what they took.

        Raises:
          RuntimeError: it is for a CUDA graph, and there is no CUDA device.
        """
        if make not in self._made:
            optimizer = make(self.params())
            if for_graph and self.device.type != "cuda":
                raise RuntimeError("a CUDA graph needs a CUDA device, and PyTorch sees none")
            start = time.perf_counter()
            optimizer.step()
            self.wait()
            more = {"first step s": time.perf_counter() - start}
            if self.device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                optimizer.step()
                more["temporary GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            self._made[make] = optimizer, more
        return self._made[make]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


Step = Callable[[Matrices], Prepared]


def launched(make: MakeOptimizer) -> Step:
    """`step()` as it is."""

    def prepare(matrices: Matrices) -> Prepared:
        optimizer, more = matrices.optimizer(make, for_graph=False)
        return Prepared(optimizer.step, matrices.wait, more)

    return prepare


def graph(make: MakeOptimizer) -> Step:
    """`step()` captured in a CUDA graph, which is replayed."""

    def prepare(matrices: Matrices) -> Prepared:
        optimizer, more = matrices.optimizer(make, for_graph=True)
        return Prepared(Captured(optimizer.step), matrices.wait, more)

    return prepare


def normuon(recipe: str) -> MakeOptimizer:
    """One of our recipes, by the kernels."""
    return lambda params: torch_ref.NorMuon(
        params, RATE, recipe=recipe, layout=OUT_IN, weight_decay=DECAY, backend="triton"
    )


def torch_muon(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own, with its defaults."""
    return torch.optim.Muon(params, RATE, weight_decay=DECAY)
