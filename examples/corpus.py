"""Bytes to train on: by default the source files of the running Python's standard library.

Which files are held out follows from a hash of each one's name, so the choice never changes, and a
file is never in both halves.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

END_OF_FILE = b"\0"  # no source file contains it
HELD_OUT = 0.1  # fraction of the names
BLOCK = 1 << 16  # a corpus of one file is split into blocks of this many bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two byte streams, uint8, each a run of whole files with END_OF_FILE after each."""

    description: str
    train: np.ndarray
    validation: np.ndarray

    def train_batches(
        self, *, seed: int, steps: int, batch: int, context: int
    ) -> Iterator[np.ndarray]:
        """`steps` arrays (batch, context + 1) uint8 at random places, the same ones for a seed."""
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            starts = generator.integers(0, len(self.train) - context, size=batch)
            yield _windows(self.train, starts, context)

    def validation_windows(self, *, count: int, context: int) -> np.ndarray:
        """(count, context + 1) uint8, evenly spread over the held-out files."""
        starts = np.linspace(0, len(self.validation) - context - 1, count).astype(np.int64)
        return _windows(self.validation, starts, context)


def load_corpus(path: Path | None = None) -> Corpus:
    """The files under a folder, or one file in blocks; None is Python's standard library.

    Raises:
      ValueError: nothing to train on, or nothing to hold out.
    """
    if path is None:
        description = f"standard library of Python {platform.python_version()}"
        pieces = _standard_library()
    else:
        description = path.name
        pieces = _blocks(path) if path.is_file() else _files(path, "*")
    train, validation = [], []
    for name, content in pieces:
        (validation if is_held_out(name) else train).append(content + END_OF_FILE)
    if not train or not validation:
        raise ValueError(
            f"the corpus {path or description} has {len(train)} files to train on and"
            f" {len(validation)} to hold out: give a folder of many files, or a file well above"
            f" {BLOCK // 1024} KiB."
        )
    return Corpus(description, _stream(train), _stream(validation))


def is_held_out(name: str) -> bool:
    """Whether the file of that name, relative to the corpus, with forward slashes, is held out."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def unigram_entropy(stream: np.ndarray) -> float:
    """Nats a byte of the best model that ignores context: what any use of context must beat."""
    frequency = np.bincount(stream, minlength=256) / len(stream)
    frequency = frequency[frequency > 0]
    return float(-(frequency * np.log(frequency)).sum())


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


def _stream(pieces: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(pieces), dtype=np.uint8)


def _windows(stream: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return stream[starts[:, None] + np.arange(context + 1)]
