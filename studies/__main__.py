"""`python -m studies NAME`: `--help` after the name."""

from collections.abc import Sequence
from typing import Any

import tyro

from examples.errors import one_line
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
    """Runs one study."""
    tyro.extras.subcommand_cli_from_dict(
        STUDIES,
        prog="python -m studies",
        description="Experiments with tuned arms, paired seeds and intervals.",
        args=arguments,
    ).run()


if __name__ == "__main__":
    with one_line():
        main()
