"""Rows of a JSON-lines file, and errors that say what is wrong with which line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.errors import BadInput


class BadRow(BadInput):
    """A row that is not what it should be: file, line, what was found, what was expected."""

    def __init__(self, path: Path, line: int, found: str, expected: str):
        super().__init__(f"{path}, line {line}: found {found}, expected {expected}.")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number, from 1, and the object of each line; empty lines are passed over.

    Raises:
      BadRow: a line that is no JSON object; BadInput: the file is missing, empty or no UTF-8.
    """
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file of rows.")
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            count += 1
            try:
                row = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                raise BadRow(path, number, f"{shown(line)} ({error})", "a JSON object") from error
            if not isinstance(row, dict):
                raise BadRow(path, number, shown(line), "a JSON object")
            yield number, row
    if not count:
        raise BadInput(f"{path}: found no rows, expected one JSON object a line.")


def shown(value: Any) -> str:
    """The beginning of a value, for an error."""
    text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
