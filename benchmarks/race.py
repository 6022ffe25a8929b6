"""Contestants on one workload, timed by turns: what else the machine does falls on all alike."""

import contextlib
import gc
import math
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks import clocks
from benchmarks.rows import Row, noted

MOST_CALLS = 100
"""In one turn."""


class Prepared(NamedTuple):
    """A contestant that is ready to run.

    Attributes:
      run: one call, which may return before its work is done. wait: returns when all work is.
      more: figures of its own, for its row.
    """

    run: Callable[[], Any]
    wait: Callable[[], Any]
    more: Mapping[str, float] = {}


class Pace(NamedTuple):
    """How long things may take.

    Attributes:
      rounds: in each of which every contestant has one turn. turn: the seconds that a turn is to take,
        unless one call takes longer. patience: the seconds in which the peers of one race are to be
        ready, all together; ours may take as long as they need. seed: of the order of turns.
    """

    rounds: int = 9
    turn: float = 0.05
    patience: float = 12.0
    seed: int = 0


@dataclass
class Race:
    """One workload's rows, the order of turns in every round, and the clocks meanwhile."""

    name: str
    rows: list[Row]
    order: list[list[str]] = field(default_factory=list)
    clocks: Mapping[str, Sequence[float]] = field(default_factory=dict)


_LATE = "the peers of this race were not ready in time; --patience gives them more"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in the main thread of a system with alarms; elsewhere it waits for ever.

    It stops Python code: a compiler in C++ runs to its end first.
    """
    if seconds <= 0:
        raise TimeoutError(_LATE)
    alarms = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not alarms:
        yield
        return

    def stop(*_):
        raise TimeoutError(_LATE)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def race(
    name: str,
    rows: Sequence[Row],
    prepare: Mapping[str, Callable[[], Prepared]],
    pace: Pace,
    *,
    peers: Collection[str] = (),
) -> Race:
    """Times the contestant of every row, and writes the times into it.

    They are prepared in the order of the rows, and then run by turns in an order that is shuffled for
    every round. A turn is one call that is not timed, and then calls that are waited for once.

    Args:
      peers: those whose preparation, compilation and first calls have a limit.
    """
    patience = pace.patience
    result = Race(name, list(rows))
    ready: dict[str, tuple[Row, Prepared, int]] = {}
    for row in rows:
        start = time.perf_counter()
        with noted(row):
            with time_limit(patience) if row.who in peers else contextlib.nullcontext():
                prepared = prepare[row.who]()
                _seconds(prepared, 2)
                calls = math.ceil(pace.turn / max(_seconds(prepared, 1), 1e-9))
            row.more = dict(prepared.more)
            ready[row.who] = row, prepared, min(max(calls, 1), MOST_CALLS)
        if row.who in peers:
            patience -= time.perf_counter() - start
        if row.reason is not None:
            free()
    shuffled = random.Random(pace.seed)
    with clocks.sampled() as samples:
        for _ in range(pace.rounds):
            turns = shuffled.sample(sorted(ready), len(ready))
            result.order.append(turns)
            for who in turns:
                row, prepared, calls = ready[who]
                with noted(row):
                    _seconds(prepared, 1)
                    row.times.append(1e3 * _seconds(prepared, calls) / calls)
                if row.reason is not None:
                    row.times.clear()
                    del ready[who]
    result.clocks = clocks.summary(samples)
    for row, _, _ in ready.values():
        row.milliseconds, row.quartiles = statistics.median(row.times), quartiles(row.times)
    return result


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; of a single value that value."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def _seconds(prepared: Prepared, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        prepared.run()
    prepared.wait()
    return time.perf_counter() - start


def free() -> None:
    """Gives the memory of what is gone back to the GPU, for the other framework."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
