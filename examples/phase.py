"""What a phase of training makes ready before it starts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from jax.sharding import Mesh

from examples.optimizers import OptimizerConfig
from examples.settings import Devices, Training
from examples.tokens import Tokens
from examples.training import Task


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A phase whose data were read and checked.

    Attributes:
      config: with the presets and sizes that it was left to find.
      prompts: token ids that samples go on with.
      description: of the data, for people.
    """

    config: Any
    task: Task
    tokens: Tokens
    prompts: Sequence[Sequence[int]]
    description: str


class Phase(Protocol):
    """`Pretrain`, `Sft` and `Dpo`."""

    phase: ClassVar[str]

    @property
    def training(self) -> Training: ...

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def devices(self) -> Devices: ...

    def prepare(self, mesh: Mesh | None) -> Prepared: ...
