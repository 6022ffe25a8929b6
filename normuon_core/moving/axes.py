"""How the axes of a weight stand in two frameworks, written as names: `out in -> in out`.

A group in parentheses is one stored axis that is several on the other side: `(heads size) in -> in heads
size`. Reductions keep their axes with size 1, so the same pattern moves a weight, its momentum, and a
second moment that has one number for each output.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Side = tuple[tuple[str, ...], ...]
"""The stored axes of one side, each as the names that are merged in it."""


def parse(pattern: str) -> tuple[Side, Side]:
    """Both sides of a pattern.

    Raises:
      ValueError: a pattern that is not two lists of names around `->`, or a name that stands twice on a
        side.
    """
    sides = pattern.split("->")
    if len(sides) != 2:
        raise ValueError(
            f"axes={pattern!r} has no two sides; write the names of the axes in PyTorch, '->', and those"
            " in JAX, as 'out in -> in out'."
        )
    left, right = (_parse_side(side, pattern) for side in sides)
    return left, right


def _parse_side(text: str, pattern: str) -> Side:
    tokens = re.findall(r"\(([^()]*)\)|(\w+)", text)
    if re.sub(r"\([\w\s]*\)|\w+|\s", "", text):
        raise ValueError(
            f"axes={pattern!r}: {text.strip()!r} is no list of names; write names with spaces between"
            " them, and parentheses around those that share a stored axis."
        )
    side = tuple(tuple(group.split()) if group else (name,) for group, name in tokens)
    names = names_of(side)
    if len(set(names)) < len(names):
        raise ValueError(
            f"axes={pattern!r}: a name stands twice on one side; give each axis its own."
        )
    return side


def names_of(side: Side) -> tuple[str, ...]:
    """All names of a side in their order."""
    return tuple(name for group in side for name in group)


def taken_apart(array: np.ndarray, side: Side, sizes: Mapping[str, int], place: str) -> np.ndarray:
    """The array with one axis for each name of `side`.

    Args:
      array: stored as `side` says, or a statistic of such an array: size 1 on axes that are reduced.
      sizes: of names; one in a group may be left out.
      place: what an error calls the array.

    Raises:
      ValueError: another number of axes, or a size that does not divide an axis.
    """
    if array.ndim != len(side):
        raise ValueError(
            f"{place}: shape {array.shape} has {array.ndim} axes, and its rule names {len(side)}:"
            f" {written(side)}. Write a rule for this name with the axes that it has."
        )
    shape: list[int] = []
    for length, group in zip(array.shape, side, strict=True):
        shape += _sizes(length, group, sizes, f"{place}, of shape {array.shape}")
    return array.reshape(shape)


def _sizes(length: int, group: Sequence[str], sizes: Mapping[str, int], place: str) -> list[int]:
    if len(group) == 1:
        return [length]
    if length == 1:
        return [1] * len(group)
    known = math.prod(sizes[name] for name in group if name in sizes)
    unknown = [name for name in group if name not in sizes]
    if len(unknown) > 1 or length % known or (not unknown and length != known):
        raise ValueError(
            f"{place}: an axis of {length} entries is no ({' '.join(group)}) with"
            f" sizes={dict(sizes)}; give the rule the sizes of all these names but one."
        )
    return [sizes.get(name, length // known) for name in group]


def put_together(array: np.ndarray, names: Sequence[str], side: Side) -> np.ndarray:
    """The array, with one axis for each of `names`, as `side` stores it."""
    ordered = array.transpose([names.index(name) for name in names_of(side)])
    lengths = iter(ordered.shape)
    shape = [math.prod(next(lengths) for _ in group) for group in side]
    return np.ascontiguousarray(ordered).reshape(shape)


def written(side: Side) -> str:
    """The side as a pattern has it."""
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in side)
