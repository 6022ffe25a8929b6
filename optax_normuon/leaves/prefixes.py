"""Values that callers give by a tree like the parameters, by a prefix of one, or by a callable."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import optax

from optax_normuon.leaves.boxes import is_box
from optax_normuon.leaves.paths import KeyPath, named_leaves, path_name


def called_on(given: Any, tree: optax.Params) -> Any:
    """What a callable returns for `tree`; anything else as it is.

    A tree of the parameters' own class is not called, although that class may have `__call__`, as every
    Equinox module does.
    """
    return given(tree) if callable(given) and type(given) is not type(tree) else given


def broadcast_prefix(
    prefix: Any, tree: optax.Params, *, is_leaf: Callable[[object], bool], what: str
) -> Mapping[KeyPath, Any]:
    """The prefix's value for every leaf of `tree`, by key path.

    Trees are matched by their keys, whatever the classes of their containers. Flax's boxes may be there
    or not on either side: an NNX model's optimizer initialises with them and updates without. The prefix
    may be anything where `tree` has no leaves, as where `optax.masked` or `optax.partition` has taken a
    subtree away or the model has `None`.

    Args:
      is_leaf: what counts as one value although JAX sees a tree in it, such as None. The caller checks
        whether a value is a good one.

    Raises:
      ValueError: `prefix` is no prefix of `tree`; it says where and why.
    """
    values: dict[KeyPath, Any] = {}

    def visit(prefix: Any, node: Any, path: KeyPath) -> None:
        leaves, structure = jax.tree_util.tree_flatten_with_path(node)
        if not leaves:
            return
        if is_box(prefix):
            ((_, prefix),) = _children(prefix).values()
        if is_box(node):
            ((entry, node),) = _children(node).values()
            return visit(prefix, node, (*path, entry))
        if is_leaf(prefix) or jax.tree_util.all_leaves([prefix]):
            values.update({(*path, *below): prefix for below, _ in leaves})
            return
        given, own = _children(prefix), _children(node)
        if jax.tree_util.treedef_is_leaf(structure):
            refuse(path, f"there is a leaf, but {what} has {_listed(given, prefix)}")
        for key in own:
            if key not in given:
                refuse(path, f"{what} has {_listed(given, prefix)} and no {key!r}")
        for key in given:
            if key not in own:
                refuse(path, f"{what} has {key!r}, but there is only {_listed(own, node)}")
        for key, (entry, child) in own.items():
            visit(given[key][1], child, (*path, entry))

    def refuse(path: KeyPath, why: str) -> NoReturn:
        names = ", ".join(name for _, name, _ in named_leaves(tree)[:8])
        place = f"at {path_name(path)}" if path else "at the root"
        raise ValueError(
            f"{what} does not match the parameters (leaves: {names}): {place} {why}. Give one value"
            " for all, a tree with the parameters' structure, a prefix of it, or a callable of the"
            " parameters."
        )

    visit(prefix, tree, ())
    return values


def _children(node: Any) -> dict[Any, tuple[Any, Any]]:
    """One level of a tree: by the value of each key, (the key, the child)."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    return {_key_name(path[0]): (path[0], child) for path, child in children if path}


def _key_name(key: Any) -> Any:
    """What stands between the brackets, or behind the dot, of a key; a plain value as it is."""
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


def _listed(children: Mapping[Any, Any], node: Any) -> str:
    if not children:
        return f"{type(node).__name__} {node!r}"[:80]
    return ", ".join(repr(key) for key in list(children)[:8])
