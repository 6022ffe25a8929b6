"""What bases are trained on, what is fine-tuned on, and what is asked."""

import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from examples.conversations import (
    Conversation,
    Omissions,
    fitted,
    read_text,
    tokenized,
)
from examples.corpus import load_corpus
from examples.errors import BadInput
from examples.jsonl import BadRow, read_rows, shown
from examples.packing import padded
from examples.tokens import Bytes
from studies.finetune.problems import draw, held_out, known
from studies.training import Data

TOKENS = Bytes()
RESULT_LINE = re.compile(r"^#### -?[0-9.,]+\Z", re.MULTILINE)
"""How the number of an answer stands in its last line."""

QuestionAnswer = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
      context: of the model. prose: problems told as prose for the bases. train: problems to fine-tune
        on. asked: problems of new numbers in known templates, and as many of held-out templates.
      windows: of the old task.
    """

    context: int
    prose: int
    train: int
    asked: int
    windows: int


class Problems(NamedTuple):
    """Conversations to train on, and to ask."""

    train: Sequence[Conversation]
    known: Sequence[Conversation]
    held_out: Sequence[Conversation]
    prose: bytes


def made(sizes: Sizes) -> Problems:
    """From the templates of `problems.py`. Prose tells of all templates, fine-tuning of the known ones.

    A question that is asked is in none of the texts.
    """
    generator = random.Random(0)
    mine = draw(known(), sizes.train + sizes.asked, generator)
    others = draw(held_out(), sizes.asked, generator)
    questions = {problem.question for problem in [*mine[sizes.train :], *others]}
    told = draw((*known(), *held_out()), sizes.prose, generator)
    prose = "\n".join(problem.prose for problem in told if problem.question not in questions)
    taught, known_ones, held_out_ones = (
        _conversations([(problem.question, problem.answer) for problem in each], sizes)
        for each in (mine[: sizes.train], mine[sizes.train :], others)
    )
    return Problems(taught, known_ones, held_out_ones, prose.encode())


def read(train: Path, test: Path, sizes: Sizes) -> Problems:
    """From JSONL files as GSM8K's: of `train` every tenth problem is asked, of `test` all are held out.

    Asked are those that fit into the context, for a result that is cut off cannot be right; longer ones
    to train on are cut. The bases read what is trained on as prose. A question that is asked is in
    none of the texts.

    Raises:
      BadRow: a row that is not a problem. BadInput: too few of them.
    """
    mine, others = _problems(train), _problems(test)
    asked, asked_apart = (
        [problem for problem in problems if _fits(problem, sizes)][: sizes.asked]
        for problems in (mine[::10], others)
    )
    questions = {question for question, _ in (*asked, *asked_apart)}
    told = [problem for problem in mine if problem[0] not in questions]
    prose = "\n".join(" ".join(problem) for problem in told).encode()
    taught = _conversations(told, sizes)
    if not asked or not taught or len(prose) <= sizes.context + 1:
        raise BadInput(
            f"{train}: {len(mine)} problems are too few or too long to train on and to ask:"
            f" {sizes.context} tokens are seen at once."
        )
    if not asked_apart:
        raise BadInput(f"{test}: none of {len(others)} problems fits into {sizes.context} tokens.")
    known_ones, held_out_ones = (_conversations(each, sizes) for each in (asked, asked_apart))
    return Problems(taught, known_ones, held_out_ones, prose)


def on_device(problems: Problems, sizes: Sizes) -> Data:
    """`text`, `prose` (tokens,) uint8; `old` (windows, context + 1) uint8; `train`, `known`, `held_out`,
    each a pair of tokens and weights (rows, context + 1) uint8."""
    corpus = load_corpus()
    old = corpus.validation_windows(count=sizes.windows, context=sizes.context)
    return {
        "text": jnp.asarray(corpus.train.parts[0]),
        "prose": jnp.asarray(np.frombuffer(problems.prose, np.uint8)),
        "old": jnp.asarray(old),
        "train": _rows(problems.train, sizes),
        "known": _rows(problems.known, sizes),
        "held_out": _rows(problems.held_out, sizes),
    }


def _problems(path: Path) -> list[QuestionAnswer]:
    return [_problem(row, path, line) for line, row in read_rows(path)]


def _problem(row: dict[str, Any], path: Path, line: int) -> QuestionAnswer:
    if missing := [key for key in ("question", "answer") if key not in row]:
        raise BadRow(path, line, f"no {' and no '.join(missing)}", "`question` and `answer`")
    question, answer = (
        read_text(row[key], path, line, key).strip() for key in ("question", "answer")
    )
    if not RESULT_LINE.search(answer):
        raise BadRow(path, line, f"answer: {shown(answer)}", "a last line as `#### 42`")
    return question, answer


def _conversation(problem: QuestionAnswer) -> Conversation:
    question, answer = problem
    return tokenized([("user", question), ("assistant", answer)], TOKENS)


def _fits(problem: QuestionAnswer, sizes: Sizes) -> bool:
    return len(_conversation(problem).ids) <= sizes.context + 1


def _conversations(problems: Sequence[QuestionAnswer], sizes: Sizes) -> list[Conversation]:
    omissions = Omissions()
    each = (fitted(_conversation(problem), sizes.context + 1, omissions) for problem in problems)
    return [conversation for conversation in each if conversation is not None]


def _rows(conversations: Sequence[Conversation], sizes: Sizes):
    rows = [padded(each, sizes.context + 1, end=TOKENS.end) for each in conversations]
    tokens, weights = (np.stack(column).astype(np.uint8) for column in zip(*rows, strict=True))
    return jnp.asarray(tokens), jnp.asarray(weights)
