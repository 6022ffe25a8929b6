"""The recorded models as abstract parameter trees, with the very key paths of their frameworks."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .roles import Role

KEYS = {
    "dict": jax.tree_util.DictKey,
    "attribute": jax.tree_util.GetAttrKey,
    "index": jax.tree_util.SequenceKey,
    "flat": jax.tree_util.FlattenedIndexKey,
}


@jax.tree_util.register_pytree_with_keys_class
class Node:
    """A container that flattens under the recorded keys, whichever kind they are."""

    def __init__(self, children: dict[Any, Any]):
        self.children = children

    def tree_flatten_with_keys(self):
        return tuple(self.children.items()), tuple(self.children)

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(dict(zip(keys, children, strict=True)))


class Fixture(NamedTuple):
    """A recorded model: `params` are abstract; `roles` belong to its leaves, in their order."""

    name: str
    convention: str
    params: Any
    roles: list[Role]


def read(path: Path) -> Fixture:
    recorded = json.loads(path.read_text())
    root = Node({})
    for leaf in recorded["leaves"]:
        *outer, last = (KEYS[kind](_hashable(value)) for kind, value in leaf["path"])
        node = root
        for key in outer:
            node = node.children.setdefault(key, Node({}))
        node.children[last] = jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
    return Fixture(
        path.stem,
        recorded["convention"],
        root,
        [_role(leaf["role"]) for leaf in recorded["leaves"]],
    )


def _hashable(value):
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _role(said: dict) -> Role:
    axes = (tuple(said.get(side, ())) for side in ("reduction_axis", "output_axis"))
    return Role(said.get("adamw"), *axes, said.get("doubt"))


def read_all() -> list[Fixture]:
    paths = sorted(Path(__file__).parent.glob("*.json"))
    return [read(path) for path in paths]
