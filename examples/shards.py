"""Token ids in files, as modded-nanogpt reads FineWeb: a header of 256 int32, then uint16 ids.

The header's first three numbers are 20240520, the version 1 and how many ids follow.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.errors import BadInput
from examples.stream import Stream

MAGIC, VERSION = 20240520, 1
HEADER = 256 * 4  # bytes
LAST = 0.1  # of the ids, held out where no shard is named for validation


def write_shard(path: Path, ids: Sequence[int] | np.ndarray) -> None:
    """One shard of ids below 65536."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())


def read_shards(paths: Sequence[Path], vocabulary: int) -> tuple[Stream, Stream]:
    """To train on and to hold out: shards with `val` in their names, or else the last tenth of the ids.

    Raises:
      BadInput: a header that is cut, no shard's or of another version, another number of ids than it
        says, or an id that is not in the vocabulary.
    """
    shards = {path: _read(path, vocabulary) for path in paths}
    validation = [ids for path, ids in shards.items() if "val" in path.name]
    train = [ids for path, ids in shards.items() if "val" not in path.name]
    if not train:
        raise BadInput(f"{paths[0].parent}: every shard is named for validation, none to train on.")
    if not validation:
        last = train.pop()
        kept = len(last) - max(1, int(LAST * len(last)))
        train, validation = [*train, last[:kept]], [last[kept:]]
    return Stream(train), Stream(validation)


def _read(path: Path, vocabulary: int) -> np.ndarray:
    size = path.stat().st_size
    if size < HEADER:
        raise BadInput(f"{path}: found {size} bytes, expected a header of {HEADER}.")
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if magic != MAGIC:
        raise BadInput(f"{path}: found {magic} at the beginning, expected a shard's {MAGIC}.")
    if version != VERSION:
        raise BadInput(f"{path}: found version {version} in the header, expected {VERSION}.")
    found = (size - HEADER) / 2
    if found != count or count == 0:
        raise BadInput(f"{path}: found {found:g} ids, expected the {count} that the header says.")
    ids = np.memmap(path, "<u2", mode="r", offset=HEADER)
    highest = int(ids.max())
    if highest >= vocabulary:
        raise BadInput(
            f"{path}: found the id {highest}, expected less than {vocabulary}: set --vocabulary to the"
            " tokenizer's size (GPT-2's is 50257), or give its file as --tokenizer."
        )
    return ids
