"""What a caller can put right: it is printed as one line, where other errors show their trace."""


class BadInput(ValueError):
    """A setting, a file or a row that cannot be trained with; the message names it and the remedy."""
