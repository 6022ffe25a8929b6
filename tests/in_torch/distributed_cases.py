"""What the ranks of `test_torch_distributed.py` run; nothing here imports JAX.

Every case trains the same weights on the same gradients: once as plain tensors in one process, and once
divided among the ranks.
"""

import copy
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from normuon_core import POLYNOMIALS, RECIPES, Hyperball, MatrixLayout, Polar
from parity_tests.spectra import SPECTRA
from torch_ref import (
    NorMuon,
    join_remainder,
    project_to_sphere,
    project_to_tangent,
    to_hyperball,
    to_sphere,
)
from torch_ref.mesh.rectangles import sharding_of
from torch_ref.steps.data_parallel import ReplicatedStack

OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)
MERGED = MatrixLayout(reduction_axis=0, output_axis=(1, 2), output_splits=(5, 3))
BLOCKS_OUT = MatrixLayout(-1, -2, (4, 3, 3))
STEPS = 2
"""The first makes the states and the second reads them; every array of them is compared after it."""
TURBO = replace(RECIPES["normuon"], polar=Polar(POLYNOMIALS["aol"], preconditioning="aol"))
HALF: dict[str, Any] = {"compute_dtype": torch.float32}

GROUPS: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
    ([(12, 7), (12, 7), (12, 7), (12, 7), (12, 7)], {}),
    ([(7, 12), (3, 5), (2, 6), (12, 7)], {"recipe": "normuon_2026_08", "lr": 0.3}),
    ([(8, 8), (5, 6)], {"recipe": "normuon_paper"}),
    ([(4, 6), (9, 2)], {"recipe": "optax_muon"}),
    (
        [(3, 6, 9)],
        {
            "layout": MatrixLayout(-1, -2),
            "recipe": "dion_normuon",
            "lr_mul": [1.0, 2.0, 0.5],
            "wd_mul": [0.5, 1.0, 2.0],
        },
    ),
    ([(12, 6)], {"layout": MatrixLayout(-1, -2, (6, 4, 2)), "lr_mul": 1.5}),
    ([(2, 6, 8)], {"layout": MatrixLayout(-2, -1, (5, 3)), "recipe": "normuon_2026_08"}),
    ([(6, 2, 4)], {"layout": MERGED, "recipe": "normuon_paper"}),
    ([(5, 4, 3)], {"layout": MatrixLayout((0, 2), 1), "shape_scale": "match_rms_adamw"}),
    ([(2, 3, 4, 5)], {"layout": IN_OUT, "lr_mul": [[1.0], [2.0]], "recipe": "moonlight"}),
    ([(6, 5)], {"orthogonalizer": torch.sign}),
    ([(5,), (9, 4)], {"optimizer": "adamw", "adam_weight_decay": 0.1, "lr": 0.01}),
    ([(12, 7), (12, 7)], {"beta2": 0.5}),
    ([(12, 7), (7, 12)], {"recipe": "nanochat", "layout": MatrixLayout(-1, -2)}),
    ([(9, 6)], {"recipe": TURBO}),
    ([(2, 6, 8)], {"recipe": "nanochat", "layout": MatrixLayout(-2, -1, (5, 3))}),
    ([(12, 7), (7, 12), (2, 6)], {"recipe": "muon_h"}),
    ([(2, 10, 6)], {"recipe": "normuon_h", "layout": BLOCKS_OUT, "lr_mul": [1.0, 2.0]}),
    ([(3, 5)], {"recipe": replace(RECIPES["normuon_h"], hyperball=Hyperball(radius=2.0))}),
]
"""Shapes and settings: counts and sides that no number of ranks divides, every kind of layout, cautious
and plain decay, scales that need the update's norm, multipliers over the batch, and a second beta2 for
matrices that share a stack with the first group's; rows that are equilibrated; hyperballs."""

NO_GRADIENT, ZERO_GRADIENT = 1, 2
"""Numbers of the weights that never have a gradient, and that have one of zeros."""


@functools.cache
def draw_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [shape for shapes, _ in GROUPS for shape in shapes]
    return [np.where(rng.random(s) < 1 / 4, 0.0, rng.standard_normal(s)) for s in shapes]


