"""What the stages of a transformation know of its leaves, told to who only has the transformation."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import optax

from normuon_core.layout import MatrixView
from optax_normuon.leaves.paths import KeyPath


class Found(NamedTuple):
    """What `init` has noted.

    Attributes:
      views: the matrices that the stages have found.
      settings: of each leaf's optimizer, as `normuon_core.moving.settings` writes them.
    """

    views: dict[KeyPath, MatrixView]
    settings: dict[KeyPath, Mapping[str, Any]]


_FOUND: ContextVar[Found | None] = ContextVar("found", default=None)
"""What `init` has noted while `found` runs: a transformation has no other way to tell it."""


def note_views(views: Mapping[KeyPath, MatrixView]) -> None:
    """Tells `found`, if it has called this `init`, where the matrices are."""
    noted = _FOUND.get()
    if noted is not None:
        noted.views.update(views)


def note_settings(settings: Callable[[], Mapping[KeyPath, Mapping[str, Any]]]) -> None:
    """Tells `found`, if it has called this `init`, by which settings the leaves are stepped.

    Args:
      settings: called only if `found` asks.
    """
    noted = _FOUND.get()
    if noted is not None:
        noted.settings.update(settings())


def found(tx: optax.GradientTransformation, params: optax.Params) -> tuple[optax.OptState, Found]:
    """(the abstract state that `tx.init` makes, what its stages have noted)."""
    noted = Found({}, {})
    token = _FOUND.set(noted)
    try:
        # A new function each time: `jax.eval_shape` would remember a known one, and `init` not run.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    finally:
        _FOUND.reset(token)
    return state, noted


def found_views(
    tx: optax.GradientTransformation, params: optax.Params
) -> tuple[optax.OptState, dict[KeyPath, MatrixView]]:
    """(the abstract state that `tx.init` makes, the matrices that its stages have found)."""
    state, noted = found(tx, params)
    return state, noted.views
