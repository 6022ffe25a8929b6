"""Where the heads of a query's or key's weight lie, and how QK-clip reaches each of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HeadLayout:
    """Where a projection to queries or keys has its heads: for `qk_clip`.

    | weight | layout |
    | --- | --- |
    | Flax, (in, heads * size) | `HeadLayout(heads=heads)` |
    | Flax, (in, heads, size) | `HeadLayout(axis=-2)` |
    | PyTorch, (heads * size, in) | `HeadLayout(heads=heads, axis=0)` |
    | a bias, (heads * size,) | `HeadLayout(heads=heads)` |
    | latent attention, queries, (rank, heads, plain + rotary) | `HeadLayout(axis=-2, channels=((plain, 0.5), (rotary, 1)))` |
    | latent attention, keys and values, (rank, heads, plain + value) | `HeadLayout(axis=-2, channels=((plain, 0.5), (value, 0)))` |

    Attributes:
      heads: how many heads `axis` holds one after the other, each with all of its channels. None: `axis`
        has one entry a head, and the axis behind it the channels.
      axis: of the heads.
      channels: (size, power) of each section of a head's channels, in order: a section is multiplied by
        gamma^power. None is a power of a half for all: what queries and keys share evenly. The power is
        1 for rotary channels of queries whose keys all heads share, and 0 for what is not to be scaled.
      layer_axis: where layers are stacked (scan), the axis that they lie along.

    Raises:
      ValueError: no head, or a section without channels or with a negative power.
    """  # noqa: E501 - a table's row is one line

    heads: int | None = None
    axis: int = -1
    channels: tuple[tuple[int, float], ...] | None = None
    layer_axis: int = 0

    def __post_init__(self):
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads={self.heads}; give the number of heads, at least 1, or None.")
        for size, power in self.channels or ():
            if size < 1 or not 0 <= power < math.inf:
                raise ValueError(
                    f"channels={self.channels}: give (size, power) pairs, a size of at least 1 and a"
                    " power of at least 0."
                )

    def on(self, shape: Sequence[int], name: str) -> "Heads":
        """The heads of a weight of this shape. `name`: for errors.

        Raises:
          ValueError: the layout does not fit the shape.
        """
        rank = len(shape)
        own = f"{name}: {self} does not fit the shape {tuple(shape)}"
        if not -rank <= self.axis < rank:
            raise ValueError(f"{own}: it has no axis {self.axis}; give the axis of the heads.")
        axis = self.axis % rank
        if self.heads is None:
            if axis + 1 == rank:
                raise ValueError(
                    f"{own}: behind the axis of the heads there is none of channels; give heads=, the"
                    " number of heads, where one axis holds both."
                )
            heads, size = shape[axis], shape[axis + 1]
        else:
            heads, size = self.heads, shape[axis] // self.heads
            if heads * size != shape[axis]:
                raise ValueError(
                    f"{own}: axis {self.axis} has {shape[axis]} entries, which are not {heads} heads of"
                    " one size; give this projection's own number of heads."
                )
        sections = ((size, 0.5),) if self.channels is None else self.channels
        if sum(each for each, _ in sections) != size:
            raise ValueError(
                f"{own}: a head has {size} channels; give sections whose sizes add up to that."
            )
        powers = np.concatenate([np.full(each, power) for each, power in sections])
        return Heads(tuple(shape), axis, heads, self.heads is not None, powers, self, name)


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one weight.

    Attributes:
      shape: of the weight. axis: of the heads, not negative. count: how many there are. merged: whether
        their axis has their channels too. powers: (channels,) float64. layout, name: for errors.
    """

    shape: tuple[int, ...]
    axis: int
    count: int
    merged: bool
    powers: np.ndarray
    layout: HeadLayout
    name: str

    def check_logits(self, shape: Sequence[int]) -> None:
        """Checks the largest logits: (query heads,), or (layers, query heads) of stacked layers.

        Raises:
          ValueError: they do not fit, and which shape would.
        """
        layers = self.shape[self.layer_axis] if len(shape) == 2 else None
        wanted = (self.count,) if layers is None else (layers, self.count)
        taken = {self.axis} if self.merged else {self.axis, self.axis + 1}
        fits = 1 <= len(shape) <= 2 and shape[-1] > 0 and shape[-1] % self.count == 0
        if layers is not None:
            fits = fits and shape[0] == layers and self.layer_axis not in taken
        if not fits:
            raise ValueError(
                f"{self.name}: largest_logits of shape {tuple(shape)} for a weight of shape"
                f" {self.shape} with {self.count} heads ({self.layout}); give one number a query head,"
                f" as in shape {wanted}, or a multiple of {self.count} where queries share a key;"
                " of stacked layers (layers, query heads)."
            )

    @property
    def layer_axis(self) -> int:
        return self.layout.layer_axis % len(self.shape)

    def broadcast(self, *, stacked: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(permutation, shape) that make factors broadcast to the weight.

        Args:
          stacked: whether the factors are ([layers,] heads * channels), or ([layers,] heads, channels)
            where the weight has an axis for each; without layers if False.
        """
        axes = [self.axis] if self.merged else [self.axis, self.axis + 1]
        if stacked:
            axes = [self.layer_axis, *axes]
        order = tuple(sorted(range(len(axes)), key=axes.__getitem__))
        return order, tuple(size if i in axes else 1 for i, size in enumerate(self.shape))


def module_of(weight: str, modules: Iterable[str], separator: str) -> str | None:
    """The longest of `modules` that the weight lies in, by their paths; None where there is none.

    The empty path is the model, in which every weight lies.
    """
    parts = weight.split(separator)
    found = None
    for module in modules:
        own = module.split(separator) if module else []
        if parts[: len(own)] == own and (found is None or len(module) > len(found)):
            found = module
    return found


def parent_of(weight: str, separator: str) -> str:
    """The module whose logits a weight is likely to want: `attention` of `attention/query/kernel`."""
    parts = weight.split(separator)
    return separator.join(parts[:-2] or parts[:-1])


def check_tau(tau: object) -> None:
    """Raises a ValueError unless tau, where it is a number, is above 0 and finite."""
    if isinstance(tau, int | float) and not 0 < tau < math.inf:
        raise ValueError(f"tau={tau}; give the largest logit that is allowed, such as 100.0.")
