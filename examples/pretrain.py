"""Pretraining: the next token of text, from random weights."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from examples.corpus import load_corpus, unigram_entropy
from examples.gpt import GPTConfig
from examples.losses import next_token
from examples.optimizers import OptimizerConfig
from examples.phase import Prepared
from examples.presets import PRETRAIN, Presets, with_preset
from examples.settings import OF_THE_PROCESS, Devices, Training
from examples.tokens import load_tokens
from examples.training import Task

SHOWN = 32  # tokens of held-out text that a sample goes on with


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a model on text."""

    phase: ClassVar[str] = "pretrain"
    presets: ClassVar[Presets] = PRETRAIN

    data: Path | None = None
    """A folder of text files, a text file, Parquet (column `text`) or FineWeb's .bin shards. None is the
    source of Python's own standard library."""
    tokenizer: Path | None = None
    """A tokenizer.json of Hugging Face. None is bytes."""
    output: Path | None = None
    """Folder of the run, which must be new. None is the next free one of examples/out."""
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: Training = dataclasses.field(default_factory=Training)
    devices: Devices = dataclasses.field(default_factory=Devices, metadata=OF_THE_PROCESS)

    def prepare(self, mesh: Mesh | None) -> Prepared:
        """Reads and checks the data.

        Raises:
          BadInput: they cannot be trained on.
        """
        tokens, training = load_tokens(self.tokenizer), self.training
        size = max(self.model.vocabulary, tokens.vocabulary)
        model = dataclasses.replace(self.model, vocabulary=size)
        optimizer = with_preset(self.optimizer, self.presets, width=model.width)
        corpus = load_corpus(self.data, tokens, vocabulary=size)
        count = training.evaluation_batches * training.batch
        held_out = corpus.validation_windows(count=count, context=model.context)
        sizes = dict(seed=training.seed, batch=training.batch, context=model.context)
        task = Task(
            name=f"{self.phase} {optimizer.optimizer}",
            model=model,
            loss=next_token,
            batch=lambda step: {"tokens": corpus.batch(step, **sizes)},
            validation=[
                {"tokens": part} for part in np.split(held_out, training.evaluation_batches)
            ],
        )
        return Prepared(
            config=dataclasses.replace(self, model=model, optimizer=optimizer),
            task=task,
            tokens=tokens,
            prompts=[window[:SHOWN].tolist() for window in held_out[:: training.batch]],
            description=(
                f"{corpus.description}: {len(corpus.train):,} tokens to train on,"
                f" {len(corpus.validation):,} held out, unigram entropy"
                f" {unigram_entropy(corpus.validation):.3f} nats"
            ),
        )
