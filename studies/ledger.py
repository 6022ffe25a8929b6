"""The rows of a study: one CSV file to which every finished trial is added, and which a rerun reads."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from studies.trial import Trial, written


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished trial.

    Attributes:
      final: what the last evaluation measured. curves: what each evaluation did, or empty arrays.
      seconds: of the lanes that it ran in, all together. lanes: how many there were.
      machine, versions: where it ran.
    """

    trial: Trial
    final: Mapping[str, float]
    curves: Mapping[str, np.ndarray]
    seconds: float
    lanes: int
    machine: str
    versions: str


class Ledger:
    """Rows of one setup; those of other setups in the same file are left alone.

    Args:
      setup: model, data and length, in words: what a trial's arm, values and seed do not say.
      names: of the values of a trial. metrics: what an evaluation measures. curves: those of them whose
        curves are kept, where a trial is asked for with them.
      every: steps between two evaluations.
    """

    def __init__(
        self,
        path: Path,
        *,
        setup: str,
        names: Sequence[str],
        metrics: Sequence[str],
        curves: Sequence[str],
        every: int,
    ):
        self._path, self._setup = path, setup
        self.metrics, self.curves, self.every = tuple(metrics), tuple(curves), every
        self._names = tuple(names)
        self._columns = ["setup", "arm", *names, "seed", "steps", *metrics]
        self._columns += [f"{name} curve" for name in curves]
        self._columns += ["seconds", "lanes", "machine", "versions"]
        self._rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with path.open(newline="") as file:
                self._rows = {
                    self.key(row.trial): row
                    for line in csv.DictReader(file)
                    if line["setup"] == setup
                    for row in [self._read(line)]
                }

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, trial: Trial) -> bool:
        return self.key(trial) in self._rows

    def __getitem__(self, trial: Trial) -> Row:
        return self._rows[self.key(trial)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps rows, on disk first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            lines = [self._write(row) for row in rows]
            writer.writerows(lines)
        # As a rerun will read them: what follows from a row does not depend on who trained it.
        kept = map(self._read, lines)
        self._rows |= {self.key(row.trial): row for row in kept}

    def key(self, trial: Trial) -> tuple[str, ...]:
        """What tells trials of this setup apart."""
        numbers = [written(trial.value(name)) for name in self._names]
        return (trial.arm, *numbers, str(trial.seed), str(trial.evaluations))

    def _write(self, row: Row) -> dict[str, str]:
        trial = row.trial
        return {
            "setup": self._setup,
            "arm": trial.arm,
            **{name: written(trial.value(name)) for name in self._names},
            "seed": str(trial.seed),
            "steps": str(trial.evaluations * self.every),
            **{name: f"{row.final[name]:.7g}" for name in self.metrics},
            **{
                f"{name} curve": " ".join(f"{value:.6g}" for value in row.curves[name])
                for name in self.curves
            },
            "seconds": f"{row.seconds:.2f}",
            "lanes": str(row.lanes),
            "machine": row.machine,
            "versions": row.versions,
        }

    def _read(self, line: Mapping[str, str]) -> Row:
        values = {name: float(line[name]) for name in self._names}
        evaluations = int(line["steps"]) // self.every
        return Row(
            Trial(line["arm"], values, int(line["seed"]), evaluations),
            {name: float(line[name]) for name in self.metrics},
            {name: np.array(line[f"{name} curve"].split(), np.float64) for name in self.curves},
            float(line["seconds"]),
            int(line["lanes"]),
            line["machine"],
            line["versions"],
        )
