"""What a run logs: a line of JSON for each step and evaluation, and TensorBoard's files if wanted."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Metrics:
    """The log of one run, `metrics.jsonl` in its folder.

    A resumed run goes on behind the step of its checkpoint: later lines, which it will write again, and
    a line that was cut are taken away first.

    Args:
      step: how many updates the run has made already.
      written: False for processes that only take part.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool, written: bool = True):
        self._file, self._board = None, None
        if not written:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= step] if path.exists() else []
        if step == 0:
            kept = []
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(new, path)
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: Line) -> None:
        """A line with its `step`; numbers within `matrices` are lists, one for each matrix of a leaf."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """So that a checkpoint is never ahead of the log."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a log; one that was cut, as a killed process leaves it, is not among them."""
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def _scalars(line: Line):
    for name, value in line.items():
        if name == "matrices":
            for path, numbers in value.items():
                for kind, each in numbers.items():
                    yield f"{kind}/{path}", statistics.fmean(each)
        elif name != "step":
            yield name, value