@functools.cache
def draw_gradients(step: int) -> list[np.ndarray | None]:
    """Another hard spectrum for each weight at each step."""
    rng = np.random.default_rng([0, step])
    kinds = list(SPECTRA.values())
    result: list[np.ndarray | None] = []
    for number, weight in enumerate(draw_weights()):
        if weight.ndim < 2:
            result.append(rng.standard_normal(weight.shape))
            continue
        draw = kinds[(number + step) % len(kinds)]
        matrices = [draw(rng, *weight.shape[-2:]) for _ in range(int(np.prod(weight.shape[:-2])))]
        result.append(np.stack(matrices).reshape(weight.shape))
    result[NO_GRADIENT] = None
    result[ZERO_GRADIENT] = np.zeros_like(result[0])
    return result


def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array).to(dtype)


def alone(array: torch.Tensor) -> torch.Tensor:
    """Places an array in one process."""
    return array


class Weights(nn.Module):
    """The weights, as they lie, and the groups of an optimizer."""

    def __init__(self, place: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.place = place
        self.weights = nn.ParameterList(place(tensor(w, dtype)) for w in draw_weights())

    def groups(self) -> list[dict[str, Any]]:
        waiting = iter(self.weights)
        return [
            {"params": [next(waiting) for _ in shapes], **settings} for shapes, settings in GROUPS
        ]

    def forward(self, gradients) -> torch.Tensor:
        """A loss with these gradients."""
        pairs = zip(self.weights, gradients, strict=True)
        terms = [(w * tensor(g, w.dtype)).sum() for w, g in pairs if g is not None]
        return torch.stack(terms).sum()

    def set_gradients(self, step: int, *, factor: float = 1.0) -> None:
        for weight, gradient in zip(self.weights, draw_gradients(step), strict=True):
            if gradient is not None:
                weight.grad = self.place(tensor(factor * gradient, weight.dtype))


def train(weights: Weights, optimizer: NorMuon, steps: Iterable[int] = range(STEPS)) -> None:
    for step in steps:
        weights.set_gradients(step)
        optimizer.step()


def train_replicas(
    weights: Weights, optimizer: NorMuon, steps: Iterable[int] = range(STEPS)
) -> None:
    """As `train`, but the whole gradient is one rank's, from the last one on: the mean is then exact."""
    for step in steps:
        ranks = dist.get_world_size()
        weights.set_gradients(step, factor=ranks * ((-1 - step) % ranks == dist.get_rank()))
        optimizer.step()


def train_by_backward(
    weights: Weights, optimizer: NorMuon, steps: Iterable[int] = range(STEPS)
) -> None:
    for step in steps:
        optimizer.zero_grad()
        weights(draw_gradients(step)).backward()
        optimizer.step()


def build(place, dtype=torch.float64, **keywords) -> tuple[Weights, NorMuon]:
    weights = Weights(place, dtype)
    keywords = {"lr": 0.05, "weight_decay": 0.2, "compute_dtype": dtype, **keywords}
    return weights, NorMuon(weights.groups(), **keywords)


def whole(arrays: list[torch.Tensor]) -> list[torch.Tensor]:
    """The arrays without their DTensors: put together from what each rank has, replicas being the same
    bits. Every rank must ask."""
    own = []
    for array in arrays:
        shard = array.to_local() if isinstance(array, DTensor) else array
        # NumPy has no bfloat16, which float32 holds; PyTorch cannot index uint16.
        wider = {torch.bfloat16: torch.float32, torch.uint16: torch.int32}
        shard = shard.detach().to(wider.get(shard.dtype, shard.dtype), copy=True)
        region: Any = [(0, size) for size in array.shape]
        if isinstance(array, DTensor):
            region = sharding_of(array).own_region(array.shape)
        # A tensor takes a millisecond to unpickle, and a NumPy array almost nothing.
        own.append((region, shard.numpy()))
    held: list[Any] = [own]
    if dist.is_initialized():
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, own)
    result = []
    for array, parts in zip(arrays, zip(*held, strict=True), strict=True):
        full = np.zeros(array.shape, parts[0][1].dtype)
        seen = np.zeros(array.shape, bool)
        for region, part in parts:
            rectangle = tuple(slice(*bounds) for bounds in region)
            part = part.reshape(full[rectangle].shape)
            assert np.array_equal(full[rectangle][seen[rectangle]], part[seen[rectangle]])
            full[rectangle], seen[rectangle] = part, True
        assert seen.all()
        made = torch.from_numpy(full)
        result.append(made.bfloat16() if array.dtype == torch.bfloat16 else made)
    return result


