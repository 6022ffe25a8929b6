"""Which product kernel runs, and on which tile: a committed table by GPU architecture and size.

`python -m benchmarks.tune` measures the candidates on a GPU and rewrites `tiles.json`.
"""

import functools
import json
import math
from importlib import resources
from typing import NamedTuple


class ProductConfiguration(NamedTuple):
    """Tile sides, warps a program, pipeline stages, and programs that share a multiprocessor."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    programs_a_multiprocessor: int


class HopperConfiguration(NamedTuple):
    """Of the kernel in `hopper.py`: a tile's columns, stages of the ring, buffers for what leaves."""

    tile_n: int
    stages: int
    slots: int


FLOAT32 = ProductConfiguration(64, 64, 32, 4, 3, 1)
"""No tensor core multiplies float32 exactly, and the table has no entries for it."""


@functools.cache
def product_configuration(
    m: int, n: int, k: int, *, dtype: str, symmetric: bool, architecture: str, hopper: bool = False
) -> ProductConfiguration | HopperConfiguration:
    """The entry nearest in size, by the distance of the logarithms; the first on a tie.

    Args:
      architecture: as "sm90"; one without a table of its own takes the newest older one's, else the
        oldest.
      hopper: whether the kernel in `hopper.py` can run. It is taken where the entry has it.
    """
    if dtype == "float32":
        return FLOAT32
    entries = _table(architecture)["symmetric" if symmetric else "general"]
    nearest = min(entries, key=lambda entry: _distance(entry["size"], (m, n, k)))
    if hopper and "hopper" in nearest:
        return HopperConfiguration(*nearest["hopper"])
    return ProductConfiguration(*nearest["configuration"])


def _distance(size, other) -> float:
    return sum(abs(math.log2(a) - math.log2(b)) for a, b in zip(size, other, strict=True))


@functools.cache
def _table(architecture: str) -> dict:
    tables = json.loads(resources.files("normuon_core.kernels").joinpath("tiles.json").read_text())
    known = sorted(tables, key=_number)
    older = [name for name in known if _number(name) <= _number(architecture)]
    return tables[older[-1] if older else known[0]]


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm"))


@functools.cache
def has_gluon() -> bool:
    """Whether the Triton that is installed compiles the kernels in `hopper.py`."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 6)
