"""What all phases are told: how long, where, and on which devices."""

import dataclasses
import os

import tyro

from examples.errors import BadInput

OPTIONS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
"""How every command reads its options: `--steps` is `training.steps`, and a switch is `--scan True`."""


@dataclasses.dataclass(frozen=True)
class Training:
    """The run."""

    steps: int = 300
    """Updates."""
    batch: int = 8
    """Windows, conversations or pairs in an update."""
    seed: int = 0
    """Decides first weights and the order of the data."""
    log_every: int = 10
    """Steps between two looks at the losses."""
    evaluate_every: int = 25
    """Steps between two evaluations; the first and the last weights are always evaluated."""
    evaluation_batches: int = 24
    """Batches of held-out data in an evaluation, the same ones for every run."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the last weights are always kept."""
    keep: int = 2
    """Checkpoints that stay."""
    samples: int = 3
    """Texts that the trained model writes at the end, from held-out beginnings."""
    deterministic: bool = True
    """On a GPU: compile what gives the same bits each time, in a resumed run too, which takes longer."""
    diagnostics: bool = False
    """Also log update sizes, orthogonality and neuron norms of every matrix, at each look."""
    tensorboard: bool = False
    """Also write the log for TensorBoard."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "samples") else 1
            if type(value) is int and value < least:
                raise BadInput(f"{name}={value} is below {least}.")


OF_THE_PROCESS = {"kept": False}
"""Metadata of a field that is about this process, and not kept with a run."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where it runs. A run may be resumed on other devices than it began on."""

    mesh: str | None = None
    """name=size,...: fsdp divides parameters and batch, tensor parameters, data the batch."""
    coordinator: str | None = dataclasses.field(
        default_factory=lambda: os.environ.get("JAX_COORDINATOR_ADDRESS")
    )
    """host:port of process 0, for a run of many processes; or JAX_COORDINATOR_ADDRESS."""
    processes: int | None = dataclasses.field(default_factory=lambda: _number("JAX_NUM_PROCESSES"))
    """How many there are; or JAX_NUM_PROCESSES."""
    process: int | None = dataclasses.field(default_factory=lambda: _number("JAX_PROCESS_ID"))
    """Which of them this one is; or JAX_PROCESS_ID."""


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    return None if value is None else int(value)
