"""`python -m examples COMMAND`: pretrain, ngpt, sft, dpo, resume, sample, plot or compare."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from examples.compare import Compare, compare
from examples.comparison import result_table
from examples.configuration import take_config
from examples.curves import Plot, plot
from examples.dpo import Dpo
from examples.errors import BadInput
from examples.launch import PHASES, Resume, launch, resume
from examples.pretrain import Pretrain
from examples.pretrain_ngpt import PretrainNGPT
from examples.runs import read_run
from examples.sampling import Sample, sample
from examples.settings import OPTIONS
from examples.sft import Sft


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parsed(arguments)
        _run(command)
    except BadInput as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _parsed(arguments: list[str]) -> Any:
    """The command, its defaults from `--config FILE` if that is given."""
    kinds: dict[str, Any] = {"pretrain": Pretrain, "ngpt": PretrainNGPT, "sft": Sft, "dpo": Dpo}
    defaults = {}
    phase = arguments[0] if arguments else ""
    if phase in kinds and "--config" in {each.partition("=")[0] for each in arguments}:
        defaults[phase] = take_config(arguments, PHASES[phase])
    kinds |= {"resume": Resume, "sample": Sample, "plot": Plot, "compare": Compare}
    commands = []
    for name, kind in kinds.items():
        told = {"default": defaults[name]} if name in defaults else {}
        commands.append(Annotated[kind, tyro.conf.subcommand(name, **told)])
    union: Any = commands[0]
    for each in commands[1:]:
        union = union | each
    return tyro.cli(
        union,
        prog="python -m examples",
        description="Train a small GPT. A phase also takes --config FILE, as each run's folder has it.",
        args=arguments,
        config=OPTIONS,
    )


def _run(command: Any) -> None:
    match command:
        case Resume():
            resume(command, console=_console(command))
        case Sample():
            for text in sample(command):
                print(text)
        case Plot():
            Console().print(result_table([read_run(folder) for folder in command.runs]))
            print(f"Written: {plot(command)}")
        case Compare():
            compare(command)
        case _:
            launch(command, console=_console(command))


def _console(command: Any) -> Console:
    """Of the first process; the others are silent."""
    return Console(quiet=command.devices.process not in (None, 0))


if __name__ == "__main__":
    sys.exit(main())
