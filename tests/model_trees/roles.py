"""What a leaf of a recorded model is, and what a recorded model is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Role(NamedTuple):
    """AdamW's `kind`, or the axes of matrices; `doubt` says why one may ask."""

    adamw: str | None = None
    reduction_axis: tuple[int, ...] = ()
    output_axis: tuple[int, ...] = ()
    doubt: str | None = None


def adamw(kind: str, doubt: str | None = None) -> Role:
    return Role(adamw=kind, doubt=doubt)


def matrices(reduction, output, doubt: str | None = None) -> Role:
    """Axes count from the front."""

    def axes(given):
        return (given,) if isinstance(given, int) else tuple(given)

    return Role(None, axes(reduction), axes(output), doubt)


EMBEDDING, HEAD, NORM, BIAS = map(adamw, ("embedding", "head", "norm", "bias"))
VECTOR, DEPTHWISE, TABLE, SCALAR = map(
    adamw, ("vector", "depthwise convolution", "table", "scalar")
)
FLAX_LINEAR, TORCH_LINEAR = matrices(0, 1), matrices(1, 0)
FLAX_CONV_1D, FLAX_CONV_2D = matrices((0, 1), 2), matrices((0, 1, 2), 3)
TORCH_CONV_1D, TORCH_CONV_2D = matrices((1, 2), 0), matrices((1, 2, 3), 0)


class Model(NamedTuple):
    """A public model: `make` gives its abstract parameters, `roles` what its leaves are.

    `package` is the distribution on PyPI, or that of the layers where the code stands in documentation.
    """

    name: str
    package: str
    code: str
    url: str
    convention: str
    make: Callable[[], Any]
    roles: Mapping[str, Role]
