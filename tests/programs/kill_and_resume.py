"""Kills a run at twenty random steps: `python -m tests.programs.kill_and_resume`."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import tyro

from tests.programs.test_examples_resume import (
    FUSED,
    TOLD,
    killed_and_resumed,
    logged,
    undisturbed,
)


def main(times: int = 20, fused: bool = False) -> int:
    """Compares the log of a run that is killed with that of one which is left in peace.

    Args:
      times: that it is killed.
      fused: in bfloat16, with cuDNN's attention where it can be had.
    """
    model = dataclasses.replace(TOLD.model, **(FUSED if fused else {}))
    with tempfile.TemporaryDirectory() as folder:
        alone = logged(undisturbed(Path(folder, "alone"), model))
        killed = logged(killed_and_resumed(Path(folder, "killed"), times, model=model))
    equal = sum(one == other for one, other in zip(alone, killed, strict=False))
    print(f"killed {times} times: {equal} of {len(alone)} lines of the log are equal in every bit")
    return int(killed != alone)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
