"""How the matrices of one size, from whichever weights, are cut into stacks."""

import math
from collections.abc import Iterator, Sequence


def even_stacks(
    sizes: Sequence[int], limit: int, *, owners: int = 1
) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts members of `sizes` matrices, laid end to end, into as few stacks as `limit` allows.

    The stacks have one size, except that the first ones may have a matrix more: a small last stack would
    leave most of a GPU idle.

    Args:
      limit: matrices that each owner may have of a stack.
      owners: among how many devices a stack is divided. Each has as many of its matrices as any other,
        but for the last stack, which lacks what the total does.

    Yields:
      One list a stack, of (member, first of its matrices, one after the last); a member may be
      spread over several stacks.
    """
    total = sum(sizes)
    if total == 0:
        return
    rounds = math.ceil(total / owners)
    count = math.ceil(rounds / limit)
    stack: list[tuple[int, int, int]] = []
    done, room = 0, owners * math.ceil(rounds / count)
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
                room = owners * (rounds // count + (done < rounds % count))
    if stack:
        yield stack


def plan_stacks(
    sizes: Sequence[int], bytes_a_matrix: int, ceiling: int, *, owners: int = 1, sharing: int = 1
) -> Iterator[list[tuple[int, int, int]]]:
    """The stacks of matrices that are alike, as `even_stacks` cuts them.

    Args:
      bytes_a_matrix: what one matrix of a stack takes on the device that orthogonalizes it.
      ceiling: bytes that a stack may take there; one matrix is never cut.
      owners: among how many devices every stack is divided evenly.
      sharing: among how many devices it is divided in any other way.
    """
    return even_stacks(sizes, max(1, ceiling // bytes_a_matrix) * sharing, owners=owners)
