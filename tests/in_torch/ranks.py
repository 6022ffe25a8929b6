"""Runs a function on several ranks, one process each, over gloo."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes


def run_on_ranks(ranks: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(folder, *args)` on each of `ranks` new processes: what each of them returned.

    Args:
      function: of a module that can be imported without JAX, which would take longer than the test.
      folder: for the ranks to meet in, and for what they leave; empty at first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Each rank is a fork of one process that has imported all that it needs.
    get_context("forkserver").set_forkserver_preload([function.__module__])
    start_processes(
        _rank, (ranks, function, str(folder), args), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, function: Callable[..., Any], folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    try:
        torch.save(function(Path(folder), *args), f"{folder}/result{rank}.pt")
    finally:
        dist.destroy_process_group()