def outcome(weights: Weights, optimizer: NorMuon) -> dict[str, list[torch.Tensor]]:
    """The weights, with their remainders, and every other array of their states, whole."""
    found = []
    for number, weight in enumerate(weights.weights):
        found.append(("weights", number, weight))
        state = {} if number == NO_GRADIENT else optimizer.state.get(weight, {})
        for key, value in state.items():
            # A split weight has a second moment for each of its blocks.
            found.append((key.partition(".")[0], number, value))
    result: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for (key, number, _), array in zip(found, whole([array for *_, array in found]), strict=True):
        result[key][number].append(array)
    for number, (remainder,) in result.pop("remainder", {}).items():
        (weight,) = result["weights"][number]
        result["weights"][number] = [join_remainder(weight, remainder)]
    return {key: [a for each in by.values() for a in each] for key, by in result.items()}


def on_mesh(mesh: DeviceMesh, *placements) -> Callable[[torch.Tensor], torch.Tensor]:
    """Places arrays on a mesh; a Shard of an axis that the array lacks is one of its last axis."""

    def place(array: torch.Tensor) -> torch.Tensor:
        fitted = []
        for placement in placements:
            if isinstance(placement, _StridedShard):
                divides = array.shape[0] % mesh.size() == 0
                placement = placement if divides else Replicate()
            elif isinstance(placement, Shard):
                placement = Shard(min(placement.dim, array.ndim - 1))
            fitted.append(placement)
        return distribute_tensor(array, mesh, fitted, src_data_rank=None)

    return place


def meshes(ranks: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    line = init_device_mesh("cpu", (ranks,))
    result = {
        "Shard(0)": on_mesh(line, Shard(0)),
        "Shard(1)": on_mesh(line, Shard(1)),
    }
    if ranks < 4:
        result |= {
            "Shard(last)": on_mesh(line, Shard(9)),
            "Replicate": on_mesh(line, Replicate()),
        }
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        result |= {
            "Shard(0), Shard(1)": on_mesh(square, Shard(0), Shard(1)),
            "Shard(1), Shard(1)": on_mesh(square, Shard(1), Shard(1)),
            "Replicate, Shard(0)": on_mesh(square, Replicate(), Shard(0)),
            "Shard(1), Replicate": on_mesh(square, Shard(1), Replicate()),
            "Strided(0), Shard(0)": on_mesh(square, _StridedShard(0, split_factor=2), Shard(0)),
        }
    return result


def build_replicas(dtype=torch.float64, **keywords) -> tuple[Weights, NorMuon]:
    return build(alone, dtype, process_group=dist.group.WORLD, **keywords)


def build_fsdp(dtype=torch.float64, **keywords) -> tuple[Weights, NorMuon]:
    weights = Weights(alone, dtype)
    fully_shard(weights)
    keywords = {"lr": 0.05, "weight_decay": 0.2, "compute_dtype": dtype, **keywords}
    return weights, NorMuon(weights.groups(), **keywords)


@contextmanager
def counted_collectives():
    """How often each collective is called."""
    counter: Counter[str] = Counter()

    def counting(name, function):
        def call(*args, **keywords):
            counter[name] += 1
            return function(*args, **keywords)

        return call

    names = ["all_reduce", "all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor"]
    with ExitStack() as patches:
        for name in names:
            call = counting(name, getattr(dist, name))
            patches.enter_context(mock.patch.object(dist, name, call))
        yield counter


def collectives_of_one_stack(place, *, shape: tuple[int, ...] = (12, 8), **keywords):
    """The collectives of the second step of five weights."""
    params = [nn.Parameter(place(torch.ones(shape))) for _ in range(5)]
    optimizer = NorMuon(params, lr=0.1, **keywords)
    for _ in range(2):
        for param in params:
            param.grad = place(torch.eye(*shape[-2:]).expand(shape).contiguous())
        with counted_collectives() as counter:
            optimizer.step()
    return dict(counter)


def most_live_buffers() -> dict[str, int]:
    """How many stacks a step has, and the largest number whose whole buffers are in memory at once.

    Whole: with a share for every rank. A tensor that an unfinished collective holds is alive.
    """
    params = [nn.Parameter(torch.ones(12, 8)) for _ in range(dist.get_world_size() * 6)]
    optimizer = NorMuon(params, lr=0.1, process_group=dist.group.WORLD, max_stack_bytes=1)
    for param in params:
        param.grad = torch.eye(12, 8)
    made, counts = [], []
    buffer, reduce = ReplicatedStack._buffer, ReplicatedStack.reduce
    stacks = 0

    def counted(stack, like, ranks, **keywords):
        result = buffer(stack, like, ranks, **keywords)
        if ranks > 1:
            made.append(weakref.ref(result))
            counts.append(sum(each() is not None for each in made))
        return result

    def counted_reduce(stack):
        nonlocal stacks
        stacks += 1
        reduce(stack)

    with (
        mock.patch.object(ReplicatedStack, "_buffer", counted),
        mock.patch.object(ReplicatedStack, "reduce", counted_reduce),
    ):
        optimizer.step()
    return {"stacks": stacks, "most": max(counts, default=0)}


def kept_entries(place, **keywords) -> int:
    """How many numbers of momentum this rank keeps of eight 12 x 8 matrices."""
    params = [nn.Parameter(place(torch.ones(12, 8))) for _ in range(8)]
    optimizer = NorMuon(params, lr=0.1, **keywords)
    for param in params:
        param.grad = place(torch.ones(12, 8))
    optimizer.step()
    momenta = [optimizer.state[param]["momentum"] for param in params]
    return sum(momentum.to_local().numel() for momentum in momenta)


SPHERES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "geodesic": lambda u, w: to_sphere(u, w, lr=0.1),
    "retraction": lambda u, w: to_sphere(u, w, lr=0.1, path="retraction", angle="tangent", axis=0),
    "whole matrix": lambda u, w: to_sphere(u, w, lr=0.1, axis=(0, 1)),
    "own radius": lambda u, w: to_sphere(u, w, lr=torch.tensor(0.1), radius=slice_norms(w)),
    "projection": lambda u, w: project_to_sphere(u, w),
    "tangent": lambda u, w: project_to_tangent(u, w),
    "hyperball": lambda u, w: to_hyperball(u, w, lr=0.1, radius=2.0),
}
"""Functions of an update and a weight, both whole or both divided."""


