"""What becomes of one leaf: matrices in a layout, AdamW, or a question."""

from collections.abc import Sequence
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers

from normuon_core.layout import MatrixLayout
from optax_normuon.leaves.readings import Reading

LeafLayout = MatrixLayout | MuonDimensionNumbers | None
"""A layout as callers give it; None leaves the leaf to AdamW."""


class Route(NamedTuple):
    """What becomes of a leaf.

    Attributes:
      layout: of its matrices; None for AdamW, and for a leaf in doubt.
      why: for people.
      readings: those that are left where the leaf is in doubt; else empty.
    """

    layout: MatrixLayout | None
    why: str
    readings: tuple[Reading, ...] = ()

    @property
    def in_doubt(self) -> bool:
        return bool(self.readings)


NO_ENTRIES = Route(None, "no entries")


def in_doubt_between(readings: Sequence[Reading]) -> Route:
    """A leaf that is to be asked about, the likeliest reading first."""
    # More layers than a matrix has rows or columns are the less likely reading.
    readings = sorted(readings, key=lambda r: r.has_more_layers_than_sides)
    return Route(None, " | ".join(reading.meaning for reading in readings), tuple(readings))


def as_matrix_layout(name: str, layout: object) -> MatrixLayout:
    """A leaf's layout as a `MatrixLayout`; `name` is what an error calls the leaf.

    Raises:
      ValueError: it is no layout.
    """
    if isinstance(layout, MatrixLayout):
        return layout
    if isinstance(layout, MuonDimensionNumbers):
        reduction, output = (
            axes if isinstance(axes, int) else tuple(axes)
            for axes in (layout.reduction_axis, layout.output_axis)
        )
        return MatrixLayout(reduction, output)
    raise ValueError(
        f"{name}: a layout must be a MatrixLayout, an optax.contrib.MuonDimensionNumbers or None"
        f" (AdamW), got {layout!r}."
    )
