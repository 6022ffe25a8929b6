"""A small run on a mesh that Orbax saves after every step; as a script one to be killed in a save.

`python tests/in_jax/saved_run.py DIRECTORY` trains until the third save has begun and then waits in it.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.path import atomicity

from optax_normuon import MatrixLayout, normuon, state_specs
from tests.in_jax.meshes import draw, mesh_of, put, step_of

SHAPES = {"a": (16, 32), "b": (16, 32), "qkv": (16, 32), "bias": (16,)}
SPECS = {"a": P("fsdp", "tp"), "b": P("fsdp", "tp"), "qkv": P("fsdp"), "bias": P("fsdp")}
LAYOUT = {
    "a": MatrixLayout(0, 1),
    "b": MatrixLayout(0, 1),
    "qkv": MatrixLayout(0, 1, (16, 8, 8)),
    "bias": None,
}
OPTIMIZER = normuon(0.02, layout=LAYOUT, weight_decay=0.1, compute_dtype=jnp.float32)


def begin(mesh):
    """(parameters, state) before the first step."""
    params = put(draw(SHAPES), SPECS, mesh)
    specs = state_specs(OPTIMIZER, params, SPECS)
    return params, jax.device_put(OPTIMIZER.init(params), _on(mesh, specs))


def train(params, state, mesh, steps):
    """The steps of these numbers: each has its own gradients."""
    step = step_of(OPTIMIZER)
    for number in steps:
        params, state = step(put(draw(SHAPES, number), SPECS, mesh), state, params)
    return params, state


def restored(manager: ocp.CheckpointManager, step: int, mesh):
    """(parameters, state) of a saved step, on whatever mesh."""
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    state = jax.eval_shape(OPTIMIZER.init, params)
    shardings = _on(mesh, (SPECS, state_specs(OPTIMIZER, params, SPECS)))
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (params, state),
        shardings,
    )
    return manager.restore(step, args=ocp.args.StandardRestore(wanted))


def _on(mesh, specs):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _wait_in_the_next_save() -> None:
    """At that moment everything is written, but the checkpoint does not have its name yet."""

    async def wait(path, *arguments, **keywords):
        print("saving", flush=True)
        time.sleep(600)

    atomicity.AtomicRenameTemporaryPath.finalize = wait


def main(directory: str) -> None:
    """Steps 1 and 2 are saved; in the save of step 3 the run waits."""
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = mesh_of(fsdp=2, tp=2)
    manager = ocp.CheckpointManager(Path(directory))
    params, state = begin(mesh)
    for number in (1, 2, 3):
        params, state = train(params, state, mesh, [number])
        if number == 3:
            _wait_in_the_next_save()
        manager.save(number, args=ocp.args.StandardSave((params, state)))
        manager.wait_until_finished()


if __name__ == "__main__":
    main(sys.argv[1])
