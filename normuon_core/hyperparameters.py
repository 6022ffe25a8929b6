"""Checks of the numbers and names that stages take, for both frameworks and the recipes.

Only a Python number is checked. Schedules, arrays and tracers pass: what they hold is not known when
they are given, and to read it would wait for a device.
"""

import difflib
import math
from numbers import Integral, Real
from typing import Any, get_args


def check_rate(name: str, value: object) -> None:
    """Raises a ValueError for a number that is negative or not finite."""
    if isinstance(value, Real) and not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value}; use a finite number of at least 0.")


def check_decay(name: str, value: object) -> None:
    """Raises a ValueError for a number outside [0, 1): the decay of a running mean."""
    if isinstance(value, Real) and not 0 <= float(value) < 1:
        raise ValueError(f"{name}={value}; use a number in [0, 1).")


def check_count(name: str, value: object) -> None:
    """Raises a ValueError for what is no whole number of at least 1: a program is compiled for it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r}; use a whole number of at least 1.")


def check_radius(name: str, value: object) -> None:
    """Raises a ValueError for a number that is no radius; None stands for the norm at the start."""
    if isinstance(value, Real) and not 0 < float(value) < math.inf:
        raise ValueError(
            f"{name}={value}; use a finite number above 0, or None for the norm at the start."
        )


def check_number(name: str, value: object) -> None:
    """Raises a TypeError for an array or a tracer, where a program is compiled for one number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}; use a number: it is fixed when a program is compiled.")


def as_plain(value: Any) -> Any:
    """A NumPy scalar as Python's number, which kernels take by value; all else as it is."""
    return float(value) if isinstance(value, Real) else value


def check_choice(name: str, value: object, literal: Any) -> None:
    """Raises a ValueError, with the nearest known choice, unless `value` is one of a `Literal`'s."""
    known = get_args(literal)
    if type(value) in map(type, known) and value in known:
        return
    near = difflib.get_close_matches(str(value), [str(each) for each in known], n=1, cutoff=0.0)
    nearest = next((each for each in known if str(each) in near), known[0])
    raise ValueError(
        f"unknown {name} {value!r}; did you mean {nearest!r}? Known: {', '.join(map(str, known))}."
    )
