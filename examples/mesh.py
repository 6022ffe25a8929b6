"""A run on many devices: what lies where on a mesh that is written as `fsdp=2,tensor=2`.

Axis `fsdp` divides parameters and batch, `tensor` the parameters, `data` the batch. An axis of any other
name divides nothing.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples.errors import BadInput

BATCH_AXES = ("data", "fsdp")
# Kernels are (in, out), the embedding is (bytes, width). A layer divided by columns hands its divided
# output to one divided by rows, whose products are summed over `tensor`.
BY_COLUMNS = ("embed", "query", "key", "value", "up", "gate", "lm_head")
BY_ROWS = ("out", "down")


def read_mesh(text: str) -> Mesh:
    """The mesh of a text `name=size,...`, in automatic mode: XLA places what is not placed here.

    Alone, a process takes as many of its devices as there have to be; several share all of theirs.

    Raises:
      BadInput: the text is not of that form, or the sizes do not fit the devices.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([1-9]\d*)\s*", entry)
        if match is None:
            raise BadInput(f"{entry.strip()!r} is no name=size, as in fsdp=2,tensor=2.")
        name, size = match[1], int(match[2])
        if name in sizes:
            raise BadInput(f"the axis {name!r} is there twice: give each axis once.")
        sizes[name] = size
    needed, found, processes = math.prod(sizes.values()), jax.device_count(), jax.process_count()
    if needed > found or (processes > 1 and needed < found):
        own = math.ceil(needed / processes)
        raise BadInput(
            f"{text} is a mesh of {needed} devices, but JAX has {found}: give sizes whose product is"
            f" the number of devices, or set JAX_NUM_CPU_DEVICES={own}"
            f"{' in every process' if processes > 1 else ''} for virtual devices on the CPU."
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:needed],
    )


def parameter_spec(layer: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Over which axes a layer's parameter is divided: FSDP on one side, tensor parallelism on the other.

    Sides that an axis does not divide are whole, and so are whatever is no matrix and the axis of a
    stack of layers.
    """
    if layer in BY_COLUMNS:
        axes = ("fsdp", "tensor")
    elif layer in BY_ROWS:
        axes = ("tensor", "fsdp")
    else:
        return PartitionSpec()
    fitting = (
        axis if size % mesh.shape.get(axis, size + 1) == 0 else None
        for axis, size in zip(axes, shape[-2:], strict=True)
    )
    return PartitionSpec(*[None] * (len(shape) - 2), *fitting)


def parameter_shardings(params, mesh: Mesh):
    """A tree like the parameters', of NamedShardings."""

    def sharding(path, leaf):
        *_, layer, _ = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, parameter_spec(layer, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, params)


def specs_on(mesh: Mesh | None) -> Any:
    """The `param_specs` of optax_normuon's transformations."""
    return None if mesh is None else functools.partial(parameter_shardings, mesh=mesh)


def batch_parts(mesh: Mesh) -> int:
    """Among how many devices, or groups of them, a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """A batch on the devices, divided over `BATCH_AXES`; every process gives its own rows of it.

    Args:
      batch: arrays whose first axis has a size that `batch_parts` divides.
    """
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in batch.items()}
    sharding = batch_sharding(mesh)
    return {name: _placed(value, sharding) for name, value in batch.items()}


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    places = sharding.devices_indices_map(value.shape)
    own = [
        np.arange(len(value))[place[0]]
        for device, place in places.items()
        if device.process_index == jax.process_index() and place
    ]
    return jax.make_array_from_process_local_data(sharding, value[np.unique(own)], value.shape)


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in mesh.axis_names if axis in BATCH_AXES)
