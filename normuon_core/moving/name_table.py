"""The table of names between PyTorch and Flax, and a run's arrays moved by it."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from normuon_core.moving.axes import names_of, put_together, taken_apart
from normuon_core.moving.format import (
    Arrays,
    Kept,
    by_parameter,
    read_metadata,
    whole_array,
    written_metadata,
)
from normuon_core.moving.fused import Parameter, cut_parameter, joined_parameter
from normuon_core.moving.rule import Cut, End, Line, Rule

Parameters = dict[str, Parameter]


class _Source(NamedTuple):
    """A parameter that a rule fits: what stands for the names in braces, and what it is called."""

    values: dict[str, str]
    name: str


class NameTable:
    """Moves arrays of the common format from one framework's names and axes to the other's.

    A parameter, its momentum, its moments and its counters move by the same line. The first rule that
    fits a name counts. `derive_table` makes the table of two models that name their modules alike.

        table = NameTable([Rule("up.weight", "up/kernel", "out in -> in out")])
        arrays = table.to_flax(arrays)

    Attributes:
      rules: see `Rule`.
    """

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)

    def __repr__(self) -> str:
        return "NameTable([\n" + "".join(f"    {rule},\n" for rule in self.rules) + "])"

    def to_flax(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Arrays under PyTorch's names as Flax has them.

        Args:
          arrays: in the common format; `numpy.load`'s archive is one.

        Raises:
          ValueError: a name that no rule fits, an array that its rule does not fit, or layers that do
            not make a stack.
        """
        return self._moved(arrays, 0)

    def to_torch(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The inverse of `to_flax`."""
        return self._moved(arrays, 1)

    def _moved(self, arrays: Mapping[str, np.ndarray], start: int) -> Arrays:
        kept = read_metadata(arrays) if "metadata" in arrays else {}
        own = {name: Parameter(x, kept.get(name)) for name, x in by_parameter(arrays).items()}
        own = self._joined(self._renamed(self._cut(own, start), start), 1 - start)
        result = {key: np.asarray(arrays[key]) for key in arrays if "/" not in key}
        for name, each in own.items():
            result |= {f"{kind}/{name}": array for kind, array in each.arrays.items()}
        if "metadata" in result:
            result["metadata"] = written_metadata(
                {name: each.kept for name, each in own.items() if each.kept is not None}
            )
        return result

    def _cut(self, own: Parameters, place: int) -> Parameters:
        """With the parts of what is fused here in its place, by `Cut.suffixes`."""
        result: Parameters = {}
        for name, each in own.items():
            rule = next((rule for rule in self.rules if rule.fits(name, place)), None)
            cut = None if rule is None else rule.cutting
            if cut is None or cut.place != place:
                result[name] = each
                continue
            parts = cut_parameter(name, each, cut)
            result |= {name + end: part for end, part in zip(cut.suffixes, parts, strict=True)}
        return result

    def _joined(self, own: Parameters, place: int) -> Parameters:
        """The inverse of `_cut`."""
        result = dict(own)
        for rule in self.rules:
            cut = rule.cutting
            if cut is None or cut.place != place:
                continue
            for name in _fused_names(own, cut):
                parts = _parts(name, result, cut)
                if name in result:
                    raise _twice(name, rule)
                result[name] = joined_parameter(name, parts, cut)
        return result

    def _renamed(self, own: Parameters, start: int) -> Parameters:
        result: Parameters = {}
        for rule, line, target, sources in self._targets(own, start):
            end, other = line.ends[start], line.ends[1 - start]
            ordered, stack = _in_order(sources, _only(end, other), target)
            members = {name: own[name].arrays for name in ordered}
            first = own[ordered[0]]
            names = _spread_names(line, first.arrays, end, other, target)
            moved: dict[str, Arrays] = {name: {} for name in names}
            for kind in first.arrays:
                arrays = [_of_kind(members, kind, name, target) for name in ordered]
                pieces = _move(arrays, stack, line, end, other, f"{kind}/{target}", len(names))
                for name, array in zip(names, pieces, strict=True):
                    moved[name][kind] = array
            kept = [each for each in (own[name].kept for name in ordered) if each is not None]
            for name, arrays in moved.items():
                if name in result:
                    raise _twice(name, rule)
                result[name] = Parameter(
                    arrays, _joined(kept, len(names), target) if kept else None
                )
        return result

    def _targets(
        self, names: Iterable[str], start: int
    ) -> Iterable[tuple[Rule, Line, str, list[_Source]]]:
        """(rule, line of it, the other side's template filled in, the parameters that make it)."""
        lines = [(rule, line) for rule in self.rules for line in rule.lines]
        found: dict[tuple[int, str], list[_Source]] = {}
        for name in names:
            for place, (_, line) in enumerate(lines):
                values = line.ends[start].match(name)
                if values is not None:
                    filled = _filled(line.ends[1 - start], values)
                    found.setdefault((place, filled), []).append(_Source(values, name))
                    break
            else:
                there = ("torch", "flax")[start]
                raise ValueError(
                    f"no rule fits the name {name!r}; add one to the table, as"
                    f" Rule({there}={name!r}, ...). The table is {self}"
                )
        return [(*lines[place], filled, sources) for (place, filled), sources in found.items()]


def _fused_names(names: Iterable[str], cut: Cut) -> list[str]:
    """The fused parameters that have parts among these names."""
    found = {
        name.removesuffix(end): None for name in names for end in cut.suffixes if name.endswith(end)
    }
    return [name for name in found if cut.fused.match(name) is not None]


def _parts(name: str, own: Parameters, cut: Cut) -> Parameters:
    """Takes the parts of a fused parameter out, by their names on the other side.

    Raises:
      ValueError: some are lacking.
    """
    values = cut.fused.match(name) or {}
    ends = dict(zip((_filled(part, values) for part in cut.parts), cut.suffixes, strict=True))
    if lacking := [part for part, end in ends.items() if name + end not in own]:
        raise ValueError(
            f"{name}: of its parts {', '.join(ends)} the file lacks {', '.join(lacking)}; hand over"
            " all of them."
        )
    return {part: own.pop(name + end) for part, end in ends.items()}


def _twice(name: str, rule: Rule) -> ValueError:
    return ValueError(f"two rules make {name}, {rule} is the second; give each parameter one name.")


def _only(end: End, other: End) -> list[str]:
    """The names in braces that the other side has as axes."""
    return [name for name in end.names if name not in other.names]


def _filled(end: End, values: Mapping[str, str]) -> str:
    """The template with the values put in; names without one stay in their braces."""
    result = end.template
    for name, value in values.items():
        result = result.replace(f"{{{name}}}", value)
    return result


def _in_order(
    sources: list[_Source], stacked: list[str], target: str
) -> tuple[list[str], tuple[int, ...]]:
    """(the names of a stack's members in the order of their numbers, how many there are of each).

    Raises:
      ValueError: members that do not count from 0 without a gap.
    """
    if not stacked:
        if len(sources) > 1:
            raise ValueError(
                f"{' and '.join(each.name for each in sources)} would both become {target}; give each a"
                " rule of its own."
            )
        return [sources[0].name], ()
    by_number = {}
    for each in sources:
        numbers = tuple(each.values[name] for name in stacked)
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"{each.name}: {numbers[0]!r} is no number, and a stack's members are counted from 0."
            )
        by_number[tuple(map(int, numbers))] = each.name
    sizes = tuple(1 + max(numbers[place] for numbers in by_number) for place in range(len(stacked)))
    wanted = list(itertools.product(*map(range, sizes)))
    if missing := [numbers for numbers in wanted if numbers not in by_number]:
        raise ValueError(
            f"{target}: the stack over {', '.join(stacked)} lacks number {missing[0][0]}; the file has"
            f" {', '.join(by_number.values())}. Hand over all of them."
        )
    return [by_number[numbers] for numbers in wanted], sizes


def _of_kind(own: Mapping[str, Arrays], kind: str, name: str, target: str) -> np.ndarray:
    if kind not in own[name]:
        raise ValueError(
            f"{target}: {name} has no {kind}, and others of its stack do; the members of a stack need"
            " one optimizer."
        )
    return own[name][kind]


def _spread_names(line: Line, arrays: Arrays, end: End, other: End, target: str) -> list[str]:
    """The names that one array goes to: several where the other side has a stack's members apart."""
    spread = _only(other, end)
    if not spread:
        return [target]
    assert end.side is not None
    lengths = dict(
        zip(
            names_of(end.side),
            taken_apart(whole_array(arrays), end.side, line.sizes, target).shape,
            strict=True,
        )
    )
    numbers = itertools.product(*(range(lengths[name]) for name in spread))
    template = other._replace(template=target)
    return [_filled(template, dict(zip(spread, map(str, each), strict=True))) for each in numbers]


def _move(
    members: list[np.ndarray],
    stack: tuple[int, ...],
    line: Line,
    end: End,
    other: End,
    place: str,
    targets: int,
) -> list[np.ndarray]:
    """One array a target, of one array a member; `stack` has the sizes that the members make."""
    if place.startswith("step/"):
        if len({int(step) for step in members}) > 1:
            raise ValueError(
                f"{place}: the members of the stack have done {', '.join(map(str, members))} steps, and"
                " a stack counts once; a parameter without gradients has done fewer."
            )
        return [members[0]] * targets
    if end.side is None or other.side is None:
        return members
    stacked, spread = _only(end, other), _only(other, end)
    apart = np.stack([taken_apart(each, end.side, line.sizes, place) for each in members])
    # The members are in the order of their numbers, the last of which counts fastest.
    apart = apart.reshape(stack + apart.shape[1:])
    names = [*stacked, *names_of(end.side)]
    rest = [name for name in names if name not in spread]
    ordered = apart.transpose([names.index(name) for name in [*spread, *rest]])
    ordered = ordered.reshape(targets, *ordered.shape[len(spread) :])
    return [put_together(each, rest, other.side) for each in ordered]


def _joined(kept: list[Kept], targets: int, target: str) -> Kept:
    """What is said of each target of these members."""
    first = kept[0]
    if any(each != first for each in kept):
        raise ValueError(
            f"{target}: the members of the stack were stepped by different settings; give them one"
            " optimizer, or keep them apart."
        )
    matrices = tuple(
        (count * len(kept) // targets, outputs, inputs) for count, outputs, inputs in first.matrices
    )
    return Kept(first.settings, tuple(sorted(matrices)))
