"""Odd polynomials whose composition approximates the sign function on the singular values.

One Newton-Schulz step with coefficients `(a, b, c)` maps every singular value `x` of a matrix to
`a x + b x^3 + c x^5` and leaves the singular vectors alone; a tuple of triples is one polynomial a
step. A triple with c = 0 is a cubic, which takes one product less. The published sets stand here with
their sources, beside the solvers that derive the optimal ones.
"""

import difflib
import functools
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

Triple = tuple[float, float, float]
Coefficients = tuple[Triple, ...]

NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's quintic, five times. It is steep at zero, and does not converge to 1: singular values
that have come near it wander within [0.68, 1.14].
Source: https://kellerjordan.github.io/posts/muon and modded-nanogpt."""

POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""`polar_express(1e-3, steps=5, safety=1.02, cushion=0.02)`, as modded-nanogpt tabulates it.
Source: arXiv 2505.16932; KellerJordan/modded-nanogpt 056306ba."""

POLAR_EXPRESS_UNSCALED: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""The Polar Express paper's own table, its first five steps, without a safety factor: after five
steps the interval has not converged, so the last triple is an intermediate one. Its cushion is
0.02407327424182761. Source: arXiv 2505.16932."""

YOU: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Jiacheng You's five step set, found by gradient search. Source: microsoft/dion 0a059a4,
`dion/newton_schulz_triton.py`."""

CUBIC: Coefficients = ((1.5, -0.5, 0.0),) * 5
"""The classical Newton-Schulz iteration X(3I - X^T X)/2: second order Taylor, converges to 1."""

QUINTIC_TAYLOR: Coefficients = ((15 / 8, -10 / 8, 3 / 8),) * 5
"""The third order Taylor iteration, the limit of Polar Express once all singular values are near 1.
Source: arXiv 2505.16932."""

DEEPSEEK_V4: Coefficients = NEWTON_SCHULZ[:1] * 8 + ((2.0, -1.5, 0.5),) * 2
"""Keller Jordan's quintic eight times, which brings nearly everything near 1, then twice one that has
p(1) = 1 and p'(1) = 0. Source: DeepSeek-V4, arXiv 2606.19348; NVIDIA-NeMo/Emerging-Optimizers fd77292,
`deepseekv4`."""

CANS: Coefficients = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
"""Chebyshev-optimal quintics on [1e-3, 1], each for the interval that the one before leaves: Polar
Express without cushion and safety, `polar_express(1e-3, steps=5, cushion=0)`, to the digits that are
published. Source: arXiv 2506.10935; NVIDIA-NeMo/Emerging-Optimizers fd77292, `cans`."""

AOL: Coefficients = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
"""Four steps for what AOL preconditioning leaves, `Polar(preconditioning="aol")`, in the place of five.
Source: Turbo-Muon, arXiv 2512.04632; thib-s/flash-newton-schulz."""

RELAXED_CUBIC: Coefficients = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)
"""`relaxed_cubic(7e-3, steps=5, peak=1.3)`, to the digits that are published: two products a step, and
singular values up to 1.3. Source: arXiv 2606.00371; NVIDIA-NeMo/Emerging-Optimizers fd77292."""


def with_safety(coefficients: Coefficients, safety: float, *, last: bool = True) -> Coefficients:
    """`p(x / safety)` for each step's `p`, so that rounding above 1 cannot make the next step diverge.

    Args:
      coefficients: one `(a, b, c)` a step.
      safety: a factor of at least 1; `(a, b, c)` is divided by `(s, s^3, s^5)`.
      last: whether the last step, after which nothing can diverge, is scaled too.
    """
    scaled = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in coefficients)
    return scaled if last else scaled[:-1] + coefficients[-1:]


POLAR_EXPRESS_1_05: Coefficients = with_safety(POLAR_EXPRESS_UNSCALED, 1.05)
"""The paper's table with safety 1.05 on every step: Dao-AILab/gram-newton-schulz takes it for the Gram
form, whose rounding errors are larger."""

POLYNOMIALS: dict[str, Coefficients] = {
    "newton_schulz": NEWTON_SCHULZ,
    "polar_express": POLAR_EXPRESS,
    "polar_express_unscaled": POLAR_EXPRESS_UNSCALED,
    "polar_express_1_05": POLAR_EXPRESS_1_05,
    "you": YOU,
    "cubic": CUBIC,
    "quintic_taylor": QUINTIC_TAYLOR,
    "deepseek_v4": DEEPSEEK_V4,
    "cans": CANS,
    "aol": AOL,
    "relaxed_cubic": RELAXED_CUBIC,
}

_PAPERS_CUSHION = 0.02407327424182761
"""Of the Polar Express paper's own table."""


