"""One measurement, or the reason why there is none."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """A line of a table.

    Attributes:
      what: the workload. who: the implementation. milliseconds: None where it failed.
      reference: what the arithmetic and the bytes take at the machine's rates, in milliseconds.
      operations: useful floating-point operations, or None. more: other figures by name.
      failure: why there is no time.
    """

    what: str
    who: str
    milliseconds: float | None = None
    reference: float | None = None
    operations: float | None = None
    more: dict[str, float] = field(default_factory=dict)
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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share of reference": self.share, "TFLOP/s": self.teraflops}


def measure(row: Row, function: Callable[[], float | tuple[float, dict[str, float]]]) -> Row:
    """The row with what `function` returns: milliseconds, or those and more figures.

    A peer that is not installed, or runs out of memory, is a line with its reason and no end of the run.
    """
    try:
        result = function()
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        row.failure = f"{type(error).__name__}: {first[0][:120]}"
    else:
        row.milliseconds, row.more = result if isinstance(result, tuple) else (result, {})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row
