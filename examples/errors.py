"""What a caller can put right: it is printed as one line, where other errors show their trace."""

import contextlib
import sys
from collections.abc import Iterator


class BadInput(ValueError):
    """A setting, a file or a row that cannot be trained with; the message names it and the remedy."""


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends a command with status 2 and one line on stderr where its work raises `BadInput`."""
    try:
        yield
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
