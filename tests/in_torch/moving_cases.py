"""What the ranks of `test_torch_run_arrays.py` run; nothing here imports JAX."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.in_torch.distributed_cases import alone, build, build_fsdp, build_replicas, train
from torch_ref import (
    parameters_from_arrays,
    parameters_to_arrays,
    state_from_arrays,
    state_to_arrays,
)

DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def keywords_of(name):
    if name == "float64":
        return {}
    return {"bf16_remainder": True, "adam_every": 3, "compute_dtype": torch.float32}


def named(weights):
    return list(weights.named_parameters())


def saved(weights, optimizer):
    return parameters_to_arrays(named(weights)) | state_to_arrays(optimizer, named(weights))


def loaded(weights, optimizer, arrays):
    parameters_from_arrays(arrays, named(weights))
    state_from_arrays(optimizer, arrays, named(weights))
    return weights, optimizer


def one_process(place, name):
    """The arrays of a run on one process."""
    weights, optimizer = build(place, DTYPES[name], **keywords_of(name))
    train(weights, optimizer, range(2))
    return saved(weights, optimizer)


def moved_over_ranks(folder: Path) -> dict[str, list[str]]:
    """For each way of working and dtype, the arrays that were changed by being divided and gathered."""
    result = {}
    for name in DTYPES:
        with np.load(folder / f"{name}.npz") as file:
            arrays = dict(file)
        for way, make in (("fully_shard", build_fsdp), ("process_group", build_replicas)):
            weights, optimizer = loaded(*make(DTYPES[name], **keywords_of(name)), arrays)
            back = saved(weights, optimizer)
            unlike = [key for key in arrays if not same_bits(arrays[key], back.get(key))]
            own = [state["momentum"] for state in optimizer.state.values() if "momentum" in state]
            held = sum(each.to_local().numel() for each in own)
            whole = sum(each.numel() for each in own)
            assert 0 < held < whole, (held, whole, dist.get_rank())
            result[f"{way}, {name}"] = unlike + sorted(back.keys() - arrays.keys())
    return result


def radii_before_the_first_step() -> dict[str, float]:
    """For each way of working, how far the radii of a new optimizer are from those of one process."""
    expected = radii(*build(alone))
    result = {}
    for way, make in (("fully_shard", build_fsdp), ("process_group", build_replicas)):
        found = radii(*make())
        assert found.keys() == expected.keys() != set()
        result[way] = max(np.abs(found[key] / expected[key] - 1).max() for key in expected)
    return result


def radii(weights, optimizer):
    arrays = state_to_arrays(optimizer, named(weights))
    return {key: array for key, array in arrays.items() if key.startswith("radius/")}


def all_cases(folder: Path):
    return moved_over_ranks(folder), radii_before_the_first_step()


def same_bits(read, own) -> bool:
    return own is not None and read.shape == own.shape and read.tobytes() == own.tobytes()
