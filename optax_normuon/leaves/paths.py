"""Leaves by key path, and their names."""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from normuon_core.names import parts_of

KeyPath = tuple[Any, ...]
"""The keys from a tree's root to a leaf, as `jax.tree_util` makes them."""

NamedLeaves = list[tuple[KeyPath, str, Any]]
"""(path, name, leaf) of every leaf of a tree."""


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


def named_leaves(tree: optax.Params) -> NamedLeaves:
    """Every leaf with its path and name, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path, path_name(path), leaf) for path, leaf in leaves]


def unmet_pattern(patterns: Iterable[str], tree: optax.Params) -> str | None:
    """The first `fnmatch` pattern that meets no leaf, or None.

    A pattern may be about leaves that have been taken away, and counts as met then: `optax.masked` and
    `optax.partition` leave an `optax.MaskedNode` in place of a leaf or of a whole subtree, and `None`
    stands for a missing leaf.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_absent)
    present = [path_name(path) for path, node in nodes if not _is_absent(node)]
    absent = [path_name(path) for path, node in nodes if _is_absent(node)]
    for pattern in patterns:
        beginning = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        if any(fnmatch.fnmatchcase(name, pattern) for name in present):
            continue
        if not any(
            fnmatch.fnmatchcase(name, pattern) or _may_start(f"{name}/", beginning)
            for name in absent
        ):
            return pattern
    return None


def _may_start(subtree: str, beginning: str) -> bool:
    """Whether a pattern's literal beginning fits names that start with `subtree`."""
    return beginning.startswith(subtree) or subtree.startswith(beginning)


def _is_absent(node: object) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)
