"""What the devices of a mesh do in a second, measured through JAX in the run that uses it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.arithmetic import Rates
from benchmarks.collectives import Collective
from benchmarks.mesh_steps import repeat
from benchmarks.timing import median_wall_milliseconds

CHAIN = 8
"""All-to-alls in a row, to measure one."""

SMALL = 2**10
"""Bytes of an operand that takes no time on the wire."""


def measure_rates(*, side: int, copied: int) -> Rates:
    """As `machine.measure_rates`: a bfloat16 product and a copy, on the first device."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    milliseconds = _milliseconds(lambda _: product(a, b))
    products = 2 * side**3 / milliseconds * 1e3
    source = jnp.zeros(copied // 4, jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    milliseconds = _milliseconds(lambda _: copy(source))
    return Rates(products=products, copies=2 * copied / milliseconds * 1e3)


def all_to_all_rates(mesh: Mesh, *, operand_bytes: int) -> tuple[float, float]:
    """Bytes a second that a device sends in an all-to-all, and the seconds of a small one."""
    large, small = (_seconds(mesh, size) for size in (operand_bytes, SMALL))
    return Collective("all-to-all", mesh.size, operand_bytes).sent / large, small


def _seconds(mesh: Mesh, operand_bytes: int) -> float:
    chain = repeat(Collective("all-to-all", mesh.size, operand_bytes), mesh, CHAIN)
    milliseconds = median_wall_milliseconds(chain.function, chain.carry, jax.block_until_ready)
    return milliseconds / CHAIN / 1e3


def _milliseconds(function) -> float:
    return median_wall_milliseconds(function, None, jax.block_until_ready, repetitions=7)
