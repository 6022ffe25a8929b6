"""Meshes of virtual devices, and what the compiler made of a step on them."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

OPERATIONS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"


def mesh_of(mode=AxisType.Explicit, **sizes):
    """A mesh over the first devices; axes by name, as in `fsdp=4, tp=2`."""
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(mode,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )


def put(tree, specs, mesh):
    """The tree's arrays on the mesh; without one on the first device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def step_of(tx):
    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled_step(tx, shapes, specs, mesh):
    """The compiler's text of one step."""
    params = put(draw(shapes), specs, mesh)
    state = tx.init(params)
    return step_of(tx).lower(params, state, params).compile().as_text()


def collectives(text: str) -> list[tuple[str, int, bool]]:
    """(operation, bytes of its result on one device, whether it stands in a loop) of each collective."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header.group(1)
        if match := re.search(rf"= (.*?) ({OPERATIONS})(?:-start)?\(", line):
            found.append((match.group(2), _bytes(match.group(1)), computation in bodies))
    return found


def counts(text: str) -> Counter:
    """How many of each collective."""
    return Counter(operation for operation, _, _ in collectives(text))


def _bytes(shapes: str) -> int:
    widths = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "u16": 2, "s32": 4, "u32": 4}
    return sum(
        widths[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )
