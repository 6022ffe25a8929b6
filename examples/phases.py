"""From nothing to a model that answers: pretraining, fine-tuning, preference tuning, in five minutes.

`python -m examples.phases` makes word problems, trains the three phases on two CPU cores, and asks the
model of each phase what none was trained on.
"""

import dataclasses
import json
import re
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from examples.conversations import prompt_ids
from examples.dpo import Dpo
from examples.errors import one_line
from examples.gpt import GPTConfig
from examples.launch import launch
from examples.pretrain import Pretrain
from examples.runs import new_folder
from examples.sampling import generate
from examples.settings import Training
from examples.sft import Sft
from examples.trained import load_trained
from examples.word_problems import write_problems

CONTEXT = 128
SHOWN = 3  # answers of each phase


@dataclasses.dataclass(frozen=True)
class Phases:
    """Train a small model through all phases."""

    output: Path | None = None
    """Folder of data and runs, which must be new. None is the next free one of examples/out."""
    pretrain_steps: int = 800
    sft_steps: int = 500
    dpo_steps: int = 60


@dataclasses.dataclass(frozen=True)
class Score:
    """Of the answers to the held-out questions.

    Attributes:
      formatted: the share whose last line is `#### number`.
      right: the share where the number is right too.
    """

    formatted: float
    right: float


def train_phases(config: Phases, console: Console) -> dict[str, Score]:
    """Trains, asks and prints; returns the scores by phase."""
    folder = new_folder(config.output, "phases")
    data = folder / "problems"
    write_problems(data)
    shared = Training(batch=16, log_every=20, evaluate_every=100, evaluation_batches=8, samples=0)
    base = Pretrain(
        data=data / "text",
        model=GPTConfig(context=CONTEXT),
        training=dataclasses.replace(shared, steps=config.pretrain_steps),
        output=folder / "pretrain",
    )
    sft = Sft(
        base.output or folder,
        data / "sft.jsonl",
        training=dataclasses.replace(shared, steps=config.sft_steps),
        output=folder / "sft",
    )
    dpo = Dpo(
        sft.output or folder,
        data / "pairs.jsonl",
        training=dataclasses.replace(shared, steps=config.dpo_steps),
        output=folder / "dpo",
    )
    scores = {}
    for phase in (base, sft, dpo):
        run = launch(phase, console=console)
        scores[phase.phase] = ask(run, data / "held_out.jsonl", console)
    console.print(_table(scores))
    return scores


def ask(run: Path, questions: Path, console: Console) -> Score:
    """Has a run's model answer every question of a file, and prints some answers."""
    trained = load_trained(run)
    tokens = trained.tokens
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    prompts = [prompt_ids([("user", row["question"])], tokens) for row in rows]
    written = generate(
        trained.model, trained.params, prompts, count=40, end=tokens.end, temperature=0.0, seed=0
    )
    answers = [tokens.decode(ids) for ids in written]
    for row, answer in list(zip(rows, answers, strict=True))[:SHOWN]:
        text = f"\n{row['question']}\n  {trained.phase}: {answer}"
        console.print(text, markup=False, highlight=False)
    pairs = list(zip((row["answer"] for row in rows), answers, strict=True))
    formatted = [re.search(r"\n#### -?\d+$", answer) is not None for _, answer in pairs]
    right = [answer.rpartition("\n")[2] == true.rpartition("\n")[2] for true, answer in pairs]
    return Score(sum(formatted) / len(pairs), sum(right) / len(pairs))


def _table(scores: dict[str, Score]) -> Table:
    table = Table(title="Answers to held-out questions")
    for heading in ("phase", "end in #### number", "and the number is right"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase, score in scores.items():
        table.add_row(phase, f"{score.formatted:.0%}", f"{score.right:.0%}")
    return table


if __name__ == "__main__":
    with one_line():
        train_phases(tyro.cli(Phases), Console())
