"""Where a study's trials are run: what the ledger has is not run again, and time is kept."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from studies.lanes import Lanes
from studies.ledger import Ledger, Row
from studies.machine import machine, versions
from studies.trial import Trial


class OutOfTime(Exception):
    """The next trials would end behind the limit."""


@contextlib.contextmanager
def until_out_of_time() -> Iterator[None]:
    """Ends the work within it where the limit of a lab does, and says so."""
    try:
        yield
    except OutOfTime:
        print("the time is over; the same command goes on")


class Lab:
    """Runs trials and keeps their rows.

    Args:
      averaged: metrics of which a row has the mean over all evaluations, and not the last.
      minutes: the limit; None is none. say: is told a line for each batch; None prints it.
    """

    def __init__(
        self,
        lanes: Lanes,
        ledger: Ledger,
        *,
        averaged: Sequence[str] = (),
        minutes: float | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.lanes, self.ledger = lanes, ledger
        self._averaged = tuple(averaged)
        self._say = functools.partial(print, flush=True) if say is None else say
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest = 0.0  # seconds that a batch of lanes took an evaluation

    def prepare(self, arms: Sequence[str]) -> None:
        """Compiles arms, side by side; `run` compiles one where this was not done.

        Raises:
          OutOfTime: the limit has passed.
        """
        start = time.monotonic()
        if self._end is not None and start > self._end:
            raise OutOfTime
        self.lanes.prepare(arms)
        if (seconds := time.monotonic() - start) > 1:
            self._say(f"compiled {', '.join(arms)} in {seconds:.0f} s")

    def run(self, trials: Sequence[Trial], *, curves: bool = False) -> list[Row]:
        """The rows of trials, in their order; trains those that have none.

        Args:
          curves: whether their rows keep the ledger's curves.

        Raises:
          OutOfTime: the limit would be passed; what was finished is kept.
        """
        different = {self.ledger.key(trial): trial for trial in trials}
        missing = [trial for trial in different.values() if trial not in self.ledger]
        while missing:
            kind = missing[0].arm, missing[0].evaluations
            alike = [trial for trial in missing if (trial.arm, trial.evaluations) == kind]
            batch = alike[: self.lanes.count]
            self._batch(batch, curves)
            missing = [trial for trial in missing if trial not in self.ledger]
        return [self.ledger[trial] for trial in trials]

    def _batch(self, trials: Sequence[Trial], curves: bool) -> None:
        length = trials[0].evaluations
        if self._end is not None and time.monotonic() + self._longest * length > self._end:
            raise OutOfTime
        outcomes = self.lanes.run(trials)
        seconds = outcomes[0].seconds
        self._longest = max(self._longest, seconds / length)
        rows = [
            Row(
                trial,
                self._final(outcome.measured),
                {
                    name: outcome.measured[name] if curves else np.array([])
                    for name in self.ledger.curves
                },
                seconds,
                self.lanes.count,
                machine(),
                versions(),
            )
            for trial, outcome in zip(trials, outcomes, strict=True)
        ]
        self.ledger.add(rows)
        name = self.ledger.metrics[0]
        found = [row.final[name] for row in rows]
        self._say(
            f"{trials[0].arm}: {len(trials)} trials in {seconds:.1f} s,"
            f" {name} {min(found):.4f} to {max(found):.4f}"
        )

    def _final(self, measured: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {
            name: float(at.mean() if name in self._averaged else at[-1])
            for name, at in measured.items()
        }
