"""What the ranks of `test_torch_int8.py` run; nothing here imports JAX."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from normuon_core import MatrixLayout
from torch_ref import NorMuon, state_from_arrays, state_to_arrays

SHAPES = [(24, 75), (24, 128), (3, 8, 40)]
"""Two ranks divide the second through its inputs between blocks of 32; the others' they cut."""

STEPS = 3


def draw(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def build(place: Callable[[torch.Tensor], torch.Tensor], **keywords):
    params = [nn.Parameter(place(w)) for w in draw(0)]
    optimizer = NorMuon(
        params,
        lr=0.05,
        layout=MatrixLayout(-1, -2),
        compute_dtype=torch.float64,
        momentum_dtype=torch.int8,
        **keywords,
    )
    return params, optimizer


def train(params, optimizer, place, steps=range(STEPS), factor: float = 1.0) -> None:
    for step in steps:
        for param, gradient in zip(params, draw(step + 1), strict=True):
            param.grad = place(factor * gradient)
        optimizer.step()


def alone(array: torch.Tensor) -> torch.Tensor:
    return array


def outcome(params, optimizer) -> list[dict[str, torch.Tensor]]:
    """For each weight itself, its integers and its scales; whole where they are DTensors."""

    def whole(array: torch.Tensor) -> torch.Tensor:
        return (array.full_tensor() if isinstance(array, DTensor) else array).detach()

    return [
        {
            "weight": whole(param),
            **{key: whole(optimizer.state[param][key]) for key in ("momentum", "momentum_scale")},
        }
        for param in params
    ]


def moved(params, optimizer, other) -> list[np.ndarray]:
    """Each weight's momentum in floats, as another optimizer writes it that has read the arrays."""
    arrays = state_to_arrays(optimizer, named(params))
    state_from_arrays(other[1], arrays, named(other[0]))
    back = state_to_arrays(other[1], named(other[0]))
    return [back[f"momentum/{name}"] for name, _ in named(params)]


def named(params) -> list[tuple[str, torch.Tensor]]:
    return [(f"w{number}", param) for number, param in enumerate(params)]


def one_process() -> list[dict[str, torch.Tensor]]:
    params, optimizer = build(alone)
    train(params, optimizer, alone)
    return outcome(params, optimizer)


def all_cases(folder: Path) -> dict[str, Any]:
    del folder
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def outputs(array: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(array, mesh, [Shard(0)], src_data_rank=None)

    def inputs(array: torch.Tensor) -> torch.Tensor:
        axis = 1 if array.shape[-1] == 128 else 0
        return distribute_tensor(array, mesh, [Shard(axis)], src_data_rank=None)

    result: dict[str, Any] = {}
    for name, place in {"outputs": outputs, "inputs": inputs}.items():
        params, optimizer = build(place)
        train(params, optimizer, place)
        result[name] = outcome(params, optimizer)
        result[f"{name}, scales here"] = [
            tuple(optimizer.state[param]["momentum_scale"].to_local().shape) for param in params
        ]
    params, optimizer = build(alone)
    train(params, optimizer, alone, range(2))
    others, other = build(inputs)
    with torch.no_grad():
        for mine, theirs in zip(others, params, strict=True):
            mine.copy_(inputs(theirs.detach()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(others, other, inputs, [2])
    result["from one process"] = outcome(others, other)
    result["arrays of inputs"] = moved(others, other, build(inputs))
    params, optimizer = build(alone, process_group=dist.group.WORLD)
    train(params, optimizer, alone)
    result["process_group"] = [param.detach() for param in params]
    owners = build(alone, process_group=dist.group.WORLD)
    result["arrays of owners"] = moved(params, optimizer, owners)
    cut = nn.Parameter(distribute_tensor(draw(0)[0], mesh, [Shard(1)], src_data_rank=None))
    try:
        NorMuon([cut], lr=0.1, momentum_dtype=torch.int8)
        result["error"] = "nothing was raised"
    except ValueError as error:
        result["error"] = str(error)
    return result
