"""One line of the table between two frameworks: a parameter's two names, and its axes in each."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from normuon_core.moving.axes import Side, names_of, parse


class End(NamedTuple):
    """One framework's half of a rule.

    Attributes:
      template: of names. names: in braces in it.
      side: the stored axes; None leaves arrays as they are.
    """

    template: str
    names: tuple[str, ...]
    side: Side | None

    def match(self, name: str) -> dict[str, str] | None:
        """What stands for the template's names in `name`; None where it does not fit."""
        pieces = re.split(r"\{(\w+)\}", self.template)
        pattern = "".join(
            f"(?P<{piece}>[^./]+)" if place % 2 else re.escape(piece)
            for place, piece in enumerate(pieces)
        )
        found = re.fullmatch(pattern, name)
        return None if found is None else found.groupdict()


class Line(NamedTuple):
    """One name to one, and its axes: all of a rule, or what it says of one part of a fused parameter.

    Attributes:
      ends: (PyTorch's, Flax's). sizes: see `Rule`.
    """

    ends: tuple[End, End]
    sizes: Mapping[str, int]


class Cut(NamedTuple):
    """How a fused parameter is cut.

    Attributes:
      place: 0 where it is PyTorch's that is fused, 1 where it is Flax's.
      fused: its end. parts: the ends of its parts, on the other side.
      axis: the one that is cut. sizes: of the parts along it. others: of other names, see `Rule`.
    """

    place: int
    fused: End
    parts: tuple[End, ...]
    axis: str
    sizes: tuple[int, ...]
    others: Mapping[str, int]

    @property
    def side(self) -> Side:
        """The stored axes of the fused parameter."""
        assert self.fused.side is not None
        return self.fused.side

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What stands behind the fused parameter's name where a part is meant: `[out 64:96]`."""
        stops = (0, *itertools.accumulate(self.sizes))
        return tuple(f"[{self.axis} {start}:{stop}]" for start, stop in itertools.pairwise(stops))

    @property
    def lines(self) -> Iterator[Line]:
        """One for each part, by the suffixes on the fused side."""
        for part, size, suffix in zip(self.parts, self.sizes, self.suffixes, strict=True):
            whole = self.fused._replace(template=self.fused.template + suffix)
            yield Line(
                (part, whole) if self.place else (whole, part), {**self.others, self.axis: size}
            )


@dataclass(frozen=True)
class Rule:
    """Says under which names, and with which axes, some parameters are kept in PyTorch and in Flax.

        Rule("blocks.{n}.up.weight", "blocks/{n}/up/kernel", "out in -> in out")
        Rule("blocks.{n}.up.weight", "blocks/up/kernel", "out in -> n in out")
        Rule("{block}.query.weight", "{block}/query/kernel", "(heads size) in -> in heads size",
             {"heads": 8})
        Rule("{block}.qkv.weight", ("{block}/q/kernel", "{block}/k/kernel", "{block}/v/kernel"),
             "out in -> in out", cut={"out": (64, 32, 32)})

    The second is for layers that one framework keeps as a stack, as a scan over layers needs: a name in
    braces that one side lacks is an axis there, wherever the pattern has it. It counts from 0.

    The last one is for a fused projection whose parts the other framework keeps by themselves, whichever
    of the two that is. The state of matrices can be cut and joined only where they are the parts' own:
    its layout needs `output_splits`. AdamW's state always can.

    Attributes:
      torch: the name in PyTorch, as `model.named_parameters()` has it; a name in braces stands for one
        part of it, without `.` and `/`. A tuple of names has the parts of what is fused in JAX.
      flax: the name in JAX, as `optax_normuon.describe` prints it; or a tuple, likewise.
      axes: see `normuon_core.moving.axes`; None is for an array that has the same axes in both. The
        pattern of a fused parameter is that of each part too.
      sizes: of names that share a stored axis on one side; one of each group may be left out.
      cut: of the one axis that is cut, the size in each part.
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    axes: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    cut: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        self._check_cut()
        for line in self.lines:
            self._check_line(*line.ends)

    def _check_cut(self) -> None:
        parts = [names for names in (self.torch, self.flax) if not isinstance(names, str)]
        if not parts and not self.cut:
            return
        if len(parts) != 1 or len(self.cut) != 1:
            raise ValueError(
                f"{self}: what is cut has one name on one side, a tuple of its parts' names on the"
                " other, and the parts' sizes along one axis, as cut={'out': (64, 32, 32)}."
            )
        ((axis, sizes),) = self.cut.items()
        if len(set(parts[0])) != len(sizes) or len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"{self}: there are {len(set(parts[0]))} parts, and {axis} is cut into {tuple(sizes)};"
                " give each of two or more parts a name of its own and a positive size."
            )
        sides = ((), ()) if self.axes is None else parse(self.axes)
        if any(axis not in names_of(side) for side in sides):
            raise ValueError(
                f"{self}: {axis} is cut, and is no axis of both sides; write axes that have it, as"
                f" '{axis} in -> in {axis}', or '{axis} -> {axis}' for a bias."
            )

    def _check_line(self, torch: End, flax: End) -> None:
        one_sided = set(torch.names) ^ set(flax.names)
        for end in (torch, flax):
            if len(set(end.names)) < len(end.names):
                raise ValueError(f"{self}: a name stands twice in {end.template!r}.")
        if torch.side is None or flax.side is None:
            if one_sided:
                raise ValueError(
                    f"{self}: {{{min(one_sided)}}} is in one of the names alone, so it is an axis of the"
                    " other array; write axes that have it there, as 'out in -> n in out'."
                )
            return
        left = {*names_of(torch.side), *set(torch.names) - set(flax.names)}
        right = {*names_of(flax.side), *set(flax.names) - set(torch.names)}
        if left != right:
            raise ValueError(
                f"{self}: {', '.join(sorted(left ^ right))} is on one side alone; every axis stands on"
                " both sides of '->', or it is a name in braces on the side where it is no axis."
            )

    def __repr__(self) -> str:
        given = [self.torch, self.flax, *([self.axes] if self.axes or self.sizes else [])]
        written = [*map(repr, given), *([repr(self.sizes)] if self.sizes else [])]
        return f"Rule({', '.join(written + ([f'cut={self.cut}'] if self.cut else []))})"

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """One, or where something is cut one for each part."""
        if self.cutting is not None:
            return tuple(self.cutting.lines)
        (torch,), (flax,) = self._ends
        return (Line((torch, flax), self.sizes),)

    def fits(self, name: str, place: int) -> bool:
        """Whether it is of a name in PyTorch (`place` 0) or in Flax (1)."""
        own = [line.ends[place] for line in self.lines]
        if self.cutting is not None and self.cutting.place == place:
            own = [self.cutting.fused]
        return any(end.match(name) is not None for end in own)

    @cached_property
    def cutting(self) -> Cut | None:
        """None where nothing is cut."""
        if not self.cut:
            return None
        ((axis, sizes),) = self.cut.items()
        place = 0 if isinstance(self.torch, str) else 1
        (fused,), parts = self._ends[place], self._ends[1 - place]
        return Cut(place, fused, parts, axis, tuple(sizes), self.sizes)

    @cached_property
    def _ends(self) -> tuple[tuple[End, ...], tuple[End, ...]]:
        """(PyTorch's, Flax's)."""
        sides = (None, None) if self.axes is None else parse(self.axes)
        torch, flax = (
            tuple(
                End(each, tuple(re.findall(r"\{(\w+)\}", each)), side)
                for each in ([names] if isinstance(names, str) else names)
            )
            for names, side in zip((self.torch, self.flax), sides, strict=True)
        )
        return torch, flax
