"""Where the stages of a transformation find matrices, told to who only has the transformation."""

from collections.abc import Mapping
from contextvars import ContextVar

import jax
import optax

from normuon_core.layout import MatrixView
from optax_normuon.leaves.paths import KeyPath

_FOUND_VIEWS: ContextVar[dict[KeyPath, MatrixView] | None] = ContextVar("views", default=None)
"""What `init` has noted while `found_views` runs: a transformation has no other way to tell it."""


def note_views(views: Mapping[KeyPath, MatrixView]) -> None:
    """Tells `found_views`, if it has called this `init`, where the matrices are."""
    found = _FOUND_VIEWS.get()
    if found is not None:
        found.update(views)


def found_views(
    tx: optax.GradientTransformation, params: optax.Params
) -> tuple[optax.OptState, dict[KeyPath, MatrixView]]:
    """(the abstract state that `tx.init` makes, the matrices that its stages have found)."""
    views: dict[KeyPath, MatrixView] = {}
    token = _FOUND_VIEWS.set(views)
    try:
        # A new function each time: `jax.eval_shape` would remember a known one, and `init` not run.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    finally:
        _FOUND_VIEWS.reset(token)
    return state, views
