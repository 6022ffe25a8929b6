"""Conversations side by side in windows of one size, which attention keeps apart."""

from collections.abc import Iterator, Sequence

import numpy as np

from examples.conversations import Conversation

Row = dict[str, np.ndarray]


def pack(conversations: Sequence[Conversation], size: int, *, end: int) -> list[Row]:
    """Windows of as many conversations as fit, in their order.

    Args:
      size: of a window, no smaller than any conversation. end: the id that fills what is left.

    Returns:
      Rows of `tokens`, `weights` and `segments`, each (size,): segments count the conversations of a
      window from 1, and are 0 where nothing is.
    """
    return [_window(members, size, end) for members in _groups(conversations, size)]


def padded(conversation: Conversation, size: int, *, end: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `weights`, each (size,): what is left is filled with ends of no weight."""
    window = _window([conversation], size, end)
    return window["tokens"], window["weights"]


def _groups(conversations: Sequence[Conversation], size: int) -> Iterator[list[Conversation]]:
    members, used = [], 0
    for conversation in conversations:
        if members and used + len(conversation.ids) > size:
            yield members
            members, used = [], 0
        members.append(conversation)
        used += len(conversation.ids)
    if members:
        yield members


def _window(members: Sequence[Conversation], size: int, end: int) -> Row:
    tokens = np.full(size, end, np.int32)
    weights, segments = np.zeros(size, np.uint8), np.zeros(size, np.int32)
    start = 0
    for number, member in enumerate(members, start=1):
        place = slice(start, start + len(member.ids))
        tokens[place], weights[place], segments[place] = member.ids, member.weights, number
        start = place.stop
    return {"tokens": tokens, "weights": weights, "segments": segments}
