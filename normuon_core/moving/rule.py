"""One line of the table between two frameworks: a parameter's two names, and its axes in each."""

import re
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Rule:
    """Says under which names, and with which axes, some parameters are kept in PyTorch and in Flax.

        Rule("blocks.{n}.up.weight", "blocks/{n}/up/kernel", "out in -> in out")
        Rule("blocks.{n}.up.weight", "blocks/up/kernel", "out in -> n in out")
        Rule("{block}.query.weight", "{block}/query/kernel", "(heads size) in -> in heads size",
             {"heads": 8})

    The second is for layers that one framework keeps as a stack, as a scan over layers needs: a name in
    braces that one side lacks is an axis there, wherever the pattern has it. It counts from 0.

    Attributes:
      torch: the name in PyTorch, as `model.named_parameters()` has it; a name in braces stands for one
        part of it, without `.` and `/`.
      flax: the name in JAX, as `optax_normuon.describe` prints it.
      axes: see `normuon_core.moving.axes`; None is for an array that has the same axes in both.
      sizes: of names that share a stored axis on one side; one of each group may be left out.
    """

    torch: str
    flax: str
    axes: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        torch, flax = self.ends
        one_sided = set(torch.names) ^ set(flax.names)
        for end in self.ends:
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
        return f"Rule({', '.join(map(repr, [*given, *([self.sizes] if self.sizes else [])]))})"

    @cached_property
    def ends(self) -> tuple[End, End]:
        """(PyTorch's, Flax's)."""
        sides = (None, None) if self.axes is None else parse(self.axes)
        torch, flax = (
            End(template, tuple(re.findall(r"\{(\w+)\}", template)), side)
            for template, side in zip((self.torch, self.flax), sides, strict=True)
        )
        return torch, flax
