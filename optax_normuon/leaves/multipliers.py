"""`lr_mul` and `wd_mul`: one factor a leaf, or one a matrix."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from normuon_core.layout import MatrixView
from optax_normuon.leaves.layout import Views
from optax_normuon.leaves.paths import KeyPath, named_leaves, path_name, unmet_pattern
from optax_normuon.leaves.prefixes import broadcast_prefix, called_on

Multiplier = float | np.number | np.ndarray | jax.Array
"""The factor of one leaf: a number, or an array that broadcasts to the leaf."""

MultiplierTree = Any
"""None, a number, an array over a leaf's batch axes, a tree or prefix of them, or a callable to one."""


class Multipliers(dict[KeyPath, Multiplier]):
    """Factors by key path, checked against their leaves' batch shapes; a leaf without one has 1."""

    def on(self, path: KeyPath) -> Multiplier:
        """The leaf's factor."""
        return self.get(path, 1.0)


def resolve_multipliers(
    multipliers: MultiplierTree | Multipliers, params: optax.Params, views: Views, *, what: str
) -> Multipliers:
    """Each leaf's factor; an array gets the shape in which it broadcasts to the leaf.

    Raises:
      ValueError: a tree that does not match, or an array without the leaf's batch shape.
    """
    if isinstance(multipliers, Multipliers):
        return multipliers
    leaves = named_leaves(params)
    if multipliers is None or not leaves:
        return Multipliers()
    given = broadcast_prefix(called_on(multipliers, params), params, is_leaf=_is_factor, what=what)
    return Multipliers(
        {
            path: _on_batch_axes(given[path], np.shape(leaf), views.get(path), name, what)
            for path, name, leaf in leaves
            if given[path] is not None
        }
    )


def _is_factor(node: object) -> bool:
    return node is None or isinstance(node, int | float | np.ndarray | np.generic | jax.Array)


def _on_batch_axes(
    factor, shape: tuple[int, ...], view: MatrixView | None, name: str, what: str
) -> Multiplier:
    """A leaf's factor as `Multipliers` holds it."""
    if not _is_factor(factor):
        raise ValueError(f"{name}: {what} must be a number or an array of numbers, got {factor!r}.")
    if np.ndim(factor) == 0:
        return float(factor) if isinstance(factor, int | float) else factor
    if view is None or np.shape(factor) != view.batch_shape:
        batch_shape = () if view is None else view.batch_shape
        raise ValueError(
            f"{name}: {what} has shape {np.shape(factor)}, but the leaf of shape {shape} has"
            f" {f'batch axes of shape {batch_shape}' if batch_shape else 'no batch axes'};"
            " give a number, or one number for each of its matrices."
        )
    ones = [size if axis in view.batch_axes else 1 for axis, size in enumerate(view.shape)]
    factor = factor.reshape(ones)
    if view.folded is None:
        return factor
    first, count = view.folded
    ones[first : first + count] = view.shape[first : first + count]
    broadcast = jnp.broadcast_to if isinstance(factor, jax.Array) else np.broadcast_to
    return broadcast(factor, ones).reshape(view.fold(tuple(ones)))


def multipliers_by_path(
    factors: Mapping[str, ArrayLike], *, default: ArrayLike = 1.0
) -> Callable[[optax.Params], MultiplierTree]:
    """Multipliers for the leaves whose paths fit a pattern: for `lr_mul` and `wd_mul`.

    Args:
      factors: from path patterns (`fnmatch` style, `*` crosses `/`) to a number, or an array over a
        leaf's batch axes. The first pattern that fits counts.
      default: for the leaves that fit none.

    Returns:
      A callable from the parameters to a tree of factors. Under `optax.masked` and `optax.partition` a
      pattern may be about leaves that are masked away.

    Raises:
      ValueError: in `init` and `update`, a pattern that meets no leaf.

    Example: `normuon(0.02, adam_learning_rate=3e-3, lr_mul=multipliers_by_path({"*embed*": 0.1}))`.
    """
    factors = dict(factors)

    def multipliers(params: optax.Params) -> MultiplierTree:
        unmet = unmet_pattern(factors, params)
        if unmet is not None:
            names = ", ".join(name for _, name, _ in named_leaves(params))
            raise ValueError(
                f"multipliers_by_path: the pattern {unmet!r} meets no leaf; the leaves are {names}."
            )

        def factor(path: KeyPath, _) -> ArrayLike:
            name = path_name(path)
            return next(
                (v for pattern, v in factors.items() if fnmatchcase(name, pattern)), default
            )

        return jax.tree_util.tree_map_with_path(factor, params)

    return multipliers
