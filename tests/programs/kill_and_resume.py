"""Kills a run at twenty random steps: `python -m tests.programs.kill_and_resume`."""

import sys
import tempfile
from pathlib import Path

from tests.programs.test_examples_resume import kill_and_resume

TIMES = 20


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = kill_and_resume(Path(folder), TIMES)
    equal = sum(one == other for one, other in zip(alone, killed, strict=False))
    print(f"killed {TIMES} times: {equal} of {len(alone)} lines of the log are equal in every bit")
    return int(killed != alone)


if __name__ == "__main__":
    sys.exit(main())
