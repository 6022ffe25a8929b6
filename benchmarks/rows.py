"""One measurement, or the reason why there is none."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DISTRIBUTIONS = {
    "cutlass": "nvidia-cutlass-dsl",
    "gram_newton_schulz": "gram-newton-schulz",
    "quack": "quack-kernels",
    "tvm_ffi": "apache-tvm-ffi",
}
"""Packages to install by the module that they bring, where the names differ."""


@dataclass
class Row:
    """A line of a table.

    Attributes:
      what: the workload. who: the implementation. base: the implementation that the time is divided by;
        None leaves it to the table. milliseconds: the median of `times`; None where it failed.
      times: one for each round, in milliseconds. quartiles: the lower and the upper one of them.
      reference: what the arithmetic and the bytes take at the machine's rates, in milliseconds.
      operations: useful floating-point operations, or None. more: other figures by name.
      missing: the package that is not installed. failure: why there is no time, if not for that.
    """

    what: str
    who: str
    base: str | None = None
    milliseconds: float | None = None
    times: list[float] = field(default_factory=list)
    quartiles: tuple[float, float] | None = None
    reference: float | None = None
    operations: float | None = None
    more: dict[str, float] = field(default_factory=dict)
    missing: str | None = None
    failure: str | None = None

    @property
    def share(self) -> float | None:
        """The reference over the time: 1 is as fast as the machine can."""
        if not self.milliseconds or not self.reference:
            return None
        return self.reference / self.milliseconds

    @property
    def teraflops(self) -> float | None:
        if not self.milliseconds or not self.operations:
            return None
        return self.operations / self.milliseconds / 1e9

    @property
    def reason(self) -> str | None:
        """Why there is no time; None where there is one."""
        if self.missing is not None:
            return f"not installed: {self.missing}"
        return None if self.failure is None else f"error: {self.failure}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share of reference": self.share, "TFLOP/s": self.teraflops}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Row":
        """The inverse of `as_dict`; what a row written by an older version lacks has its default."""
        known = {each.name: found[each.name] for each in fields(cls) if each.name in found}
        if known.get("quartiles") is not None:
            known["quartiles"] = tuple(known["quartiles"])
        return cls(**known)


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """Notes in the row why it has no time, and lets the run go on.

    A peer whose package is absent is told from one that fails, as one that runs out of memory does.
    """
    try:
        yield
    except Exception as error:
        row.missing = missing_package(error)
        if row.missing is None:
            first = str(error).strip().splitlines() or [""]
            row.failure = f"{type(error).__name__}: {first[0][:120]}"


def missing_package(error: Exception) -> str | None:
    """The package whose absence an import failed for; None for every other error.

    A module that an installed package lacks is an error: that package is there, in another version.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    if importlib.util.find_spec(module) is not None:
        return None
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


def measure(row: Row, function: Callable[[], tuple[float, dict[str, float]]]) -> Row:
    """The row with what `function` returns: milliseconds and more figures."""
    with noted(row):
        row.milliseconds, row.more = function()
    return row
