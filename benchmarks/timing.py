"""Milliseconds of work on a GPU, by its own clock or by the wall's."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def median_milliseconds(
    function: Callable[[], Any], *, repetitions: int = 5, calls: int = 3, warm_up: int = 2
) -> float:
    """A PyTorch function's time on the GPU, by CUDA events around `calls` calls; the median.

    Compilation and first launches stay out of it: the function is called before the clock starts.
    """
    import torch

    for _ in range(warm_up):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)


def median_wall_milliseconds(
    function: Callable[[Any], Any],
    carry: Any,
    wait: Callable[[Any], Any],
    *,
    repetitions: int = 5,
    calls: int = 5,
    warm_up: int = 2,
) -> float:
    """The time of carry <- function(carry) by the wall's clock, waited for once in `calls` calls.

    Args:
      function: may give its argument's buffers away, as a jitted function with donated arguments
        does. wait: blocks until a carry is there.
    """
    for _ in range(warm_up):
        carry = function(carry)
    wait(carry)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            carry = function(carry)
        wait(carry)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def interleaved_milliseconds(
    contestants: Mapping[str, tuple[Callable[[Any], Any], Any]],
    wait: Callable[[Any], Any],
    *,
    repetitions: int = 7,
    calls: int = 3,
    warm_up: int = 2,
) -> dict[str, float]:
    """The same for several functions with their carries, by turns: each repetition times all of them.

    What else the machine does then falls on all alike, and the ratios of their times are fair.
    """
    carries = {name: carry for name, (_, carry) in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        first = repetition == 0
        for name, (function, _) in contestants.items():
            start = time.perf_counter()
            for _ in range(warm_up if first else calls):
                carries[name] = function(carries[name])
            wait(carries[name])
            if not first:
                times[name].append((time.perf_counter() - start) / calls * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}
