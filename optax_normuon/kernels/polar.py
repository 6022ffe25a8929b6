"""The polar factor by kernels, on stacks that come from anywhere."""

import jax
import jax.numpy as jnp

from normuon_core.cost import Form
from normuon_core.fused_step import polar_factors_of_pieces
from normuon_core.kernels.geometry import block_geometries
from normuon_core.kernels.launches import Output
from normuon_core.kernels.pieces import Block, Leaf, Piece
from normuon_core.kernels.products import iterate_stack as iterate_with
from normuon_core.kernels.source import RATES
from normuon_core.layout import MatrixLayout
from normuon_core.polynomials import Coefficients
from normuon_core.recipes import Polar
from optax_normuon.kernels import launcher


def polar_factors(stack: jax.Array, polar: Polar, *, form: Form, dtype: str) -> jax.Array:
    """Stage 2 of a stack (count, rows, columns), in the compute dtype; under `vmap` one larger stack."""

    @jax.custom_batching.custom_vmap
    def factors(stack):
        view = MatrixLayout(reduction_axis=-1, output_axis=-2).on(stack.shape)
        rates = jnp.zeros((1, RATES), jnp.float32)
        leaf = Leaf(stack, None, rates, rates, output_of(rates), output_of(rates))
        (geometry,) = block_geometries(view)
        count = len(stack)
        v, _ = polar_factors_of_pieces(
            launcher.launch,
            launcher.describe_device(),
            [Piece(Block(leaf, geometry, count, None, None, None), 0, count)],
            polar,
            momentum=None,
            form=form,
            dtype=dtype,
        )
        v = v[..., : geometry.long]
        return v.mT if stack.shape[-2] > stack.shape[-1] else v

    @factors.def_vmap
    def _(axis_size, in_batched, stacks):
        del in_batched
        merged = factors(stacks.reshape(-1, *stacks.shape[-2:]))
        return merged.reshape(axis_size, -1, *merged.shape[-2:]), True

    return factors(stack)


def iterate_stack(x, coefficients: Coefficients, form, dtype: str):
    """The iteration alone, on a stack (count, rows, columns) that is normalised and scaled."""
    rows, columns = x.shape[-2:]
    tall = rows > columns
    wide = x.mT if tall else x
    view = MatrixLayout(reduction_axis=-1, output_axis=-2).on(wide.shape)
    (geometry,) = block_geometries(view)
    v = iterate_with(
        launcher.launch,
        launcher.describe_device(),
        jnp.pad(wide, [(0, 0), (0, 0), (0, geometry.pitch - geometry.long)]),
        coefficients,
        geometry=geometry,
        count=len(wide),
        form=form,
        dtype=dtype,
    )[..., : geometry.long]
    return v.mT if tall else v


def output_of(array) -> Output:
    """Shape and dtype of an array, as a launch is told what it writes."""
    return Output(tuple(array.shape), jnp.dtype(array.dtype).name)
