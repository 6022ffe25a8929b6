"""Trainings side by side: a fixed number of lanes under one `vmap`, so that an arm is compiled once.

A small model leaves a GPU idle between launches; 16 of them take hardly longer than one. A lane has a
seed and values of its own. What is asked for beyond a multiple of the lanes is filled with repetitions.
"""

import concurrent.futures
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from studies.training import Task, Trained
from studies.trial import Trial

Training = Callable[..., Trained]
"""What `training.training` makes."""


class Outcome(NamedTuple):
    """Of one trial.

    Attributes:
      measured: by name (evaluations,). seconds: of the whole batch of lanes, without compilation.
    """

    measured: dict[str, np.ndarray]
    seconds: float


class Lanes:
    """The compiled trainings of a study's arms.

    Args:
      task: gives the first weights, by a program of its own that all arms share.
      arms: each arm's training. names: of the values of a trial. data: what all trainings share.
    """

    def __init__(
        self,
        task: Task,
        arms: Mapping[str, Training],
        *,
        names: Sequence[str],
        data: Any,
        count: int,
    ):
        self.count = count
        self._arms, self._names, self._data = dict(arms), tuple(names), data
        self._first = jax.jit(jax.vmap(task.first, in_axes=(None, 0, 0)))
        self._compiled: dict[str, Any] = {}

    def prepare(self, arms: Sequence[str]) -> None:
        """Compiles what is not compiled, side by side."""
        missing = [arm for arm in dict.fromkeys(arms) if arm not in self._compiled]
        if not missing:
            return
        with concurrent.futures.ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
            self._compiled |= zip(missing, pool.map(self._compile, missing), strict=True)

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Trains at most as many trials as there are lanes, all of one arm and one length.

        Raises:
          ValueError: too many, or of more than one arm or length.
        """
        kinds = {(trial.arm, trial.evaluations) for trial in trials}
        if len(kinds) != 1 or len(trials) > self.count:
            raise ValueError(f"{len(trials)} trials of {kinds} do not fit {self.count} lanes")
        ((arm, evaluations),) = kinds
        self.prepare([arm])
        filled = [*trials, *[trials[-1]] * (self.count - len(trials))]
        seeds = jnp.asarray([trial.seed for trial in filled], jnp.int32)
        values = {
            name: jnp.asarray([trial.value(name) for trial in filled], jnp.float32)
            for name in self._names
        }
        params = jax.block_until_ready(self._first(self._data, seeds, values))
        start = time.perf_counter()
        measured = jax.device_get(
            self._compiled[arm](self._data, seeds, values, jnp.int32(evaluations), params)
        )
        seconds = time.perf_counter() - start
        return [
            Outcome({name: all[i, :evaluations] for name, all in measured.items()}, seconds)
            for i in range(len(trials))
        ]

    def _compile(self, arm: str):
        seeds = jax.ShapeDtypeStruct((self.count,), jnp.int32)
        number = jax.ShapeDtypeStruct((self.count,), jnp.float32)
        values = dict.fromkeys(self._names, number)
        params = jax.eval_shape(self._first, self._data, seeds, values)
        length = jax.ShapeDtypeStruct((), jnp.int32)
        side_by_side = jax.vmap(self._arms[arm], in_axes=(None, 0, 0, None, 0))

        def measured(*given):
            return side_by_side(*given).measured

        return jax.jit(measured).lower(self._data, seeds, values, length, params).compile()