def cubic_steps(coefficients: Coefficients) -> int:
    """How many of the steps are cubics, which need no square of the Gram matrix."""
    return sum(c == 0 for _, _, c in coefficients)


def find_coefficients(coefficients: str | Sequence[Sequence[float]]) -> Coefficients:
    """The set of that name in `POLYNOMIALS`, or the triples themselves.

    Raises:
      ValueError: an unknown name, with the nearest known one; no triple, or what is no (a, b, c) of
        finite numbers.
    """
    if isinstance(coefficients, str):
        if coefficients in POLYNOMIALS:
            return POLYNOMIALS[coefficients]
        near = difflib.get_close_matches(coefficients, POLYNOMIALS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown coefficients {coefficients!r}; did you mean {near[0]!r}? Known sets:"
            f" {', '.join(POLYNOMIALS)}; or give one (a, b, c) a step."
        )
    triples = tuple(tuple(map(float, triple)) for triple in coefficients)
    if not triples:
        raise ValueError("coefficients is empty; give one (a, b, c) a step, as in POLYNOMIALS.")
    for triple in triples:
        if len(triple) != 3 or not all(map(math.isfinite, triple)):
            raise ValueError(
                f"coefficients has {triple}, which is no (a, b, c) of finite numbers; give one triple"
                " a step, as in POLYNOMIALS."
            )
    return cast(Coefficients, triples)


@functools.lru_cache(maxsize=64)
def with_steps(coefficients: Coefficients, steps: int) -> Coefficients:
    """A set made longer or shorter: as many triples as `steps`.

    A set that repeats one triple repeats it `steps` times. `POLAR_EXPRESS` is derived anew, by
    `polar_express(1e-3, steps=steps, safety=1.02, cushion=0.02)`. Of any other table the first triples
    are taken; those that a solver derives (the paper's own Polar Express, with and without its safety of
    1.05, `CANS` and `RELAXED_CUBIC`) are derived anew where more are asked for.

    Raises:
      ValueError: `steps` is no whole number of at least 1, or more than a table has that no solver
        derives.
    """
    if isinstance(steps, bool) or steps != int(steps) or steps < 1:
        raise ValueError(f"steps={steps}; use a whole number of at least 1, such as 5.")
    steps = int(steps)
    if len(coefficients) == steps:
        return coefficients
    if coefficients == POLAR_EXPRESS:
        return polar_express(1e-3, steps=steps, safety=1.02, cushion=0.02)
    if len(set(coefficients)) == 1:
        return coefficients[:1] * steps
    if steps < len(coefficients):
        return coefficients[:steps]
    if coefficients == POLAR_EXPRESS_UNSCALED:
        return polar_express(1e-3, steps=steps, cushion=_PAPERS_CUSHION)
    if coefficients == POLAR_EXPRESS_1_05:
        return with_safety(polar_express(1e-3, steps=steps, cushion=_PAPERS_CUSHION), 1.05)
    if coefficients == CANS:
        return polar_express(1e-3, steps=steps, cushion=0.0)
    if coefficients == RELAXED_CUBIC:
        return relaxed_cubic(7e-3, steps=steps, peak=1.3)
    raise ValueError(
        f"steps={steps}, but these coefficients are a table of {len(coefficients)} different steps; give"
        f" coefficients=polar_express(1e-3, steps={steps}), or a table of {steps}."
    )


def evaluate(coefficients: Coefficients, x):
    """The composed polynomial at singular values `x` (a float or an array)."""
    for a, b, c in coefficients:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


def optimal_quintic(lower: float, upper: float) -> Triple:
    """The odd quintic p with the smallest max |1 - p(x)| over `lower <= x <= upper`.

    By Chebyshev's theorem the best p meets 1 - p = +E, -E, +E, -E at four points: the two ends and
    the two inner extrema q < r of p (Polar Express, arXiv 2505.16932). Remez: solve the
    linear system for (a, b, c, E) at the current points, move q and r to the roots of
    p'(x) = a + 3b x^2 + 5c x^4, repeat until E stands still.

    Raises:
      ValueError: unless 0 < lower <= upper.
    """
    if not 0 < lower <= upper:
        raise ValueError(f"optimal_quintic needs 0 < lower <= upper, got {lower} and {upper}")
    width = 1 - lower / upper
    if width < 1e-3:
        # The system loses width^3 to rounding. Its limit, Taylor's quintic about the middle, is as near
        # as width^2, which meets that loss here.
        middle = (lower + upper) / 2
        a, b, c = QUINTIC_TAYLOR[0]
        return a / middle, b / middle**3, c / middle**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error, previous = math.inf, math.nan
    for _ in range(100):
        if abs(error - previous) <= 1e-15:
            break
        previous = error
        points = np.array([lower, q, r, upper])
        alternating = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, alternating], axis=1)
        a, b, c, error = (float(value) for value in np.linalg.solve(system, np.ones(4)))
        spread = math.sqrt(9 * b**2 - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * spread) / (10 * c)) for sign in (-1, 1))
    return a, b, c


