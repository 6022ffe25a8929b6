"""Reading the tables that `describe` prints."""

import itertools
import re

LEAF_COLUMNS = ["path", "shape", "matrices x (out, in)", "optimizer", "scale", "why"]


def unfolded(path):
    """Every path that a folded one stands for."""
    pieces = re.split(r"\{([^}]*)\}", path)
    choices = []
    for inside, piece in zip(itertools.cycle([False, True]), pieces, strict=False):
        if not inside:
            choices.append([piece])
            continue
        runs = [run.split("..") for run in piece.split(",")]
        choices.append([str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)])
    return ["".join(combination) for combination in itertools.product(*choices)]


def read_table(text):
    """The columns and the rows of cells of one table."""
    header, rule, *lines = text.splitlines()
    starts = [match.start() for match in re.finditer(r"-+", rule)]
    ends = [*starts[1:], None]

    def cells(line):
        return [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]

    return cells(header), [cells(line) for line in lines]


def leaf_rows(text):
    """{path: {column: cell}} of the first table, with a row for every leaf."""
    columns, rows = read_table(text.split("\n\n")[0])
    assert [column for column in columns if column != "leaves"] == LEAF_COLUMNS
    found = {}
    for row in rows:
        cells = dict(zip(columns, row, strict=True))
        paths = unfolded(cells.pop("path"))
        assert len(paths) == int(cells.pop("leaves", 1))
        found |= {path: {"path": path, **cells} for path in paths}
    return found


def totals(text):
    """{optimizer: {column: cell}} of the second table."""
    table = next(t for t in text.split("\n\n") if t.startswith("optimizer "))
    columns, rows = read_table(table)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
