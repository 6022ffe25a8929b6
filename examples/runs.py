"""The folder of a run: what it was told, what it found, its checkpoints; never another run's."""

import dataclasses
import itertools
import statistics
import tomllib
from pathlib import Path
from typing import Any

from examples.errors import BadInput
from examples.metrics import Line, read_lines

OUT = Path(__file__).parent / "out"


def new_folder(output: Path | None, phase: str) -> Path:
    """Makes the folder of a run: `output`, or the next free `examples/out/<phase>-<number>`.

    Raises:
      BadInput: there is something in `output` already.
    """
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise BadInput(
                f"{output} is not empty: `python -m examples resume {output}` goes on with a run, and"
                " another run takes another folder."
            )
        return output
    for number in itertools.count(1):
        folder = OUT / f"{phase}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Losses after `step` updates; `seconds` of training until then, without compilation, evaluation and
    checkpoints. `train_loss` is the mean since the evaluation before, None at step 0."""

    step: int
    train_loss: float | None
    validation_loss: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's log says.

    Attributes:
      name: of its folder.
      settings: its configuration, as in `config.toml`.
    """

    name: str
    settings: dict[str, Any]
    lines: tuple[Line, ...]

    @property
    def optimizer(self) -> str:
        """Its name, and the dtype of the momentum where that is not float32."""
        told = self.settings["optimizer"]
        dtype = told.get("momentum_dtype", "float32")
        return told["optimizer"] + ("" if dtype == "float32" else f"-{dtype}")

    @property
    def seed(self) -> int:
        return self.settings["training"]["seed"]

    @property
    def losses(self) -> dict[int, float]:
        """By step the loss of the batch that the step was made from."""
        return {line["step"]: line["loss"] for line in self.lines if "loss" in line}

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        found, since, losses = [], 0, self.losses
        for line in self.lines:
            if "validation_loss" not in line:
                continue
            step = line["step"]
            own = [losses[each] for each in range(since + 1, step + 1) if each in losses]
            train = statistics.fmean(own) if own else None
            found.append(Evaluation(step, train, line["validation_loss"], line["seconds"]))
            since = step
        return tuple(found)

    @property
    def final_loss(self) -> float:
        """The validation loss at the end of the decay, the only place to judge an optimizer at."""
        return self.evaluations[-1].validation_loss

    @property
    def step_seconds(self) -> float:
        last = self.evaluations[-1]
        return last.seconds / max(1, last.step)


def read_run(folder: Path) -> Run:
    """A run by its folder.

    Raises:
      BadInput: the folder has no run, or one without an evaluation.
    """
    try:
        settings = tomllib.loads((folder / "config.toml").read_text())
        lines = read_lines(folder / "metrics.jsonl")
    except FileNotFoundError as error:
        raise BadInput(
            f"{folder} is no run's folder: it lacks {Path(error.filename).name}."
        ) from error
    run = Run(folder.name, settings, tuple(lines))
    if not run.evaluations:
        raise BadInput(f"{folder}: the run was never evaluated; there is nothing to show yet.")
    return run
