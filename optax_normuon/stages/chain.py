"""The stages of a recipe as one Optax chain, and the names of what its state holds."""

from typing import Any, NamedTuple

import optax

from optax_normuon.stages.momentum import MomentumState
from optax_normuon.stages.neuron_norm import NeuronNormState
from optax_normuon.stages.weight_decay import WeightDecayState


def chain_of_stages(
    direction: optax.GradientTransformation,
    increment: optax.GradientTransformation,
    rate: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The chain of a recipe: stages 1 to 3, stages 4 and 5, and the learning rate.

    Args:
      direction: `optax.chain` of the momentum, and of stages 2 and 3 on matrices.
      increment: stages 4 and 5.
      rate: the learning rate.
    """
    return optax.chain(direction, increment, rate)


class ChainState(NamedTuple):
    """The state of `chain_of_stages` by names; the chain keeps it as nested tuples.

    Attributes:
      momentum, norm, decay, rate: of the stages; `norm` is None without stage 3.
      stateless: of stage 2 and of what stands between it and stage 3.
    """

    momentum: MomentumState
    stateless: tuple[optax.EmptyState, ...]
    norm: NeuronNormState | None
    decay: WeightDecayState
    rate: optax.ScaleByScheduleState

    @classmethod
    def of(cls, state: Any) -> "ChainState":
        """The chain's own state, taken apart."""
        (momentum, on_matrices), decay, rate = state
        norm = next((each for each in on_matrices if isinstance(each, NeuronNormState)), None)
        stateless = tuple(each for each in on_matrices if each is not norm)
        return cls(momentum, stateless, norm, decay, rate)

    def as_state(self) -> optax.OptState:
        """The inverse of `of`."""
        norm = [] if self.norm is None else [self.norm]
        return (self.momentum, (*self.stateless, *norm)), self.decay, self.rate
