"""`python -m benchmarks.crossings`: how many files a reader of one step by kernels passes through.

A step of `optax_normuon` by kernels is traced once for a mesh of four virtual CPU devices, over which
every matrix is divided by its rows. Triton's interpreter stands for the kernels
(`parity_tests.interpreted`); nothing is run, compiled or lowered, and no GPU is needed. While
`tx.update` is traced, `sys.setprofile` sees every call of a Python function. Of functions in
`normuon_core` and `optax_normuon` are counted

- the files that at least one called function stands in;
- the crossings: calls of a function by one in another of these files. A call that comes by way of a
  library, as from `jax.tree.map`, is none; a generator counts once, however often it is resumed.

Each case is counted in a process of its own, since a second trace finds much of the first's work in
caches. What `tx.init` does, and what is done when a module is imported, is not counted.
"""

import os

# Triton decides when it is imported: the kernels are to be accepted on a CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normuon_core
import optax_normuon
from benchmarks.workloads import DECAY, OUT_IN, RATE

CASES = {
    "one weight": {"up": (64, 256)},
    "six weights": {
        "query": (256, 256),
        "key": (64, 256),
        "value": (64, 256),
        "out": (256, 256),
        "up": (1024, 256),
        "down": (256, 1024),
    },
}
"""Shapes of weights: a single one, and those of a layer of a transformer."""

DEVICES = 4

PACKAGES = tuple(f"{own.__path__[0]}{os.sep}" for own in (normuon_core, optax_normuon))
ROOT = Path(PACKAGES[0]).parent


class Calls:
    """What `sys.setprofile` has seen: files entered, and (from, to) of every crossing."""

    def __init__(self):
        self.files: set[str] = set()
        self.crossings: Counter[tuple[str, str]] = Counter()
        self._generators: dict[int, FrameType] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        del argument
        own = frame.f_code.co_filename
        if event != "call" or not own.startswith(PACKAGES):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            if id(frame) in self._generators:
                return
            # Kept, so that no later frame has its id.
            self._generators[id(frame)] = frame
        self.files.add(own)
        caller = "" if frame.f_back is None else frame.f_back.f_code.co_filename
        if caller.startswith(PACKAGES) and caller != own:
            self.crossings[_name(caller), _name(own)] += 1


def _name(path: str) -> str:
    return str(Path(path).relative_to(ROOT))


def count(shapes: dict[str, tuple[int, int]]) -> tuple[Calls, int]:
    """(the calls, how many kernels are launched) of one trace of a step of weights of these shapes."""
    # Imported late, with Triton: whoever reads what is counted needs neither.
    from parity_tests import interpreted

    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Explicit,))
    lies = NamedSharding(mesh, P("fsdp"))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lies)
        for name, shape in shapes.items()
    }
    with interpreted.interpreted_kernels():
        tx = optax_normuon.normuon(
            RATE,
            weight_decay=DECAY,
            layout=OUT_IN,
            backend="triton",
            # The interpreter takes no bfloat16.
            compute_dtype=jnp.float16,
        )
        state = jax.eval_shape(tx.init, params)
        step, calls = jax.jit(tx.update), Calls()
        sys.setprofile(calls)
        try:
            traced = step.trace(params, state, params)
        finally:
            sys.setprofile(None)
    return calls, str(traced.jaxpr).count("pure_callback[")


def main(
    case: Annotated[str | None, typer.Option(help="One of the two cases; none: both.")] = None,
    pairs: Annotated[
        bool, typer.Option(help="List the crossings too, the most frequent first.")
    ] = False,
) -> None:
    """Count the files that one step by kernels on a mesh enters, and the crossings between them."""
    if case is None:
        for each in CASES:
            command = [sys.executable, "-m", "benchmarks.crossings", "--case", each]
            subprocess.run([*command, *(["--pairs"] if pairs else [])], check=True)
        return
    calls, launches = count(CASES[case])
    print(
        f"{case}: {len(calls.files)} files, {calls.crossings.total()} crossings,"
        f" {launches} launches"
    )
    if pairs:
        for (start, stop), number in calls.crossings.most_common():
            print(f"{number:5} {start} -> {stop}")


if __name__ == "__main__":
    typer.run(main)
