"""Milliseconds of work on a GPU, by its own clock or by the wall's."""

import statistics
import time
from collections.abc import Callable
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
