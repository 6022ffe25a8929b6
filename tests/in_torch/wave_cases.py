"""What the ranks of `test_torch_waves.py` run; nothing here imports JAX."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torch_ref import NorMuon
from torch_ref.steps import sharded

SIZES = [(16, 48), (48, 16), (24, 40), (16, 64)]

CASES: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "one of each": (SIZES, {}),
    "three of each": (3 * SIZES, {}),
    "one at a time": (SIZES, {"max_stack_bytes": 1}),
    "a long one and many short ones": ([(32, 64)] + 8 * [(8, 12)], {}),
}
"""By name: the weights' shapes, and the optimizer's settings."""


def draw(shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in shapes
    ]


def stepped(shapes: list[tuple[int, int]], place, **settings) -> list[nn.Parameter]:
    """The weights after a step by gradients that are the weights themselves."""
    params = [nn.Parameter(place(x)) for x in draw(shapes)]
    optimizer = NorMuon(params, lr=0.1, compute_dtype=torch.float64, **settings)
    for param in params:
        param.grad = param.detach().clone()
    optimizer.step()
    return params


def step_on_mesh(shapes: list[tuple[int, int]], settings: dict[str, Any]) -> dict[str, Any]:
    """What this rank did in a step: its weights afterwards, whole, and what happened, in order.

    An event is the name of a collective, or (rows, columns, matrices) of a stack that it worked on.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    events: list[Any] = []

    def noted(name, function):
        def call(*args, **keywords):
            events.append(name)
            return function(*args, **keywords)

        return call

    def stages(stack, x, moments, beta2, run=sharded._own_stages):
        events.append((*x.shape[1:], len(x)))
        return run(stack, x, moments, beta2)

    with ExitStack() as patches:
        for name in ("all_reduce", "all_to_all_single"):
            call = noted(name, getattr(dist, name))
            patches.enter_context(mock.patch.object(dist, name, call))
        patches.enter_context(mock.patch.object(sharded, "_own_stages", stages))
        params = stepped(shapes, lambda x: distribute_tensor(x, mesh, [Shard(0)]), **settings)
        happened = list(events)
    weights = [param.detach().full_tensor() for param in params]
    return {"weights": weights, "events": happened}


def all_cases(folder: Path) -> dict[str, Any]:
    return {name: step_on_mesh(*case) for name, case in CASES.items()}
