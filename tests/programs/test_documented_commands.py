"""The commands that pages, docstrings and comments tell to type: the programs' own parsers take them."""

import contextlib
import functools
import inspect
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import tyro

ROOT = Path(__file__).parents[2]
PROGRAMS = ("benchmarks", "examples", "parity_tests", "studies", "tests")
LIBRARIES = ("normuon_core", "optax_normuon", "torch_ref")
TEXTS = [
    *ROOT.glob("*.md"),
    *(
        path
        for folder in ("docs", *PROGRAMS[:-1], *LIBRARIES)
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".py", ".toml")
    ),
]

Command = tuple[str, ...]
"""A module, and what it is told."""

COMMAND = re.compile(
    rf"(?<!\")(?:python|torchrun [^`\n]*) -m ((?:{'|'.join(PROGRAMS)})\b[a-z_.]*)([^`\n|;&]*)"
)
MAKE = re.compile(r"make ([a-z-]+) ARGS=(?:\"([^\"\n]*)\"|([^`\s]+))")
TARGETS = dict(
    re.findall(
        r"^([a-z-]+):.*\n\t\$\(VENV\)/bin/(python -m .*) \$\(ARGS\)$",
        (ROOT / "Makefile").read_text(),
        re.MULTILINE,
    )
)
"""What a target of the Makefile runs with the user's ARGS."""

TRACE = "parity_tests/golden/torch_muon__a__match_rms_adamw.npz"
STANDS_FOR = {
    **dict.fromkeys(("A", "B", "TRACE"), TRACE),
    **dict.fromkeys(("$i", "SEED"), "0"),
    **dict.fromkeys(("NAME", "{study}"), "parts"),
    "$o": "muon",
    "COMMAND": "pretrain",
}
"""A value for each placeholder that a parser would refuse."""


def commands_of(text: str) -> set[Command]:
    """The commands of a text that run one of our programs, those of `make TARGET ARGS=...` too."""
    text = MAKE.sub(lambda made: f"{TARGETS.get(made[1], '')} {made[2] or made[3]}", text)
    found = set()
    for module, rest in COMMAND.findall(text):
        told = shlex.split(rest.replace("...", ""), comments=True)
        found.add((module, *(STANDS_FOR.get(word, word) for word in told)))
    return found


COMMANDS = sorted(set.union(*(commands_of(path.read_text()) for path in TEXTS)))
WITHOUT_OPTIONS = {"tests.model_trees", "tests.model_trees.record"}
"""Programs that parse nothing, and would run."""


class Parsed(Exception):
    """Raised where a program would begin its work."""


def parse_only(cli):
    """A `cli` of tyro's that raises `Parsed` where it would return; a function is not called either."""

    @functools.wraps(cli)
    def parsed(kind: Any, **told):
        if inspect.isfunction(kind):
            kind = functools.wraps(kind)(lambda **_: None)
        cli(kind, **told)
        raise Parsed

    return parsed


def begin(context: typer.Context, *_, **__) -> None:
    """In place of typer's call of a function; one that stands before a subcommand's is passed over."""
    if context.invoked_subcommand is None:
        raise Parsed


def refusal(command: Command) -> str | None:
    """What a program says to what it is told and does not take. Told nothing, it is asked for help."""
    module, *told = command
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [module, *(told or ["--help"])])
        for place, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
            patch.setattr(place, name, parse_only(getattr(place, name)))
        patch.setattr(typer.core.TyperCommand.context_class, "invoke", begin)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                runpy.run_module(module, run_name="__main__", alter_sys=False)
        except Parsed:
            return None
        except SystemExit as ended:
            return said.getvalue() if ended.code else None
    raise AssertionError(f"{module} ran")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", sorted({module for module, *_ in COMMANDS} - WITHOUT_OPTIONS))
def test_the_commands_that_users_are_told_to_type_are_taken(module):
    refused = {command: refusal(command) for command in COMMANDS if command[0] == module}
    assert {command: said for command, said in refused.items() if said is not None} == {}


def test_programs_that_take_no_options_are_given_none():
    assert not any(told for module, *told in COMMANDS if module in WITHOUT_OPTIONS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("examples compare --tune", "Missing value for argument '--tune'"),
        ("examples pretrain --none 1", "Unrecognized options"),
        ("examples pretrain --steps 0", "steps=0 is below 1"),
        ("examples.sweep --factors 1 sft", "required"),
        ("examples.word_problems --folder", "Missing value"),
        ("studies parts --small True", "Unrecognized options"),
        ("parity_tests identify none.npz", "does not exist"),
        ("parity_tests.accuracy --none", "No such option"),
    ],
)
def test_a_command_that_its_program_does_not_take_is_found(command, said):
    assert said in (refusal(tuple(command.split())) or "")


def test_the_parts_of_a_command_are_read():
    text = (
        "`python -m examples.sweep --factors 1 4 dpo RUN --steps=60` `python -m benchmarks`\n"
        '`make demo ARGS="--tune True"`, `make parity ARGS=--help`, make test ARGS="-k polar"\n'
        "torchrun --nproc-per-node 2 -m examples.torch_pretrain --data FILE  # in PyTorch\n"
        "for i in 0 1; do python -m examples plot RUN RUN ... --process $i & done; wait\n"
    )
    assert commands_of(text) == {
        ("examples.sweep", "--factors", "1", "4", "dpo", "RUN", "--steps=60"),
        ("benchmarks",),
        ("examples", "compare", "--tune", "True"),
        ("parity_tests", "--help"),
        ("examples.torch_pretrain", "--data", "FILE"),
        ("examples", "plot", "RUN", "RUN", "--process", "0"),
    }
