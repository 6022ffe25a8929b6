"""Stage 5: each matrix scaled by its shape, and by `lr_mul`."""

import jax
import jax.numpy as jnp
import optax

from normuon_core.layout import MatrixView
from normuon_core.shape_rules import RMS_FLOOR, ShapeRule, check_shape_rule, shape_factor
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, resolve_layouts
from optax_normuon.leaves.multipliers import Multiplier, MultiplierTree, resolve_multipliers
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.groups import over_leaf, sums_of_matrices


@refuse_injection_of_static_arguments
def scale_by_shape(
    rule: ShapeRule = "original",
    *,
    lr_mul: MultiplierTree = None,
    layout: LayoutTree = None,
) -> optax.GradientTransformation:
    """Multiplies each matrix by a factor of its shape (outputs r, inputs c), each leaf by `lr_mul`.

    | rule | factor | from |
    | --- | --- | --- |
    | `original` | sqrt(max(1, r/c)) | Keller Jordan's Muon |
    | `match_rms_adamw` | 0.2 sqrt(max(r, c)) | Moonlight: AdamW's learning rates carry over |
    | `spectral` | sqrt(r/c) | arXiv 2310.17813 |
    | `max_dim` | sqrt(max(r, c)) | modded-nanogpt, 2024-10 |
    | `rms` | 0.2 sqrt(r c) / (Frobenius norm of v) | NorMuon's paper |
    | `none` | 1 | |

    Args:
      rule: a name from the table; each block of a split leaf gets its own factor.
      lr_mul: see `normuon`.
      layout: see `normuon`; leaves that are no matrices get `lr_mul` alone.

    Returns:
      A stateless transformation: float32 arithmetic, or the update's dtype where that is wider.

    Raises:
      ValueError: an unknown rule, or see `normuon`.
    """
    check_shape_rule(rule)

    def init(params: optax.Params) -> optax.EmptyState:
        views = resolve_layouts(layout, params)
        resolve_multipliers(lr_mul, params, views, what="lr_mul")
        return optax.EmptyState()

    def update(updates, state, params=None):
        like = updates if params is None else params
        views = resolve_layouts(layout, like)
        factors = resolve_multipliers(lr_mul, like, views, what="lr_mul")

        def scale(path: KeyPath, v: jax.Array | None) -> jax.Array | None:
            if v is None:
                return None
            v = v.astype(working_dtype(v.dtype))
            return v * scale_factor(rule, v, views.get(path), factors.on(path))

        scaled = jax.tree_util.tree_map_with_path(scale, updates, is_leaf=lambda leaf: leaf is None)
        return scaled, state

    return optax.GradientTransformation(init, update)


def scale_factor(
    rule: ShapeRule, v: jax.Array, view: MatrixView | None, lr_factor: Multiplier
) -> jax.Array:
    """What one leaf is multiplied by: a scalar or an array of v's dtype that broadcasts to the leaf.

    Args:
      v: the leaf; the `rms` rule depends on its norms.
      view: None for a leaf that is no matrix.
      lr_factor: the leaf's `lr_mul`. If it is a number or a NumPy array, its product with the shape's
        factor is taken in double precision and rounded once.
    """
    if view is None:
        return jnp.asarray(lr_factor, v.dtype)
    factors = [shape_factor(rule, run.size, view.inputs) for run in view.runs]
    if rule != "rms" and len(set(factors)) == 1:
        return jnp.asarray(lr_factor * factors[0], v.dtype)
    if isinstance(lr_factor, float):
        factors, lr_factor = [factor * lr_factor for factor in factors], 1.0
    if rule == "rms":
        norms = map(jnp.sqrt, sums_of_matrices(jnp.square(v), view))
        factors = [
            factor / jnp.maximum(norm, RMS_FLOOR)
            for factor, norm in zip(factors, norms, strict=True)
        ]
    runs = [jnp.asarray(factor, v.dtype) for factor in factors]
    return jnp.asarray(lr_factor, v.dtype) * over_leaf(runs, view)
