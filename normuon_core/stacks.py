"""How matrices of one size, whichever weights they come from, are cut into stacks."""

import math
from collections.abc import Iterator, Sequence


def even_stacks(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts members of `sizes` matrices, laid end to end, into as few stacks of `limit` as will do.

    The stacks are of one size, but for one matrix more in the first ones: a small last one would leave
    most of a GPU idle.

    Yields:
      One list a stack, of (member, first of its matrices, one after the last); a member may be
      spread over several stacks.
    """
    total = sum(sizes)
    if total == 0:
        return
    count = math.ceil(total / limit)
    stack: list[tuple[int, int, int]] = []
    done, room = 0, math.ceil(total / count)
    for member, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            stack.append((member, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield stack
                stack, done = [], done + 1
                room = total // count + (done < total % count)
