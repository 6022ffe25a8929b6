"""Word problems of school arithmetic, made here: `python -m examples.word_problems --folder FOLDER`.

They stand in for GSM8K where nothing can be downloaded, in its format: a worked answer ends in a line
`#### 42`. The folder gets `text/` to pretrain on (problems told as prose), `sft.jsonl` to fine-tune on,
`pairs.jsonl` of right answers and wrong ones, and `held_out.jsonl`, whose questions no other file has.
"""

import dataclasses
import json
import random
from pathlib import Path

import tyro

from examples.errors import BadInput, one_line

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Kim", "Leo", "Mia", "Noa")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "cards")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`working` leads to `result`."""

    question: str
    working: str
    result: int

    @property
    def answer(self) -> str:
        return f"{self.working}\n#### {self.result}"

    @property
    def prose(self) -> str:
        """As a text that knows of no question and no format."""
        return f"{self.question} {self.working} So it is {self.result}."


def draw_problem(generator: random.Random) -> Problem:
    """One of the kinds below, with names and numbers of its own."""
    return generator.choice((_bought, _given_away, _packed))(generator)


def spoiled(problem: Problem, generator: random.Random) -> str:
    """A wrong answer: the right working without the line that is asked for, or another result in it."""
    if generator.random() < 0.5:
        return f"{problem.working} So it is {problem.result}."
    other = problem.result + generator.choice((-10, -2, -1, 1, 2, 10))
    return f"{problem.working}\n#### {other}"


def write_problems(folder: Path, *, count: int = 4000, held_out: int = 40, seed: int = 0) -> None:
    """Writes the four sets.

    Args:
      count: problems to train on; a third more are told as prose.
      held_out: problems that no other file has.

    Raises:
      BadInput: there is something in the folder already.
    """
    text = folder / "text"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: give a new folder.")
    text.mkdir()
    generator = random.Random(seed)
    kept = {draw.question: draw for draw in (draw_problem(generator) for _ in range(held_out))}

    def fresh() -> Problem:
        while (drawn := draw_problem(generator)).question in kept:
            pass
        return drawn

    for number in range(100):
        told = "\n".join(fresh().prose for _ in range(4 * count // 300))
        (text / f"{number:03}.txt").write_text(told + "\n")
    _write(folder / "sft.jsonl", [_row(fresh()) for _ in range(count)])
    _write(folder / "held_out.jsonl", [_row(problem) for problem in kept.values()])
    pairs = []
    for problem in (fresh() for _ in range(count // 2)):
        wrong = spoiled(problem, generator)
        pairs.append({"prompt": problem.question, "chosen": problem.answer, "rejected": wrong})
    _write(folder / "pairs.jsonl", pairs)


def _row(problem: Problem) -> dict[str, str]:
    return {"question": problem.question, "answer": problem.answer}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _bought(generator: random.Random) -> Problem:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    had, more = generator.randint(2, 30), generator.randint(2, 20)
    return Problem(
        f"{name} has {had} {thing} and buys {more} more. How many {thing} does {name} have?",
        f"{had} + {more} = {had + more}.",
        had + more,
    )


def _given_away(generator: random.Random) -> Problem:
    name, other = generator.sample(NAMES, 2)
    thing, gone = generator.choice(THINGS), generator.randint(2, 15)
    had = gone + generator.randint(1, 20)
    return Problem(
        f"{name} has {had} {thing} and gives {gone} to {other}. How many {thing} are left?",
        f"{had} - {gone} = {had - gone}.",
        had - gone,
    )


def _packed(generator: random.Random) -> Problem:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    boxes, each = generator.randint(2, 9), generator.randint(2, 9)
    return Problem(
        f"{name} has {boxes} boxes with {each} {thing} in each. How many {thing} are there?",
        f"{boxes} * {each} = {boxes * each}.",
        boxes * each,
    )


if __name__ == "__main__":
    with one_line():
        tyro.cli(write_problems)
