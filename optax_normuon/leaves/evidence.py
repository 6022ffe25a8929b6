"""What a leaf's neighbours say about it: their shapes, seen from where the leaf stands."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from normuon_core.names import KINDS, Name, Role, without_box
from optax_normuon.leaves.readings import Shape

VECTORS = (Role.VECTOR, Role.NORM)
# A projection may be fused of a few parts: three of attention, four gates, six modulations.
_MOST_FUSED = 8
# Of two axes that could count layers the shorter does where the other is at least so many times longer.
_CLEARLY_LONGER = 2


class Leaf(NamedTuple):
    """One leaf of a model.

    Attributes:
      label: the path as messages show it.
      name: what its parts say (`normuon_core.names`).
      shape: without the trailing axes of size 1 that some libraries give a bias.
    """

    label: str
    name: Name
    shape: Shape

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name.parts

    @property
    def scopes(self) -> Iterator[tuple[str, ...]]:
        """The modules around the leaf, the nearest first, the whole tree last."""
        return (self.parts[:end] for end in range(len(self.parts) - 1, -1, -1))

    @property
    def pattern(self) -> str:
        """The path with its layers' numbers left out."""
        return "/".join(re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "#", p) for p in self.parts)


class Neighbours:
    """All leaves of one tree, and what they say about each other."""

    def __init__(self, leaves: Iterable[tuple[str, tuple[str, ...], Shape]]):
        leaves = list(leaves)
        siblings = Counter(parts[:-1] for _, parts, _ in leaves)
        self.leaves = [
            Leaf(label, Name(without_box(parts, siblings[parts[:-1]])), shape)
            for label, parts, shape in leaves
        ]
        self._by_path = {leaf.parts: leaf for leaf in self.leaves}
        self._within: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in self.leaves:
            for scope in leaf.scopes:
                self._within.setdefault(scope, []).append(leaf)
        self._norms = {
            scope: [leaf for leaf in within if leaf.name.role is Role.NORM and leaf.shape]
            for scope, within in self._within.items()
        }
        self._repeated = Counter((leaf.pattern, leaf.shape) for leaf in self.leaves)
        self._common: dict[tuple[str, ...], list[tuple[int, ...]]] = {}

    @cached_property
    def root(self) -> tuple[str, ...]:
        """The modules that all leaves have in common: `params`, `model`."""
        first, *rest = (leaf.parts[:-1] for leaf in self.leaves)
        length = len(first)
        for parts in rest:
            agree = (a == b for a, b in zip(first[:length], parts, strict=False))
            length = next((i for i, same in enumerate(agree) if not same), min(length, len(parts)))
        return first[:length]

    def within(self, scope: tuple[str, ...]) -> list[Leaf]:
        """The leaves of a module and of those in it."""
        return self._within.get(scope, [])

    def adapter_ranks(self, leaf: Leaf) -> set[int]:
        """The inner sizes that a factor of a low-rank adapter may share with the other factor."""
        *module, last = leaf.parts
        for a, b in (("a", "b"), ("A", "B")):
            for own, other in ((a, b), (b, a)):
                for suffix in (own, f"lora_{own}", f"_{own}"):
                    if not last.endswith(suffix):
                        continue
                    twin = self._by_path.get((*module, last[: -len(own)] + other))
                    if twin is not None:
                        first, second = (leaf, twin) if own == a else (twin, leaf)
                        return {first.shape[-1]} & set(second.shape)
        return set()

    # The layer's own bias

    def bias(self, leaf: Leaf) -> Shape | None:
        """The shape of the bias beside a leaf."""
        *module, last = leaf.parts
        names = ["bias", "b"] if leaf.name.kind in KINDS else []
        names += [re.sub("|".join(KINDS[:3]), "bias", last)]
        for name in names:
            found = self._by_path.get((*module, name))
            if found is not None and found is not leaf:
                return _without_ones_behind(found.shape)
        return None

    def beside(self, leaf: Leaf, names: Sequence[str]) -> Leaf | None:
        """A leaf like `leaf` in a layer beside its own: the first of `names` under the same parent."""
        place = leaf.name.owner_place
        for name in names:
            found = self._by_path.get((*leaf.parts[:place], name, *leaf.parts[place + 1 :]))
            if found is not None:
                return found
        return None

    # Which axes count layers

    def layer_axes(self, leaf: Leaf) -> tuple[tuple[int, ...], ...]:
        """The axes of a leaf that may count layers: one choice where the neighbours settle it.

        A normalization has one axis of its own, so one that has two is stacked; the layers' axis is the
        one that has the same size in everything that is stacked with it.
        """
        for scope in leaf.scopes:
            vectors = self._norms[scope]
            if not vectors:
                continue
            # Haiku's have ones for the axes that they are broadcast over.
            ranks = {max(sum(size > 1 for size in other.shape), 1) for other in vectors}
            if ranks == {1}:
                outside = scope == self.root and len(leaf.parts) - len(scope) > 3
                return self._unknown(leaf) if outside else ((),)
            if 1 in ranks or len(ranks) > 1:
                return self._unknown(leaf)
            (rank,) = ranks
            return self._counting(leaf, scope, vectors, rank - 1)
        return self._unknown(leaf)

    def _counting(self, leaf: Leaf, scope, vectors: list[Leaf], depth: int):
        choices = [tuple(range(depth)), tuple(range(1, depth + 1))]

        def common(choice, leaves):
            return len({tuple(other.shape[axis] for axis in choice) for other in leaves}) == 1

        if scope not in self._common:
            members = [other for other in self._within[scope] if len(other.shape) > depth]
            self._common[scope] = [choice for choice in choices if common(choice, members)]
        fitting = self._common[scope]
        if not fitting:
            fitting = [choice for choice in choices if common(choice, [*vectors, leaf])]
        if len(fitting) == 2 and depth == 1:
            front, middle = (vectors[0].shape[axis] for axis in (0, 1))
            if front * _CLEARLY_LONGER <= middle:
                fitting = fitting[:1]
            elif middle * _CLEARLY_LONGER <= front:
                fitting = fitting[1:]
        return tuple(fitting) or self._unknown(leaf)

    def _unknown(self, leaf: Leaf) -> tuple[tuple[int, ...], ...]:
        """The choices where no normalization settles them: linear layers that are stacked together have
        one axis of the same size. Without such layers every axis may count."""
        choices = ((), (0,), (1,))
        if len(leaf.shape) < 3:
            return choices
        for scope in leaf.scopes:
            stacked = [
                other.shape
                for other in self._within[scope]
                if len(other.shape) == len(leaf.shape) and other.name.is_linear
            ]
            sizes = [{shape[axis] for shape in stacked} for axis in (0, 1)]
            if len(set(stacked)) < 2 or leaf.shape not in stacked:
                continue
            agreed = [(axis,) for axis in (0, 1) if len(sizes[axis]) == 1]
            if len(agreed) == 1 and len(leaf.shape) == 3:
                return tuple(agreed)
        return choices

    # How wide the layers are

    def widths(self, leaf: Leaf) -> set[int]:
        """The sizes of the normalizations nearest to a leaf, else of the embeddings."""
        for scope in leaf.scopes:
            norms = [norm for norm in self._norms[scope] if not _is_head_norm(norm)]
            if norms:
                found = set()
                for norm in norms:
                    choices = self.layer_axes(norm)
                    if len(choices) == 1:
                        own = without(norm.shape, choices[0])
                        found |= set(own[-1:])
                return found
        return {leaf.shape[-1] for leaf in self.tables}

    @cached_property
    def tables(self) -> list[Leaf]:
        """Embeddings of a vocabulary, not of positions."""
        return [
            leaf
            for leaf in self.leaves
            if leaf.name.role is Role.EMBEDDING
            and len(leaf.shape) == 2
            and not re.search(r"pos|wpe|type|segment|time|patch", "/".join(leaf.parts[-2:]), re.I)
        ]

    # Which way matrices are stored

    def stored_out_in(self, leaf: Leaf) -> bool:
        """Whether matrices of a leaf's kind are stored (out, in).

        A bias has as many entries as its layer has outputs, and shows which axis they are; where no
        layer of the kind has one, the name of the kind decides.
        """
        return self._conventions.get(leaf.name.kind, leaf.name.stored_out_in)

    @cached_property
    def _conventions(self) -> dict[str, bool]:
        votes: dict[str, set[bool]] = {}
        for leaf in self.leaves:
            bias, shape = self.bias(leaf), leaf.shape
            if leaf.name.kind not in KINDS or bias is None or len(bias) != 1 or len(shape) != 2:
                continue
            if leaf.name.role in (Role.EMBEDDING, *VECTORS) or shape[0] == shape[1]:
                continue
            if bias[0] in shape:
                votes.setdefault(leaf.name.kind, set()).add(bias[0] == shape[0])
        return {kind: next(iter(found)) for kind, found in votes.items() if len(found) == 1}

    # What becomes of a layer's outputs

    def is_repeated(self, leaf: Leaf) -> bool:
        """Whether a layer of the same name and shape stands in other blocks too."""
        return self._repeated[leaf.pattern, leaf.shape] > 1

    def is_outermost(self, leaf: Leaf) -> bool:
        """Whether a leaf's layer stands in the model itself and in no block of it. A model that is a
        list of layers counts too."""
        place = leaf.name.owner_place
        return place <= len(self.root) and not (leaf.name.is_listed and self.is_repeated(leaf))

    def is_last(self, leaf: Leaf) -> bool:
        """Whether no layer with the same name and a higher number stands beside it."""
        place = max(leaf.name.owner_place, 0) + (1 if leaf.name.is_listed else 0)
        if place >= len(leaf.parts):
            return True
        stem, number = _numbered(leaf.parts[place])
        for other in self._within[leaf.parts[:place]]:
            other_stem, other_number = _numbered(other.parts[place])
            if other_stem == stem and other_number > number and len(other.shape) >= 2:
                return False
        return True

    def follows(self, leaf: Leaf, inputs: int) -> bool:
        """Whether the layer with the number before a leaf's own makes its inputs."""
        place = max(leaf.name.owner_place, 0) + (1 if leaf.name.is_listed else 0)
        if place >= len(leaf.parts):
            return False
        stem, number = _numbered(leaf.parts[place])
        before = [
            other
            for other in self._within[leaf.parts[:place]]
            if _numbered(other.parts[place])[0] == stem
            and _numbered(other.parts[place])[1] < number
            and len(other.shape) >= 2
        ]
        return any(inputs in other.shape for other in before)

    def taken(self, leaf: Leaf, size: int) -> str:
        """Whether other layers take `size` numbers: "whole", "in parts", or "" for no."""
        wholes, flattened = set(), set()
        for other in self.leaves:
            if other is leaf or not other.shape or self._is_twin(leaf, other):
                continue
            role = other.name.role
            if len(other.shape) == 1:
                wholes |= set(other.shape) if role is Role.NORM else set()
            elif role is Role.EMBEDDING:
                wholes.add(other.shape[-1])
            elif len(other.shape) == 2 and role not in VECTORS:
                wholes.add(other.shape[1 if self.stored_out_in(other) else 0])
            elif role in (Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION):
                flattened.add(other.shape[1 if self.stored_out_in(other) else -2])
            elif role not in VECTORS:
                flattened |= set(other.shape[:-1]) | {
                    math.prod(other.shape[start : start + 2]) for start in range(len(other.shape))
                }
        if size in wholes | flattened:
            return "whole"
        fused = range(2, _MOST_FUSED + 1)
        return "in parts" if any(size == times * own for own in wholes for times in fused) else ""

    def _is_twin(self, leaf: Leaf, other: Leaf) -> bool:
        """Whether `other` is the same layer of another block, or may be the embedding to a head: both of
        unknown names, one's shape the other's reversed."""
        if other.pattern == leaf.pattern and other.shape == leaf.shape:
            return True
        unknown = {leaf.name.role, other.name.role} <= {Role.UNKNOWN}
        return unknown and other.shape == leaf.shape[::-1] and self.is_outermost(other)

    def makes(self, leaf: Leaf, size: int) -> bool:
        """Whether another layer, or an embedding, hands out `size` numbers."""
        return any(
            size in other.shape
            for other in self.leaves
            if other is not leaf and len(other.shape) >= 2 and not self._is_twin(leaf, other)
        )

    @cached_property
    def matrices(self) -> int:
        """How many leaves could be matrices."""
        others = (Role.EMBEDDING, *VECTORS)
        return sum(len(leaf.shape) >= 2 and leaf.name.role not in others for leaf in self.leaves)


def without(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """The shape of one layer."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _without_ones_behind(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _is_head_norm(leaf: Leaf) -> bool:
    named = {word for part in leaf.parts[-2:] for word in re.findall(r"[a-z]+", part.lower())}
    return bool(named & {"q", "k", "v", "query", "key", "value", "qk"})


def _numbered(part: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)_?(\d+)", part)
    return (match[1], int(match[2])) if match else (part, -1)
