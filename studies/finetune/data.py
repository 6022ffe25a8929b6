"""What bases are trained on, what is fine-tuned on, and what is asked."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from examples.conversations import (
    Conversation,
    Omissions,
    fitted,
    read_conversations,
    tokenized,
)
from examples.corpus import load_corpus
from examples.errors import BadInput
from examples.packing import padded
from examples.tokens import Bytes
from examples.word_problems import Problem
from studies.finetune.problems import draw, held_out, known
from studies.training import Data

TOKENS = Bytes()


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
    asked = {problem.question for problem in [*mine[sizes.train :], *others]}
    told = draw((*known(), *held_out()), sizes.prose, generator)
    prose = "\n".join(problem.prose for problem in told if problem.question not in asked)
    return Problems(
        _conversations(mine[: sizes.train], sizes),
        _conversations(mine[sizes.train :], sizes),
        _conversations(others, sizes),
        prose.encode(),
    )


def read(train: Path, test: Path, sizes: Sizes) -> Problems:
    """From JSONL files as GSM8K's: every tenth row of `train` is asked, all of `test` is held out.

    The bases read the questions and answers of what is trained on as prose, from the same file.

    Raises:
      BadInput: a file without rows that fit.
    """
    rows, _ = read_conversations(train, TOKENS, context=sizes.context)
    others, _ = read_conversations(test, TOKENS, context=sizes.context)
    asked = rows[::10][: sizes.asked]
    taught = [row for number, row in enumerate(rows) if number % 10]
    if not asked or not taught:
        raise BadInput(f"{train}: {len(rows)} rows are too few to train on and to ask.")
    told = [json.loads(line) for line in train.read_text().splitlines() if line.strip()]
    lines = [f"{row['question']} {row['answer']}" for n, row in enumerate(told) if n % 10]
    return Problems(taught, asked, others[: sizes.asked], "\n".join(lines).encode())


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


def _conversations(problems: Sequence[Problem], sizes: Sizes) -> list[Conversation]:
    omissions = Omissions()
    each = (
        tokenized([("user", problem.question), ("assistant", problem.answer)], TOKENS)
        for problem in problems
    )
    kept = [fitted(conversation, sizes.context + 1, omissions) for conversation in each]
    return [conversation for conversation in kept if conversation is not None]


def _rows(conversations: Sequence[Conversation], sizes: Sizes):
    rows = [padded(each, sizes.context + 1, end=TOKENS.end) for each in conversations]
    tokens, weights = (np.stack(column).astype(np.uint8) for column in zip(*rows, strict=True))
    return jnp.asarray(tokens), jnp.asarray(weights)