def slice_norms(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(w, dim=1, keepdim=True)


def on_spheres(place) -> dict[str, tuple[torch.Tensor, Any]]:
    """What each of `SPHERES` makes, whole, and how it lies; one slice has an update along itself."""
    rng = np.random.default_rng(3)
    u, w = torch.tensor(rng.standard_normal((2, 5, 8)))
    u[1] = 2 * w[1]
    made = {name: function(place(u), place(w)) for name, function in SPHERES.items()}
    return {
        name: (whole([each])[0], getattr(each, "placements", None)) for name, each in made.items()
    }


def errors(ranks: int) -> dict[str, str]:
    """What is refused, and how."""
    mesh = init_device_mesh("cpu", (ranks,))
    matrix = torch.ones(8, 8)
    shards = nn.Parameter(distribute_tensor(matrix, mesh, [Shard(0)], src_data_rank=None))
    pending = nn.Parameter(
        DTensor.from_local(matrix, mesh, [Partial()], run_check=False), requires_grad=False
    )
    uneven = nn.Parameter(
        DTensor.from_local(
            torch.ones(2, 8),
            init_device_mesh("cpu", (ranks // 2, 2)),
            [_StridedShard(0, split_factor=2), Shard(0)],
            run_check=False,
            shape=torch.Size((7, 8)),
            stride=(8, 1),
        )
    )

    def plain_gradient():
        shards.grad = None
        optimizer = NorMuon([shards], lr=0.1)
        with mock.patch.object(type(shards), "grad", torch.ones(8, 8), create=True):
            optimizer.step()

    attempts = {
        "triton": lambda: NorMuon([shards], lr=0.1, backend="triton"),
        "process_group": lambda: NorMuon([shards], lr=0.1, process_group=dist.group.WORLD),
        "partial": lambda: NorMuon([pending], lr=0.1),
        "strided": lambda: NorMuon([uneven], lr=0.1),
        "plain gradient": plain_gradient,
        "copy": lambda: copy.deepcopy(
            NorMuon([nn.Parameter(matrix)], lr=0.1, process_group=dist.group.WORLD)
        ),
    }
    result = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            result[name] = "nothing was raised"
        except (ValueError, RuntimeError, TypeError) as error:
            result[name] = f"{type(error).__name__}: {error}"
    return result


KINDS: dict[str, tuple[Callable, Callable]] = {
    "fully_shard": (build_fsdp, train_by_backward),
    "process_group": (build_replicas, train_replicas),
}

DTYPES = {
    1: (torch.float64,),
    2: (torch.float64, torch.float32),
    4: (torch.float64, torch.bfloat16),
}
"""In which dtypes so many ranks step: their number decides who has which part, and not how it rounds."""


def save(folder: Path, name: str, weights: Weights, optimizer: NorMuon) -> None:
    save_checkpoint(
        {"model": weights.state_dict(), "optimizer": get_optimizer_state_dict(weights, optimizer)},
        checkpoint_id=folder / name,
    )


def restore(folder: Path, name: str, weights: Weights, optimizer: NorMuon) -> None:
    model, state = weights.state_dict(), get_optimizer_state_dict(weights, optimizer)
    # A parameter that never had a gradient has no state to load.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    load_checkpoint(
        {"model": model, "optimizer": state}, checkpoint_id=folder / name, planner=planner
    )
    weights.load_state_dict(model)
    set_optimizer_state_dict(weights, optimizer, state)


def continue_from_one_process(make, training) -> dict[str, list[torch.Tensor]]:
    """A step in one process, whose state dict many ranks then load."""
    first, optimizer = build(alone)
    train(first, optimizer, range(1))
    weights, others = make()
    others.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for weight, trained in zip(weights.weights, first.weights, strict=True):
            if isinstance(weight, DTensor):
                weight.copy_(distribute_tensor(trained, weight.device_mesh, weight.placements))
            else:
                weight.copy_(trained)
    training(weights, others, range(1, STEPS))
    return outcome(weights, others)


def all_cases(folder: Path, checkpoints: Path, saving: bool) -> dict[Any, Any]:
    """Every case on this many ranks: by name, what came of it."""
    ranks = dist.get_world_size()
    result: dict[Any, Any] = {}
    for name, place in meshes(ranks).items():
        in_float32 = name == "Shard(1)" and torch.float32 in DTYPES[ranks]
        for dtype in (torch.float64, torch.float32) if in_float32 else (torch.float64,):
            weights, optimizer = build(place, dtype)
            train(weights, optimizer)
            result[name, dtype] = outcome(weights, optimizer)
    for name, (make, training) in KINDS.items():
        for dtype in DTYPES[ranks]:
            half = dtype == torch.bfloat16
            keywords: dict[str, Any] = {"bf16_remainder": True, **HALF} if half else {}
            weights, optimizer = make(dtype=dtype, **keywords)
            training(weights, optimizer)
            result[name, dtype] = outcome(weights, optimizer)
    small: dict[str, Any] = {"max_stack_bytes": 1}
    weights, optimizer = build(on_mesh(init_device_mesh("cpu", (ranks,)), Shard(0)), **small)
    train(weights, optimizer)
    result["Shard(0), one matrix a rank", torch.float64] = outcome(weights, optimizer)
    weights, optimizer = build_replicas(**small)
    train_replicas(weights, optimizer)
    result["process_group, one matrix a rank", torch.float64] = outcome(weights, optimizer)
    for name, (make, training) in KINDS.items():
        for lowered in (False, True):
            keywords = {"dtype": torch.bfloat16, "bf16_remainder": True} if lowered else {}
            weights, optimizer = make(**keywords)
            label = f"{name}{' lowered' if lowered else ''}"
            if saving:
                training(weights, optimizer, range(1))
                save(checkpoints, label, weights, optimizer)
            else:
                restore(checkpoints, label, weights, optimizer)
            training(weights, optimizer, range(1, STEPS))
            result["continued " + label] = outcome(weights, optimizer)
        result["from one process " + name] = continue_from_one_process(make, training)
    line = init_device_mesh("cpu", (ranks,))
    rows, columns = on_mesh(line, Shard(0)), on_mesh(line, Shard(1))
    result["collectives"] = {
        "rows": collectives_of_one_stack(rows),
        "columns": collectives_of_one_stack(columns),
        "rms": collectives_of_one_stack(rows, recipe="normuon_paper"),
        "muon": collectives_of_one_stack(rows, recipe="muon"),
        "hyperball": collectives_of_one_stack(rows, recipe="muon_h"),
        "whole matrices": collectives_of_one_stack(
            rows, shape=(4, 12, 8), layout=MatrixLayout(-1, -2)
        ),
        "replicas": collectives_of_one_stack(alone, process_group=dist.group.WORLD),
    }
    result["kept"] = {
        "shards": kept_entries(columns),
        "replicas": kept_entries(alone, process_group=dist.group.WORLD),
    }
    result["buffers"] = most_live_buffers()
    result["spheres"] = {"rows": on_spheres(rows), "columns": on_spheres(columns)}
    if ranks == 4:
        result["errors"] = errors(ranks)
    return result
