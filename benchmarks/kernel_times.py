"""Where the time of a step goes: how long each kernel runs, by PyTorch's profiler.

The step is NorMuon's in PyTorch, replayed from a CUDA graph: the kernels are those of the JAX step too.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from benchmarks import steps_in_torch
from benchmarks.arithmetic import Rates, orthogonalization_operations
from benchmarks.race import Race, free, quartiles
from benchmarks.rows import Row, noted
from benchmarks.workloads import Stack

WHOLE = "the step, first kernel to last"
GAPS = "between kernels"

BYTES_A_PARAMETER = {
    "squares": 8,
    "feed": 14,
    "neuron_squares": 2,
    "statistics": 0,
    "finish": 10,
}
"""What a kernel that makes no product has to move: gradient, momentum and parameter in float32, the
stack in half precision. A neuron's statistics are few."""

REPLAYS = 9

PYTORCHS = "PyTorch's own"
"""The few operations of a step that are no kernels of ours."""

OURS = (*BYTES_A_PARAMETER, "product")


class Ran(NamedTuple):
    """One kernel's run: start and stop in microseconds."""

    name: str
    start: float
    stop: float


def races(models: Mapping[str, Sequence[Stack]], rates: Rates | None) -> Iterator[Race]:
    """A row for each kernel: milliseconds of a step, and beside them how often it is launched.

    The reference of products is their operations at the machine's rate, and that of another kernel its
    bytes at the rate of a copy.
    """
    for model, shapes in models.items():
        whole = Row(model, WHOLE)
        rows = [whole]
        with noted(whole):
            replays = _profiled(shapes)
            launches = Counter(ran.name for ran in replays[0])
            for who, times in milliseconds(replays).items():
                row = whole if who == WHOLE else Row(model, who)
                if row is not whole:
                    rows.append(row)
                row.times = times
                row.milliseconds, row.quartiles = statistics.median(times), quartiles(times)
                if who in launches:
                    row.more = {"launches": launches[who]}
                if rates is not None:
                    _compare(row, shapes, rates)
        free()
        yield Race(model, rows)


def milliseconds(replays: Sequence[Sequence[Ran]]) -> dict[str, list[float]]:
    """Of the whole step, of every kernel and of the gaps, a time for each replay.

    Two kernels that overlap count both, and the gaps less; a step's kernels wait for each other.
    """
    found: dict[str, list[float]] = {WHOLE: []}
    for replay in replays:
        spent: dict[str, float] = defaultdict(float)
        for ran in replay:
            spent[ran.name] += (ran.stop - ran.start) / 1e3
        span = (max(ran.stop for ran in replay) - min(ran.start for ran in replay)) / 1e3
        spent[GAPS] = span - sum(spent.values())
        found[WHOLE].append(span)
        for name, time in spent.items():
            found.setdefault(name, []).append(time)
    return found


def _compare(row: Row, shapes: Sequence[Stack], rates: Rates) -> None:
    """Notes in a kernel's row what its work takes at the machine's rates."""
    if row.who == "product":
        row.operations = sum(n * orthogonalization_operations(r, c) for n, r, c in shapes)
        row.reference = 1e3 * row.operations / rates.products
    elif row.who in BYTES_A_PARAMETER:
        parameters = sum(count * rows * columns for count, rows, columns in shapes)
        row.reference = 1e3 * BYTES_A_PARAMETER[row.who] * parameters / rates.copies


def _profiled(shapes: Sequence[Stack]) -> list[list[Ran]]:
    """The kernels of every replay."""
    matrices = steps_in_torch.Matrices(shapes)
    prepared = steps_in_torch.graph(steps_in_torch.normuon("normuon"))(matrices)
    for _ in range(3):
        prepared.run()
    prepared.wait()
    replays = []
    for _ in range(REPLAYS):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            prepared.run()
            prepared.wait()
        events = [each for each in profiler.events() or () if each.device_type.name == "CUDA"]
        replays.append(
            [
                Ran(
                    each.name if each.name in OURS else PYTORCHS,
                    each.time_range.start,
                    each.time_range.end,
                )
                for each in events
            ]
        )
    return replays
