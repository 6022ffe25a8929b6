"""Text to pretrain on: by default the source files of the running Python's standard library.

Which documents are held out follows from a hash of each one's name, so the choice never changes, and a
document is never in both halves.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.errors import BadInput
from examples.shards import read_shards
from examples.stream import Stream
from examples.tokens import Bytes, Tokens

HELD_OUT = 0.1  # fraction of the names
BLOCK = 1 << 16  # a corpus of one file is split into blocks of this many bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two streams of token ids, each a run of whole documents with an end after each."""

    description: str
    train: Stream
    validation: Stream

    def batch(self, step: int, *, seed: int, batch: int, context: int) -> np.ndarray:
        """(batch, context + 1) at random places, which depend on seed and step alone.

        So a run that is resumed needs nothing but its step to go on with the same data.
        """
        generator = np.random.default_rng([seed, step])
        return self.train.random_windows(generator, batch, context + 1)

    def validation_windows(self, *, count: int, context: int) -> np.ndarray:
        """(count, context + 1), evenly spread over the held-out documents."""
        return self.validation.spread_windows(count, context + 1)


def load_corpus(
    path: Path | None = None, tokens: Tokens | None = None, *, vocabulary: int | None = None
) -> Corpus:
    """The text under `path` as token ids.

    Args:
      path: a folder of text files, one text file (split in blocks), one Parquet file or a folder of them
        (column `text`, a document a row), or FineWeb's shards of ids (`.bin`); None is Python's standard
        library.
      tokens: None is bytes. Shards are ids already.
      vocabulary: the model's, which every id of a shard must be below; None is that of `tokens`.

    Raises:
      BadInput: nothing to read, nothing to train on or nothing to hold out, or a malformed file.
    """
    tokens = tokens or Bytes()
    if path is None:
        description = f"standard library of Python {platform.python_version()}"
        return _corpus(description, _standard_library(), tokens)
    if not path.exists():
        raise BadInput(f"{path}: there is no such file or folder to train on.")
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if shards := [file for file in files if file.suffix == ".bin" and file.is_file()]:
        train, validation = read_shards(shards, vocabulary or tokens.vocabulary)
        return Corpus(path.name, train, validation)
    if tables := [file for file in files if file.suffix == ".parquet"]:
        return _corpus(path.name, _rows(tables), tokens)
    return _corpus(path.name, _blocks(path) if path.is_file() else _files(path, "*"), tokens)


def is_held_out(name: str) -> bool:
    """Whether the document of that name, relative to the corpus, with forward slashes, is held out."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def unigram_entropy(stream: Stream) -> float:
    """Nats a token of the best model that ignores context: what any use of context must beat."""
    size = 1 + max(int(part.max()) for part in stream.parts)
    count = np.sum([np.bincount(part, minlength=size) for part in stream.parts], axis=0)
    frequency = count[count > 0] / len(stream)
    return float(-(frequency * np.log(frequency)).sum())


def _corpus(description: str, documents: Iterator[tuple[str, bytes]], tokens: Tokens) -> Corpus:
    dtype = np.min_scalar_type(tokens.vocabulary - 1)
    train, validation = [], []
    for name, content in documents:
        half = validation if is_held_out(name) else train
        half.append(np.append(_ids(content, tokens, name), tokens.end).astype(dtype))
    if not train or not validation:
        raise BadInput(
            f"the corpus {description} has {len(train)} documents to train on and {len(validation)} to"
            f" hold out: give a folder of many files, or a file well above {BLOCK // 1024} KiB."
        )
    return Corpus(
        description, Stream([np.concatenate(train)]), Stream([np.concatenate(validation)])
    )


def _ids(content: bytes, tokens: Tokens, name: str):
    if isinstance(tokens, Bytes):
        return np.frombuffer(content, np.uint8)
    try:
        return tokens.encode(content.decode())
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{name}: byte {error.start} is no UTF-8, which a tokenizer needs; leave the file out or"
            " train on bytes."
        ) from error


def _standard_library() -> Iterator[tuple[str, bytes]]:
    installed = {"site-packages", "dist-packages"}
    for name, content in _files(Path(sysconfig.get_path("stdlib")), "*.py"):
        if installed.isdisjoint(name.split("/")):
            yield name, content


def _files(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, in order of names, but for what is hidden and `__pycache__`."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob(pattern)}
    for name in sorted(found):
        left_out = any(part.startswith((".", "__pycache__")) for part in name.split("/"))
        if not left_out and found[name].is_file():
            yield name, found[name].read_bytes()


def _blocks(path: Path) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    for start in range(0, len(content), BLOCK):
        yield f"{path.name}:{start}", content[start : start + BLOCK]


def _rows(tables: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Each row of a column `text`."""
    import pyarrow
    import pyarrow.parquet

    for table in tables:
        try:
            file = pyarrow.parquet.ParquetFile(table)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise BadInput(f"{table}: no Parquet file: {error}") from error
        if "text" not in file.schema_arrow.names:
            raise BadInput(
                f"{table}: found the columns {', '.join(file.schema_arrow.names)}, expected `text`."
            )
        rows = (row for batch in file.iter_batches(columns=["text"]) for row in batch.column(0))
        for number, row in enumerate(rows):
            text = row.as_py()
            if not isinstance(text, str):
                raise BadInput(f"{table}: row {number}: found {text!r} in `text`, expected text.")
            yield f"{table.name}:{number}", text.encode()
