"""`python -m benchmarks.host_time`: how long Python takes for one PyTorch step by kernels.

On a GPU a step is as fast as its kernels only while the host hands them out faster than they run. Here
the kernels do nothing and the matrices have a sixteenth of their sides, so that what is left is the
host's work: the plan, the tensors of every launch, and the few operations that PyTorch itself runs.
No GPU is needed. The time is that of the thread on its core; on a machine that does other work too, the
least of many steps is the figure to compare.
"""

import os

# Triton decides when it is imported: the kernels are to be accepted on a CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib
import statistics
import time
from typing import Annotated
from unittest import mock

import torch
import typer

import torch_ref
from benchmarks.workloads import DECAY, MODELS, OUT_IN, matrix_sizes
from normuon_core.kernels import source

MODEL = "GPT-2 124M"
SMALLER = 16
"""By what the sides of the matrices are divided: how many numbers there are is not the host's work."""

KERNELS = [
    "squares",
    "row_squares",
    "row_factors",
    "feed",
    "product",
    "set_norm",
    "neuron_squares",
    "statistics",
    "finish",
]


class _NoKernel:
    """Stands for every kernel: takes a grid and arguments, and does nothing.

    A call returns it as the compiled kernel, so that later steps find it as they do on a GPU.
    """

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        return self


def host_milliseconds(recipe: str, *, steps: int) -> list[float]:
    """The host's time of each of `steps` steps of all matrices of `MODEL`, in milliseconds."""
    sizes = [(rows // SMALLER, columns // SMALLER) for rows, columns in matrix_sizes(MODELS[MODEL])]
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = torch_ref.NorMuon(
        params,
        0.02,
        recipe=recipe,
        layout=OUT_IN,
        weight_decay=DECAY,
        backend="triton",
        compute_dtype=torch.float16,
    )
    with contextlib.ExitStack() as patched:
        for name in KERNELS:
            patched.enter_context(mock.patch.object(source, name, _NoKernel()))
        for _ in range(3):
            optimizer.step()
        return [_milliseconds(optimizer.step) for _ in range(steps)]


def _milliseconds(step) -> float:
    start = time.thread_time()
    step()
    return 1e3 * (time.thread_time() - start)


def main(
    recipe: Annotated[str, typer.Option(help="One of normuon_core.RECIPES.")] = "normuon",
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 200,
) -> None:
    """Time the host's part of a step of GPT-2's 72 matrices by kernels that do nothing."""
    times = host_milliseconds(recipe, steps=steps)
    print(
        f"{MODEL}, {recipe}, {os.cpu_count()} cores: median {statistics.median(times):.2f} ms,"
        f" least {min(times):.2f} ms of {steps} steps"
    )


if __name__ == "__main__":
    typer.run(main)
