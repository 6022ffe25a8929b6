"""Pairs of answers, the first preferred to the second.

A row is MiniMind's, `{"chosen": [messages], "rejected": [messages]}`, or has the two answers as texts
beside their question, `{"prompt": ..., "chosen": ..., "rejected": ...}`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from examples.conversations import Message, Omissions, fitted, read_messages, read_text, tokenized
from examples.errors import BadInput
from examples.jsonl import BadRow, read_rows
from examples.packing import Row, padded
from examples.tokens import Tokens

SIDES = ("chosen", "rejected")
EQUAL = "left out: both answers are equal (within the context), and prefer nothing"


@dataclasses.dataclass(frozen=True)
class Pair:
    """`row` has `tokens` and `weights`, each (2, context + 1), chosen before rejected; `prompt` are the
    ids before the chosen answer."""

    row: Row
    prompt: list[int]


def read_pairs(path: Path, tokens: Tokens, *, context: int) -> tuple[list[Pair], Omissions]:
    """Every pair of a file, and what was left out or cut.

    Raises:
      BadInput: no such file or rows, a row of another form (`BadRow` names its line), or no pair fits.
    """
    pairs, omissions = [], Omissions()
    for number, row in read_rows(path):
        sides = [_messages(row, side, path, number) for side in SIDES]
        if sides[0][:-1] != sides[1][:-1]:
            raise BadRow(path, number, "two questions", "one, with `chosen` and `rejected` answers")
        chosen, rejected = (
            fitted(tokenized(messages, tokens), context + 1, omissions) for messages in sides
        )
        if chosen is None or rejected is None:
            continue
        if np.array_equal(chosen.ids, rejected.ids):
            omissions[EQUAL] += 1
            continue
        windows = [padded(side, context + 1, end=tokens.end) for side in (chosen, rejected)]
        ids, weights = zip(*windows, strict=True)
        pair = {"tokens": np.stack(ids), "weights": np.stack(weights)}
        pairs.append(Pair(pair, chosen.prompt))
    if not pairs:
        said = "; ".join(omissions.lines())
        raise BadInput(f"{path}: no pair is left for a context of {context} tokens. {said}.")
    return pairs, omissions


def _messages(row: dict[str, Any], side: str, path: Path, line: int) -> list[Message]:
    missing = [name for name in SIDES if name not in row]
    if missing:
        raise BadRow(path, line, f"no {' and no '.join(missing)}", "`chosen` and `rejected`")
    if not isinstance(row[side], str):
        return read_messages(row[side], path, line, side)
    return [
        ("user", read_text(row.get("prompt"), path, line, "prompt")),
        ("assistant", read_text(row[side], path, line, side)),
    ]
