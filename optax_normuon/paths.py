"""Leaves by key path: their names, and values that callers give by tree or by prefix."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from normuon_core.names import parts_of

KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """`blocks/0/attention/query/kernel`; the `value` that Flax NNX appends is left out."""
    if len(path) > 1 and path[-1] in _NNX_VALUE:
        path = path[:-1]
    return "/".join(_key_names(path))


def path_parts(path: KeyPath) -> tuple[str, ...]:
    """The names along a path, with keys that hold many, as `layers.0.weight`, taken apart."""
    if len(path) > 1 and path[-1] in _NNX_VALUE:
        path = path[:-1]
    return parts_of(_key_names(path))


def _key_names(path: KeyPath) -> Iterator[str]:
    """What the keys are called; a tuple that is a key counts as the path that it is."""
    for key in path:
        own = key.key if isinstance(key, jax.tree_util.DictKey) else None
        if isinstance(own, tuple):
            yield from map(str, own)
        else:
            yield jax.tree_util.keystr((key,), simple=True)


_NNX_VALUE = (jax.tree_util.GetAttrKey("value"), jax.tree_util.GetAttrKey("raw_value"))


def named_leaves(tree) -> list[tuple[KeyPath, str, Any]]:
    """(path, name, leaf) of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path, path_name(path), leaf) for path, leaf in leaves]


def broadcast_prefix(
    prefix, tree, *, is_leaf: Callable[[Any], bool], what: str
) -> Mapping[KeyPath, Any]:
    """The prefix's value for every leaf of `tree`, by key path.

    Raises:
      ValueError: `prefix` is no prefix of `tree`.
    """
    try:
        values = jax.tree.broadcast(prefix, tree, is_leaf=is_leaf)
    except (ValueError, TypeError) as error:
        names = ", ".join(name for _, name, _ in named_leaves(tree)[:8])
        raise ValueError(
            f"{what} does not match the parameters (leaves: {names}): {error}. Give one value for"
            " all, a tree with the parameters' structure, a prefix of it, or a callable of the"
            " parameters."
        ) from None
    return dict(jax.tree_util.tree_flatten_with_path(values, is_leaf=is_leaf)[0])
