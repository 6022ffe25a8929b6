"""Kills a run at twenty random steps: `python -m tests.programs.kill_and_resume`."""

import sys
import tempfile
from pathlib import Path

from tests.programs.test_examples_resume import killed_and_resumed, logged, undisturbed

TIMES = 20


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        alone = logged(undisturbed(Path(folder, "alone")))
        killed = logged(killed_and_resumed(Path(folder, "killed"), TIMES))
    equal = sum(one == other for one, other in zip(alone, killed, strict=False))
    print(f"killed {TIMES} times: {equal} of {len(alone)} lines of the log are equal in every bit")
    return int(killed != alone)


if __name__ == "__main__":
    sys.exit(main())
