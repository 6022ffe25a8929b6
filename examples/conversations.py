"""Conversations to fine-tune on, as token ids with a weight of one on the answers.

A row is MiniMind's, `{"conversations": [{"role": "user", "content": ...}, ...]}`, or GSM8K's,
`{"question": ..., "answer": ...}`.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.errors import BadInput
from examples.jsonl import BadRow, read_rows, shown
from examples.tokens import ROLES, Role, Tokens

Message = tuple[Role, str]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """`ids` and `weights`, both (tokens,): a weight is 1 on the answers and their ends, else 0."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def prompt(self) -> list[int]:
        """What comes before the first answer."""
        return self.ids[: int(self.weights.argmax())].tolist()


class Omissions(collections.Counter[str]):
    """What does not fit or cannot teach, counted by what became of it."""

    def lines(self) -> list[str]:
        return [f"{count:,} {what}" for what, count in self.items()]


LONG_PROMPT = "left out: the prompt alone fills the context, and no answer is seen"
CUT_ANSWER = "cut: the answer goes on behind the end of the context"


def read_conversations(
    path: Path, tokens: Tokens, *, context: int
) -> tuple[list[Conversation], Omissions]:
    """Every row of a file.

    Args:
      context: of the model; a conversation has one token more, the last one predicted.

    Raises:
      BadInput: no such file, no rows, a row of another form (`BadRow` names its line), or no row fits.
    """
    found, omissions = [], Omissions()
    for number, row in read_rows(path):
        conversation = tokenized(_messages(row, path, number), tokens)
        kept = fitted(conversation, context + 1, omissions)
        if kept is not None:
            found.append(kept)
    if not found:
        raise BadInput(f"{path}: no row fits into a context of {context} tokens; set --context.")
    return found, omissions


def read_messages(value: Any, path: Path, line: int, field: str) -> list[Message]:
    """A list of `{"role", "content"}` that ends in an answer.

    Raises:
      BadRow: it is not that.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(path, line, f"{field}: {shown(value)}", "a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(path, line, f"{field}: {shown(message)}", '{"role": ..., "content": ...}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadRow(
                path, line, f"{field}: the role {shown(role)}", f"one of {', '.join(ROLES)}"
            )
        messages.append((role, read_text(content, path, line, f"{field}: content")))
    if messages[-1][0] != "assistant":
        raise BadRow(path, line, f"{field}: a last turn of {messages[-1][0]}", "one of assistant")
    return messages


def read_text(value: Any, path: Path, line: int, field: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(path, line, f"{field}: {shown(value)}", "text")
    return value


def prompt_ids(messages: Sequence[Message], tokens: Tokens) -> list[int]:
    """The turns so far, and the opening of an answer."""
    return [*tokenized(messages, tokens).ids.tolist(), *tokens.turn("assistant")]


def tokenized(messages: Sequence[Message], tokens: Tokens) -> Conversation:
    """Each turn is its opening, its text and an end."""
    ids: list[int] = []
    weights: list[int] = []
    for role, text in messages:
        opening, content = tokens.turn(role), [*tokens.encode(text), tokens.end]
        ids += [*opening, *content]
        weights += [0] * len(opening) + [int(role == "assistant")] * len(content)
    return Conversation(np.array(ids, np.int32), np.array(weights, np.uint8))


def fitted(conversation: Conversation, size: int, omissions: Omissions) -> Conversation | None:
    """Its first `size` tokens, or None where no answer is among them; both are counted."""
    if len(conversation.ids) <= size:
        return conversation
    cut = Conversation(conversation.ids[:size], conversation.weights[:size])
    if not cut.weights.any():
        omissions[LONG_PROMPT] += 1
        return None
    omissions[CUT_ANSWER] += 1
    return cut


def _messages(row: dict[str, Any], path: Path, line: int) -> list[Message]:
    if "conversations" in row:
        return read_messages(row["conversations"], path, line, "conversations")
    if {"question", "answer"} <= row.keys():
        return [
            ("user", read_text(row["question"], path, line, "question")),
            ("assistant", read_text(row["answer"], path, line, "answer")),
        ]
    keys = ", ".join(row) or "no keys"
    raise BadRow(path, line, keys, "`conversations`, or `question` and `answer`")
