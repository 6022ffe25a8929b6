"""Arrays of matrices as int8 with a scale for each block, on one device and on a mesh.

    scale = max |m| over the block / 127, q = round(m / scale), read back as q scale

The scale is rounded to bfloat16 (by way of float32), and q to the nearest integer, half to even. So an
entry is off by half a scale at most, and what was read back is stored as it was. Where an entry of a
block is not finite, its scale is NaN, and the whole block is read back as NaN. A scale is never below
`SMALLEST_SCALE`, so that tiny entries lose digits as they do in float32 near its smallest normal number.

The largest entry of a block is the same in whatever order it is looked for, so that the numbers do not
depend on the mesh. A block that a mesh divides costs its scale an all-reduce.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normuon_core.layout import MatrixView
from normuon_core.quantization import BLOCK, LARGEST, SMALLEST_SCALE, blocks
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.mesh.collectives import reshard_as, run_on_mesh
from optax_normuon.mesh.scales import BlocksOnMesh, blocks_on_mesh
from optax_normuon.mesh.specs import Specs

Arrays = Mapping[KeyPath, jax.Array]
Result = TypeVar("Result")


def quantized(
    arrays: Arrays, views: Mapping[KeyPath, MatrixView], specs: Specs | None
) -> tuple[dict[KeyPath, jax.Array], dict[KeyPath, jax.Array]]:
    """(int8 arrays of the leaves' shapes, their scales, bfloat16, of `scale_shape`), by path."""
    lies = [blocks_on_mesh(views[path], path, specs) for path in arrays]

    def convert(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        pairs = [_quantized(x, lie) for x, lie in zip(arrays, lies, strict=True)]
        return [q for q, _ in pairs], [scale for _, scale in pairs]

    axes = [lie.axes for lie in lies]
    scale_axes = [lie.scale_axes for lie in lies]
    q, scales = _on_devices(convert, specs, (list(arrays.values()),), (axes,), (axes, scale_axes))
    return _by_path(arrays, q, specs), dict(zip(arrays, scales, strict=True))


def dequantized(
    q: Arrays,
    scales: Arrays,
    dtypes: Mapping[KeyPath, DTypeLike],
    views: Mapping[KeyPath, MatrixView],
    specs: Specs | None,
) -> dict[KeyPath, jax.Array]:
    """The arrays that were `quantized`, each in its dtype."""
    lies = [blocks_on_mesh(views[path], path, specs) for path in q]
    own = [dtypes[path] for path in q]

    def convert(q: list[jax.Array], scales: list[jax.Array]) -> list[jax.Array]:
        return [_dequantized(*each) for each in zip(q, scales, own, lies, strict=True)]

    axes = [lie.axes for lie in lies]
    arguments = (list(q.values()), [scales[path] for path in q])
    in_axes = (axes, [lie.scale_axes for lie in lies])
    return _by_path(q, _on_devices(convert, specs, arguments, in_axes, axes), specs)


def _on_devices(
    convert: Callable[..., Result],
    specs: Specs | None,
    arguments: tuple[Any, ...],
    in_axes: tuple[Any, ...],
    out_axes: Any,
) -> Result:
    if specs is None:
        return convert(*arguments)
    return run_on_mesh(convert, specs, arguments, in_axes, out_axes)


def _by_path(
    paths: Iterable[KeyPath], arrays: Sequence[jax.Array], specs: Specs | None
) -> dict[KeyPath, jax.Array]:
    """The arrays, each where its leaf lies."""
    own = zip(paths, arrays, strict=True)
    if specs is None:
        return dict(own)
    return {path: reshard_as(x, specs.leaves[path], specs) for path, x in own}


def _quantized(x: jax.Array, lie: BlocksOnMesh) -> tuple[jax.Array, jax.Array]:
    stored, shape = x.shape, lie.local.shape
    x = x.reshape(shape)
    scale = _scale_of(_largest(jnp.abs(x), lie))
    q = jnp.round(x / _over_entries(scale.astype(x.dtype), lie))
    # In a block with a NaN the scale says it: no integer can.
    q = jnp.where(jnp.isfinite(q), jnp.clip(q, -LARGEST, LARGEST), 0)
    folded = lie.local.fold(scale.shape)
    return q.astype(jnp.int8).reshape(stored), scale.reshape(folded)


def _dequantized(q: jax.Array, scale: jax.Array, dtype: DTypeLike, lie: BlocksOnMesh) -> jax.Array:
    stored, shape, axis = q.shape, lie.local.shape, lie.axis
    count = blocks(lie.length) if lie.divided else blocks(shape[axis])
    scale = scale.reshape((*shape[:axis], count, *shape[axis + 1 :]))
    return (q.reshape(shape).astype(dtype) * _over_entries(scale.astype(dtype), lie)).reshape(
        stored
    )


def _scale_of(largest: jax.Array) -> jax.Array:
    """NaN where the largest is infinite or NaN."""
    scale = (largest / LARGEST).astype(jnp.float32).astype(jnp.bfloat16)
    scale = jnp.maximum(scale, jnp.bfloat16(SMALLEST_SCALE))
    return jnp.where(jnp.isfinite(scale), scale, jnp.bfloat16(jnp.nan))


def _largest(magnitudes: jax.Array, lie: BlocksOnMesh) -> jax.Array:
    """The largest of each block, along the blocks' axis; infinity where one is NaN."""
    axis, length = lie.axis, magnitudes.shape[lie.axis]
    # Not every all-reduce of maxima hands on a NaN.
    magnitudes = jnp.where(jnp.isnan(magnitudes), jnp.inf, magnitudes)
    if not lie.divided:
        return _block_maxima(magnitudes, axis)
    start = _first_entry(lie)
    # The device's entries where they lie in the blocks that they touch, and these among all blocks.
    window = _axis_of(magnitudes, axis, BLOCK * (blocks(length) + 1))
    window = jax.lax.dynamic_update_slice_in_dim(window, magnitudes, start % BLOCK, axis)
    touched = _block_maxima(window, axis)
    everywhere = _axis_of(touched, axis, blocks(lie.length) + touched.shape[axis])
    everywhere = jax.lax.dynamic_update_slice_in_dim(everywhere, touched, start // BLOCK, axis)
    own = jax.lax.slice_in_dim(everywhere, 0, blocks(lie.length), axis=axis)
    return jax.lax.pmax(own, lie.divided)


def _first_entry(lie: BlocksOnMesh) -> jax.Array:
    """Where this device's part of the blocks' axis begins in the whole."""
    return jax.lax.axis_index(lie.divided) * lie.local.shape[lie.axis]


def _axis_of(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros of the shape of x, but for the size of one axis."""
    return jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)


def _block_maxima(x: jax.Array, axis: int) -> jax.Array:
    """Of magnitudes: zeros fill up the last block."""
    count = blocks(x.shape[axis])
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * BLOCK - x.shape[axis])
    apart = jnp.pad(x, widths).reshape((*x.shape[:axis], count, BLOCK, *x.shape[axis + 1 :]))
    return apart.max(axis + 1)


def _over_entries(scale: jax.Array, lie: BlocksOnMesh) -> jax.Array:
    """The scale of every entry, along the blocks' axis."""
    size = lie.local.shape[lie.axis]
    if lie.divided:
        of_entry = (_first_entry(lie) + jnp.arange(size)) // BLOCK
        return jnp.take(scale, of_entry, axis=lie.axis)
    repeated = jnp.repeat(scale, BLOCK, axis=lie.axis)
    return jax.lax.slice_in_dim(repeated, 0, size, axis=lie.axis)
