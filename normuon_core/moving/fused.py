"""A fused parameter cut into its parts and joined of them, all of them stored as the fused one is.

With `output_splits` each block of a fused weight is stepped as a parameter of its own, so that its state
is the state of the parts side by side. Second moments of which some belong to the outputs and others to
the inputs do not fit side by side, and are `second_moment.0`, `second_moment.1`, ...
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from normuon_core.moving.axes import names_of, taken_apart
from normuon_core.moving.cut_axis import CutAxis
from normuon_core.moving.format import (
    MATRIX,
    Arrays,
    Kept,
    Matrices,
    sum_of_matrices,
    whole_array,
    written_matrices,
)
from normuon_core.moving.rule import Cut


class Parameter(NamedTuple):
    """What a file has of one parameter.

    Attributes:
      kept: None in a file of parameters alone.
    """

    arrays: Arrays
    kept: Kept | None


def cut_parameter(name: str, whole: Parameter, cut: Cut) -> list[Parameter]:
    """The parts of a fused parameter.

    Raises:
      ValueError: parts that do not add up to it, or matrices or a statistic that are not the parts'.
    """
    lengths = _lengths(name, whole.arrays, cut, sum(cut.sizes))
    kept: list[Kept | None] = [None] * len(cut.sizes)
    if whole.kept is not None:
        _check_known(name, whole.kept)
        matrices = _cut_matrices(whole.kept.matrices, cut.sizes, _members(lengths, cut))
        if matrices is None:
            raise ValueError(
                f"{name}: the file's run took it for {written_matrices(whole.kept.matrices)}, and its"
                f" parts are other matrices; {_needs_splits(cut)}"
            )
        kept = [Kept(whole.kept.settings, own) for own in matrices]
    axis = CutAxis.of(cut, lengths)
    parts: list[Arrays] = [{} for _ in cut.sizes]
    for kind, array in whole.arrays.items():
        first, dot, block = kind.partition(".")
        if dot and int(block) < len(parts):
            parts[int(block)][first] = array
            continue
        pieces = [array] * len(parts) if kind == "step" else axis.cut(array)
        if pieces is None:
            raise ValueError(
                f"{kind}/{name}: of shape {array.shape} it is of no parts of {cut.sizes};"
                f" {_needs_splits(cut)}"
            )
        for part, piece in zip(parts, pieces, strict=True):
            part[kind] = piece
    return [Parameter(*own) for own in zip(parts, kept, strict=True)]


def joined_parameter(name: str, parts: Mapping[str, Parameter], cut: Cut) -> Parameter:
    """The fused parameter of its parts.

    Args:
      parts: by their own names, stored as the fused one is.

    Raises:
      ValueError: parts of other sizes than the rule's, that were not stepped alike, or that do not fit
        side by side.
    """
    lengths = [
        _lengths(part, own.arrays, cut, size)
        for (part, own), size in zip(parts.items(), cut.sizes, strict=True)
    ]
    others = [{**each, cut.axis: 0} for each in lengths]
    if any(each != others[0] for each in others):
        unlike = ", ".join(f"{part} has {own}" for part, own in zip(parts, lengths, strict=True))
        raise ValueError(
            f"{name}: its parts do not fit side by side along {cut.axis}: {unlike}; only {cut.axis} may"
            " differ."
        )
    axis, arrays = CutAxis.of(cut, lengths[0]), {}
    for kind in dict.fromkeys(kind for own in parts.values() for kind in own.arrays):
        if lacking := [part for part, own in parts.items() if kind not in own.arrays]:
            raise ValueError(
                f"{name}: {lacking[0]} has no {kind}, and others of its parts do; the parts of what is"
                " fused need one optimizer."
            )
        arrays |= _joined(name, kind, {part: own.arrays[kind] for part, own in parts.items()}, axis)
    kept = {part: own.kept for part, own in parts.items() if own.kept is not None}
    return Parameter(arrays, _joined_kept(name, kept, cut, _members(lengths[0], cut)))


def _joined(
    name: str, kind: str, pieces: Mapping[str, np.ndarray], axis: CutAxis
) -> dict[str, np.ndarray]:
    """The array of one kind by its name, or where blocks have arrays of their own several."""
    if kind == "step":
        if len({int(step) for step in pieces.values()}) > 1:
            steps = ", ".join(f"{part} {step}" for part, step in pieces.items())
            raise ValueError(
                f"{name}: its parts have done different numbers of steps ({steps}), and one parameter"
                " counts once; a parameter without gradients has done fewer."
            )
        return {kind: next(iter(pieces.values()))}
    joined = axis.joined([*pieces.values()])
    if joined is not None:
        return {kind: joined}
    if kind == "second_moment":
        return {f"{kind}.{block}": piece for block, piece in enumerate(pieces.values())}
    shapes = ", ".join(f"{part} {piece.shape}" for part, piece in pieces.items())
    raise ValueError(
        f"{kind}/{name}: those of its parts do not fit side by side: {shapes}; give the parts one"
        " optimizer and alike layouts."
    )


def _joined_kept(name: str, parts: Mapping[str, Kept], cut: Cut, members: int) -> Kept | None:
    if not parts:
        return None
    first, *others = parts.values()
    if any(each.settings != first.settings for each in others):
        raise ValueError(
            f"{name}: its parts {', '.join(parts)} were stepped by different settings; give them one"
            " optimizer, or keep them apart."
        )
    for part, each in parts.items():
        _check_known(part, each)
    own = [each.matrices for each in parts.values()]
    joined = sum_of_matrices(own)
    if _cut_matrices(joined, cut.sizes, members) != own:
        unlike = ", ".join(
            f"{part} for {written_matrices(own.matrices)}" for part, own in parts.items()
        )
        raise ValueError(
            f"{name}: the file's run took {unlike}; a fused parameter has one block for each part, or"
            " blocks of one size in all."
        )
    return Kept(first.settings, joined)


def _check_known(name: str, kept: Kept) -> None:
    if kept.settings["optimizer"] == MATRIX and not kept.matrices:
        raise ValueError(
            f"{name}: the file does not say which matrices it was stepped as, so it is neither cut nor"
            " joined; take optax.contrib.muon's run over with recipe='optax_muon' first, by the"
            " same names, and move what that writes."
        )


def _needs_splits(cut: Cut) -> str:
    return (
        f"only a layout whose output_splits make a block of each of {cut.sizes} along {cut.axis!r} steps"
        " it as its parts are stepped. Have that in the run from its start, or move parameters alone."
    )


def _lengths(name: str, arrays: Arrays, cut: Cut, size: int) -> dict[str, int]:
    """How many entries the names of the fused side have; `size` is due to the one that is cut."""
    (group,) = (group for group in cut.side if cut.axis in group)
    beside = {*group} - {cut.axis}
    # Where it follows from the others the error below can say what it is.
    sizes = dict(cut.others) if beside <= cut.others.keys() else {**cut.others, cut.axis: size}
    shape = taken_apart(whole_array(arrays), cut.side, sizes, name).shape
    lengths = dict(zip(names_of(cut.side), shape, strict=True))
    if lengths[cut.axis] != size:
        raise ValueError(
            f"{name}: its {cut.axis} has {lengths[cut.axis]} entries, and {size} by its rule's"
            f" cut={{{cut.axis!r}: {cut.sizes}}}; give each part its own size there."
        )
    return lengths


def _members(lengths: Mapping[str, int], cut: Cut) -> int:
    """How many members of a stack a fused parameter holds."""
    stacked = [name for name in cut.parts[0].names if name not in cut.fused.names]
    return math.prod(lengths[name] for name in stacked)


def _cut_matrices(
    matrices: Matrices, sizes: tuple[int, ...], members: int
) -> list[Matrices] | None:
    """The matrices of each part, if each is one block or all blocks have one size; None otherwise."""
    if not matrices:
        return [()] * len(sizes)
    total, largest = sum(sizes), max(outputs for _, outputs, _ in matrices)
    number, outputs, inputs = matrices[0]
    if len(matrices) == 1:
        each = number // members
        own = [(members * (each * size // total), outputs) for size in sizes]
    else:
        unit = largest // max(sizes)
        entries = sum(number * outputs for number, outputs, _ in matrices)
        own = [(entries // max(total * unit, 1), size * unit) for size in sizes]
    parts = [((number, outputs, inputs),) for number, outputs in own]
    return parts if sum_of_matrices(parts) == matrices else None