def polar_express(
    lower_bound: float, *, steps: int, safety: float = 1.0, cushion: float = 0.02
) -> Coefficients:
    """The Polar Express polynomials (arXiv 2505.16932).

    Each step is optimal for the interval that the steps before it leave, which (without cushion and
    safety) makes the composition the best one of its degree on `[lower_bound, 1]`.

    Args:
      lower_bound: the smallest singular value, relative to the norm, that is to reach 1.
      steps: how many quintic steps.
      safety: `p(x / safety)` on every step but the last, before the interval is propagated.
      cushion: the optimisation's lower end is at least `cushion` times the upper one. Without it the
        first steps would lift the smallest values at the price of pushing larger ones towards zero.

    Raises:
      ValueError: a lower bound outside (0, 1), steps or safety below 1, or a cushion outside [0, 1].
    """
    _check_range(lower_bound, steps)
    if not 1 <= safety < math.inf:
        raise ValueError(f"safety={safety}: use a finite number of at least 1, such as 1.02.")
    if not 0 <= cushion <= 1:
        raise ValueError(f"cushion={cushion}: use a number in [0, 1], such as 0.02.")
    lower, upper = float(lower_bound), 1.0
    result: list[Triple] = []
    for step in range(steps):
        a, b, c = optimal_quintic(max(lower, cushion * upper), upper)
        # The cushion leaves p off centre on [lower, upper]: rescale so that 1 - p(lower) = p(upper) - 1.
        ends = evaluate(((a, b, c),), lower) + evaluate(((a, b, c),), upper)
        triple = (2 * a / ends, 2 * b / ends, 2 * c / ends)
        if step < steps - 1:
            (triple,) = with_safety((triple,), safety)
        result.append(triple)
        # Rounding may lift a converged lower end above 1, and so above the upper one.
        lower = min(evaluate((triple,), lower), 1.0)
        upper = 2 - lower
    return tuple(result)


def relaxed_cubic(lower_bound: float, *, steps: int, peak: float) -> Coefficients:
    """Cubics that lift small singular values fast, and let large ones rise to `peak`.

    On [l, u] the odd cubic with p(l) = p(u), the smallest value there, is that of the best approximation
    to a constant: its inner maximum and its two ends are the alternation of Chebyshev's theorem. From
    a l + b l^3 = a u + b u^3 follows a = -b k with k = l^2 + l u + u^2; the maximum, at sqrt(k / 3), is
    2/3 a sqrt(k / 3), which `peak` fixes. The next interval is [p(l), peak]. With `peak` at 1 + E this
    is the best cubic, whose error is E; a larger one is steeper at zero. Source: arXiv 2606.00371.

    Args:
      lower_bound: the smallest singular value, relative to the norm, that is to be lifted.
      steps: how many cubics.
      peak: the largest singular value that a step makes.

    Raises:
      ValueError: a lower bound outside (0, 1), steps below 1, or a peak below 1.
    """
    _check_range(lower_bound, steps)
    if not 1 <= peak < math.inf:
        raise ValueError(f"peak={peak}: use a finite number of at least 1, such as 1.3.")
    lower, upper = float(lower_bound), 1.0
    result: list[Triple] = []
    for _ in range(steps):
        k = lower**2 + lower * upper + upper**2
        a = 1.5 * peak / math.sqrt(k / 3)
        result.append((a, -a / k, 0.0))
        lower, upper = evaluate((result[-1],), lower), peak
    return tuple(result)


def _check_range(lower_bound: float, steps: int) -> None:
    """Raises a ValueError for a lower bound outside (0, 1), or steps below 1."""
    if not 0 < lower_bound < 1:
        raise ValueError(f"lower_bound={lower_bound}: use a number in (0, 1), such as 1e-3.")
    if steps != int(steps) or steps < 1:
        raise ValueError(f"steps={steps}: use a whole number of at least 1, such as 5.")
