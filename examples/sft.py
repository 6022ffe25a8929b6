"""Supervised fine-tuning: answers to questions, the loss on the answers alone."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from jax.sharding import Mesh

from examples.conversations import read_conversations
from examples.gpt import GPTConfig
from examples.losses import next_token
from examples.optimizers import OptimizerConfig
from examples.packing import pack
from examples.phase import Prepared
from examples.presets import SFT, with_preset
from examples.rows import batches, split, whole_batches
from examples.settings import OF_THE_PROCESS, Devices, Training
from examples.trained import load_base
from examples.training import Task


@dataclasses.dataclass(frozen=True)
class Sft:
    """Fine-tune a model on conversations."""

    phase: ClassVar[str] = "sft"

    start: tyro.conf.Positional[Path]
    """Folder of the run whose model is tuned."""
    data: Path
    """JSON lines: MiniMind's `conversations`, or GSM8K's `question` and `answer`."""
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

    def prepare(self, mesh: Mesh | None) -> Prepared:
        """Reads and checks the data and the weights.

        Raises:
          BadInput: they cannot be trained on; the message names file and line.
        """
        base, training = load_base(self.start, mesh=mesh), self.training
        tokens = base.tokens
        model = dataclasses.replace(base.model, context=self.context or base.model.context)
        optimizer = with_preset(self.optimizer, SFT, width=model.width)
        conversations, omissions = read_conversations(self.data, tokens, context=model.context)
        train, held_out = split(conversations)
        train_rows, held_out_rows = (
            pack(part, model.context + 1, end=tokens.end) for part in (train, held_out)
        )
        validation = whole_batches(held_out_rows, batch=training.batch)
        task = Task(
            name=f"sft {optimizer.optimizer}",
            model=model,
            loss=next_token,
            batch=batches(train_rows, seed=training.seed, batch=training.batch),
            validation=validation[: training.evaluation_batches],
            params=base.params,
        )
        return Prepared(
            config=dataclasses.replace(
                self, model=model, tokenizer=base.tokenizer, optimizer=optimizer
            ),
            task=task,
            tokens=tokens,
            prompts=[each.prompt for each in held_out],
            description="\n".join(
                [
                    f"{self.data.name}: {len(train):,} conversations to train on, in"
                    f" {len(train_rows):,} windows, {len(held_out):,} held out",
                    *omissions.lines(),
                ]
            ),
        )
