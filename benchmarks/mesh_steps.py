"""Optimizer steps on a mesh, and parts of them, compiled and ready to be timed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_normuon
from benchmarks.collectives import Collective, collectives
from benchmarks.workloads import DECAY, OUT_IN, Stack, matrix_sizes

SPEC = PartitionSpec("fsdp", None)
"""Every matrix is divided along its first axis."""

STACKED = PartitionSpec(None, "fsdp", None)
"""The same, of leaves (layers, out, in)."""


@dataclass
class Prepared:
    """A function carry -> carry, and what its compiler says of it.

    Attributes:
      temporary: bytes on one device beside arguments and results; None where the backend does not tell.
    """

    function: Callable[[Any], Any]
    carry: Any
    collectives: list[Collective]
    temporary: int | None


def mesh_of(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))


def normuon() -> optax.GradientTransformation:
    return optax_normuon.normuon(0.02, layout=OUT_IN, weight_decay=DECAY, param_specs=SPEC)


def normuon_of_stacks() -> optax.GradientTransformation:
    return optax_normuon.normuon(0.02, layout=OUT_IN, weight_decay=DECAY, param_specs=STACKED)


def optax_muon() -> optax.GradientTransformation:
    """Knows nothing of meshes: XLA's partitioner decides."""
    return optax.contrib.muon(0.02, weight_decay=DECAY)


def share_of(shapes: Sequence[Stack], devices: int) -> list[Stack]:
    """The matrices that one of several devices orthogonalizes."""
    return [(math.ceil(count / devices), rows, columns) for count, rows, columns in shapes]


def step(
    make: Callable[[], optax.GradientTransformation],
    shapes: Sequence[Stack],
    mesh: Mesh,
    *,
    stacked: bool = False,
    in_place: bool = False,
) -> Prepared:
    """update and apply_updates on float32 matrices; parameters and state are donated.

    On a mesh of one device the same code runs on whole matrices.

    Args:
      stacked: whether all matrices of one shape are a leaf; else each is one.
      in_place: by `optax_normuon.apply` in place of the two calls.
    """
    tx, lies = make(), NamedSharding(mesh, STACKED if stacked else SPEC)
    sizes = list(shapes if stacked else matrix_sizes(shapes))
    params, grads = (
        {
            f"{i:03}": jax.device_put(
                scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), size), lies
            )
            for i, size in enumerate(sizes)
        }
        for seed, scale in ((0, 0.02), (1, 1.0))
    )
    lying = jax.tree.map(lambda _: lies, params)
    state_lies = optax_normuon.state_specs(tx, params, lying)
    state = jax.jit(tx.init, out_shardings=state_lies)(params)

    # Parameters before state, as in the result: XLA pairs donated buffers in this order.
    def one(grads, params, state):
        if in_place:
            return optax_normuon.apply(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(
            one,
            in_shardings=(lying, lying, state_lies),
            out_shardings=(lying, state_lies),
            donate_argnums=(1, 2),
        )
        .lower(grads, params, state)
        .compile()
    )
    return _prepared(compiled, lambda carry: compiled(grads, *carry), (params, state), mesh)


def replay(found: Sequence[Collective], mesh: Mesh) -> Prepared:
    """Collectives of these kinds and sizes and nothing else, one after the other.

    Each is among all devices of the mesh, on numbers that are there already.
    """
    operands = [each for each in found for _ in range(each.runs)]

    def one(arrays):
        made = []
        for each, x in zip(operands, arrays, strict=True):
            if made:
                x, made[-1] = jax.lax.optimization_barrier((x, made[-1]))
            made.append(_make(each.kind, x, mesh.size))
        return made

    return _on_parts(one, [_operand(each, mesh) for each in operands], mesh)


def repeat(each: Collective, mesh: Mesh, times: int) -> Prepared:
    """The same collective `times` times, on what the one before has brought."""

    def chain(x):
        for _ in range(times):
            x = jax.lax.optimization_barrier(_make(each.kind, x, mesh.size))
        return x

    return _on_parts(chain, _operand(each, mesh), mesh)


def _operand(each: Collective, mesh: Mesh) -> jax.Array:
    """Zeros, of which each device has as many bytes as its operand, rounded up to whole numbers."""
    lies = NamedSharding(mesh, PartitionSpec("fsdp"))
    if each.kind == "all-reduce":
        entries, dtype = math.ceil(each.operand_bytes / 4), jnp.float32
    else:
        entries, dtype = mesh.size * math.ceil(each.operand_bytes / 2 / mesh.size), jnp.uint16
    return jnp.zeros(mesh.size * entries, dtype, device=lies)


def _make(kind: str, x, devices: int):
    """The collective, its result cut to x's shape."""
    match kind:
        case "all-to-all":
            return jax.lax.all_to_all(x.reshape(devices, -1), "fsdp", 0, 0).reshape(-1)
        case "all-gather":
            return jax.lax.all_gather(x, "fsdp", tiled=True)[: len(x)]
        case "all-reduce":
            return jax.lax.psum(x, "fsdp")
    raise ValueError(f"{kind} is no collective of a NorMuon step; nothing here repeats it.")


def _on_parts(function: Callable, carry, mesh: Mesh) -> Prepared:
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=PartitionSpec("fsdp"),
        out_specs=PartitionSpec("fsdp"),
        check_vma=False,
    )
    compiled = jax.jit(mapped, donate_argnums=0).lower(carry).compile()
    return _prepared(compiled, compiled, carry, mesh)


def _prepared(compiled, function, carry, mesh: Mesh) -> Prepared:
    memory = compiled.memory_analysis()
    return Prepared(
        function,
        carry,
        collectives(compiled.as_text(), mesh.size),
        memory.temp_size_in_bytes if memory else None,
    )
