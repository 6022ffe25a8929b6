"""Text to token ids and back: bytes, or a tokenizer file of Hugging Face's `tokenizers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from examples.errors import BadInput

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Tokens(Protocol):
    """What the data and the samples need of a tokenizer.

    Attributes:
      vocabulary: how many ids there are. end: the id that ends a document or an answer.
    """

    vocabulary: int
    end: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def turn(self, role: Role) -> list[int]:
        """What opens a turn of a conversation."""
        ...


class Bytes:
    """Every byte of the text in UTF-8 is a token.

    Control characters, which no text contains, stand for the end and for the three roles: a conversation
    then needs no larger vocabulary than a text.
    """

    vocabulary = 256
    end = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def turn(self, role: Role) -> list[int]:
        return [1 + ROLES.index(role)]


class TokenizerFile:
    """The `tokenizer.json` of a Hugging Face model.

    The conversation's template is ChatML, MiniMind's and Qwen's: `<|im_start|>role`, a new line, the
    text, `<|im_end|>`. A tokenizer without these tokens has GPT-2's `<|endoftext|>` for the end, and
    roles as plain text.

    Raises:
      BadInput: the file cannot be read, or has no token for an end.
    """

    ENDS = ("<|im_end|>", "<|endoftext|>", "</s>")

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BadInput(f"{path}: no tokenizer to read: {error}.") from error
        ends = [self._tokenizer.token_to_id(token) for token in self.ENDS]
        found = [token for token in ends if token is not None]
        if not found:
            raise BadInput(
                f"{path}: the tokenizer has none of {', '.join(self.ENDS)}, and an answer must end."
            )
        self.end = found[0]
        self.vocabulary = self._tokenizer.get_vocab_size()
        self._chat = self._tokenizer.token_to_id("<|im_start|>") is not None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def turn(self, role: Role) -> list[int]:
        return self.encode(f"<|im_start|>{role}\n" if self._chat else f"{role}: ")


def load_tokens(path: Path | None) -> Tokens:
    """The tokenizer of a file, or bytes."""
    return Bytes() if path is None else TokenizerFile(path)
