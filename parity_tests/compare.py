"""Distances between arrays, in the norms in which the tests state their bounds."""

import numpy as np


def infinity_distance(actual, expected) -> float:
    """max |actual - expected| over max |expected|; infinite where only the expected one is all zero,
    and where a NaN stands in one of the two."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = np.max(np.abs(actual - expected), initial=0.0)
    size = np.max(np.abs(expected), initial=0.0)
    if difference == 0:
        return 0.0
    return float(difference / size) if difference <= np.inf and size > 0 else np.inf


def frobenius_distance(actual, expected) -> float:
    """|actual - expected| over |expected|, Frobenius norms; the absolute one where expected is zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (size if size > 0 else 1.0))


def largest_ulps(actual, expected) -> float:
    """max |actual - expected| in units in the last place of the largest expected entry.

    The dtype is `expected`'s. Entries far below the largest are judged at its scale, as a rounding
    error of a sum is.
    """
    size = np.max(np.abs(expected), initial=0.0)
    difference = np.max(
        np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0
    )
    return float(difference / np.spacing(size)) if difference > 0 else 0.0
