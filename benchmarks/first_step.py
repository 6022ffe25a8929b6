"""`python -m benchmarks.first_step`: how long PyTorch's first step takes, in which kernels are compiled.

Every time is that of a process of its own with an empty cache. It is of the step alone: CUDA has
started, the optimizer is made, and its arrays are on the GPU.
"""

import os
import subprocess
import sys
import tempfile
import time
from typing import Annotated
from unittest import mock

import torch
import typer

from benchmarks import steps_in_torch
from benchmarks.workloads import MODELS
from torch_ref.steps import fused


def seconds(model: str, *, together: bool) -> float:
    """Of the first step of a model's matrices; `together` compiles kernels side by side."""
    matrices = steps_in_torch.Matrices(MODELS[model])
    optimizer = steps_in_torch.normuon("normuon")(matrices.params())
    matrices.wait()
    start = time.perf_counter()
    if together:
        optimizer.step()
    else:
        with mock.patch.object(fused, "is_worthwhile", return_value=False):
            optimizer.step()
    matrices.wait()
    return time.perf_counter() - start


def main(
    model: Annotated[str | None, typer.Option(help="None: all of benchmarks.workloads.")] = None,
    together: Annotated[bool, typer.Option(help="Compile kernels side by side.")] = True,
) -> None:
    """Time the first step by kernels, compiled side by side and one after the other."""
    if not torch.cuda.is_available():
        typer.echo("kernels are compiled for a CUDA device, and PyTorch sees none", err=True)
        raise typer.Exit(1)
    if model is not None:
        how = "side by side" if together else "one after the other"
        print(f"{model}, kernels compiled {how}: {seconds(model, together=together):.1f} s")
        return
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for each in MODELS:
        for how in ("--no-together", "--together"):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "benchmarks.first_step", "--model", each, how]
                subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True)


if __name__ == "__main__":
    typer.run(main)
