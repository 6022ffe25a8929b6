"""Threads that compile kernels side by side, for both frameworks."""

import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

_MOST = 8

SIDE_BY_SIDE = sys.version_info >= (3, 12, 2) or (3, 11, 8) <= sys.version_info < (3, 12)
"""Whether threads may compile at one time. In older Pythons, threads that parse Python at one time make
each other fail (python/cpython#106905)."""


@functools.cache
def compile_threads() -> ThreadPoolExecutor:
    """Triton compiles outside of Python for the most part, so that threads run side by side."""
    most = _MOST if SIDE_BY_SIDE else 1
    return ThreadPoolExecutor(min(most, os.cpu_count() or 1), "compile kernels")
