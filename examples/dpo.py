"""Preference tuning (DPO): of two answers the first one is to be more likely than it was."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from jax.sharding import Mesh

from examples.gpt import GPTConfig
from examples.losses import preference
from examples.optimizers import OptimizerConfig
from examples.phase import Prepared
from examples.preferences import read_pairs
from examples.presets import DPO, with_preset
from examples.rows import batches, split, whole_batches
from examples.settings import OF_THE_PROCESS, Devices, Training
from examples.trained import load_base
from examples.training import Task


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Tune a model on pairs of answers."""

    phase: ClassVar[str] = "dpo"

    start: tyro.conf.Positional[Path]
    """Folder of the run whose model is tuned; the same weights, frozen, are what it is compared with."""
    data: Path
    """JSON lines: MiniMind's `chosen` and `rejected` conversations, or texts with their `prompt`."""
    beta: float = 0.1
    """How strongly the model is held to what it was."""
    context: int | None = None
    """Tokens that the model sees at most. None is what it was trained with."""
    output: Path | None = None
    """Folder of the run, which must be new. None is the next free one of examples/out."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: Training = dataclasses.field(default_factory=Training)
    devices: Devices = dataclasses.field(default_factory=Devices, metadata=OF_THE_PROCESS)
    # What `start` has; kept with the run, and no choice of the caller.
    model: Annotated[GPTConfig, tyro.conf.Suppress] = dataclasses.field(default_factory=GPTConfig)
    tokenizer: Annotated[Path | None, tyro.conf.Suppress] = None
    start_step: Annotated[int | None, tyro.conf.Suppress] = None

    def prepare(self, mesh: Mesh | None) -> Prepared:
        """Reads and checks the data and the weights.

        Raises:
          BadInput: they cannot be trained on; the message names file and line.
        """
        base = load_base(self.start, mesh=mesh, step=self.start_step)
        training = self.training
        tokens = base.tokens
        model = dataclasses.replace(base.model, context=self.context or base.model.context)
        optimizer = with_preset(self.optimizer, DPO, width=model.width)
        pairs, omissions = read_pairs(self.data, tokens, context=model.context)
        train, held_out = split(pairs)
        rows, held_out_rows = ([pair.row for pair in part] for part in (train, held_out))
        task = Task(
            name=f"dpo {optimizer.optimizer}",
            model=model,
            loss=preference(self.beta),
            batch=batches(rows, seed=training.seed, batch=training.batch),
            validation=whole_batches(held_out_rows, batch=training.batch)[
                : training.evaluation_batches
            ],
            params=base.params,
            frozen=base.params,
        )
        return Prepared(
            config=dataclasses.replace(
                self,
                model=model,
                tokenizer=base.tokenizer,
                start_step=base.step,
                optimizer=optimizer,
            ),
            task=task,
            tokens=tokens,
            prompts=[pair.prompt for pair in held_out],
            description="\n".join(
                [
                    f"{self.data.name}: {len(train):,} pairs to train on, {len(held_out):,} held out",
                    *omissions.lines(),
                ]
            ),
        )
