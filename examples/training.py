"""One training run: a model, an optimizer and batches in, losses on the way out."""

import dataclasses
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from examples.corpus import Corpus
from examples.gpt import GPT, GPTConfig
from examples.mesh import place_batch, place_parameters
from examples.optimizers import Rates, clipped
from examples.processes import is_first

EVALUATIONS = 12  # a run, besides the one before the first step
VALIDATION_BATCHES = 24  # the same ones for every run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share."""

    model: GPTConfig
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Losses after `step` updates, in nats a byte; `train_loss` is the mean since the evaluation
    before, and None at step 0."""

    step: int
    train_loss: float | None
    validation_loss: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. `seconds` includes compilation and evaluation, `step_seconds` neither."""

    optimizer: str
    rates: Rates
    seed: int
    evaluations: tuple[Evaluation, ...]
    seconds: float
    step_seconds: float

    @property
    def final_loss(self) -> float:
        """The validation loss at the end of the decay, the only place to judge an optimizer at."""
        return self.evaluations[-1].validation_loss


def next_byte_loss(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, a float32 scalar, over windows (batch, context + 1) uint8."""
    inputs, targets = windows[:, :-1], windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()


@nnx.jit
def _train_step(model: GPT, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(next_byte_loss)(model, windows)
    optimizer.update(model, gradients)
    return loss


_validation_step = nnx.jit(next_byte_loss)


def begin(
    settings: Settings, optimizer: str, rates: Rates, seed: int, mesh: Mesh | None
) -> tuple[GPT, nnx.Optimizer]:
    """The model and its optimizer before the first step."""
    tx = clipped(optimizer, rates, settings.steps, mesh)

    def both() -> tuple[GPT, nnx.Optimizer]:
        model = GPT(settings.model, rngs=nnx.Rngs(seed))
        if mesh is not None:
            place_parameters(model, mesh)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    return both() if mesh is None else nnx.jit(both)()


def train(
    corpus: Corpus,
    settings: Settings,
    *,
    optimizer: str,
    rates: Rates,
    seed: int,
    mesh: Mesh | None = None,
) -> Run:
    """Trains one model; the seed alone, not the optimizer, decides its first weights and batches.

    Args:
      mesh: where; None is JAX's default device.
    """
    start = time.perf_counter()
    batch, steps, context = settings.batch, settings.steps, settings.model.context
    model, update = begin(settings, optimizer, rates, seed, mesh)
    batches = corpus.train_batches(seed=seed, steps=steps, batch=batch, context=context)
    held_out = corpus.validation_windows(count=VALIDATION_BATCHES * batch, context=context)
    held_out = [place_batch(windows, mesh) for windows in np.split(held_out, VALIDATION_BATCHES)]

    def validation_loss() -> float:
        return statistics.fmean(float(_validation_step(model, windows)) for windows in held_out)

    evaluations, step_seconds = [Evaluation(0, None, validation_loss())], []
    stops = sorted({round(steps * part / EVALUATIONS) for part in range(EVALUATIONS + 1)})
    with tqdm(
        total=steps, desc=f"{optimizer}, seed {seed}", unit="step", disable=not is_first()
    ) as bar:
        for stop, next_stop in itertools.pairwise(stops):
            begun, losses = time.perf_counter(), []
            for windows in itertools.islice(batches, next_stop - stop):
                losses.append(_train_step(model, update, place_batch(windows, mesh)))
                bar.update()
            train_loss = float(jnp.stack(losses).mean())  # waits for the steps
            step_seconds.append((time.perf_counter() - begun) / len(losses))
            evaluations.append(Evaluation(next_stop, train_loss, validation_loss()))
            bar.set_postfix(validation=f"{evaluations[-1].validation_loss:.3f}")
    return Run(
        optimizer,
        rates,
        seed,
        tuple(evaluations),
        seconds=time.perf_counter() - start,
        step_seconds=statistics.median(step_seconds),  # so that the first, which compiles, is out
    )
