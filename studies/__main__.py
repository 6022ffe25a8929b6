"""`python -m studies parts`: `--help` after each study's name."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from examples.errors import one_line
from studies.parts import Parts

STUDIES: dict[str, Any] = {"parts": Parts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one study."""
    union: Any = None
    for name, kind in STUDIES.items():
        command = Annotated[kind, tyro.conf.subcommand(name)]
        union = command if union is None else union | command
    study = tyro.cli(
        union,
        prog="python -m studies",
        description="Compare optimizers: tuned arms, paired seeds, intervals.",
        args=list(sys.argv[1:] if arguments is None else arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    with one_line():
        study.run()


if __name__ == "__main__":
    main()
