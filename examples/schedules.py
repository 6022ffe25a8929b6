"""Learning rate and momentum over the steps of a run."""

import optax


def warm_stay_decay(peak: float, steps: int, *, warmup: float, decay: float) -> optax.Schedule:
    """Linear warmup, constant, then linear to zero at the last step.

    Args:
      warmup, decay: fractions of the steps; the warmup has one step at least.
    """
    first, last = max(1, round(warmup * steps)), round(decay * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / first, peak, first - 1),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, last),
        ],
        [first - 1, steps - last],
    )


def momentum_ramp(
    low: float, high: float, steps: int, *, warmup: int, cooldown: int
) -> optax.Schedule:
    """`low` to `high` over the first steps and back over the last, as modded-nanogpt does it.

    A young average of gradients should forget quickly, and so should the last one, whose old gradients
    are of weights further away than the learning rate goes any more.

    Args:
      warmup, cooldown: in steps.
    """
    pieces = [
        optax.linear_schedule(low, high, warmup),
        optax.constant_schedule(high),
        optax.linear_schedule(high, low, cooldown),
    ]
    return optax.join_schedules(pieces, [warmup, steps - cooldown])
