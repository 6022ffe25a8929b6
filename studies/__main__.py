"""`python -m studies NAME`: `--help` after the name."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from examples.errors import BadInput, one_line
from studies.finetune import Finetune
from studies.mechanism import Mechanism
from studies.parts import Parts
from studies.sphere import Sphere

STUDIES: dict[str, Any] = {
    "parts": Parts,
    "finetune": Finetune,
    "mechanism": Mechanism,
    "sphere": Sphere,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one study.

    Raises:
      BadInput: no study of that name.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name not in STUDIES:
        raise BadInput(f"python -m studies NAME, with one of {', '.join(STUDIES)}.")
    told = [argument for argument in rest if argument]
    tyro.cli(STUDIES[name], prog=f"python -m studies {name}", args=told).run()


if __name__ == "__main__":
    with one_line():
        main()
