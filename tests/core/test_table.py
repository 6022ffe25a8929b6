"""Tables for people: leaves that are alike take one line, and nothing is lost by that."""

import pytest

from normuon_core.table import Total, fold, leaf_table, table, totals_table
from tests.in_jax.tables import unfolded

PATHS = {
    "layers": ([f"layers/{i}/up" for i in range(12)], ["layers/{0..11}/up"]),
    "names with an index": ([f"Dense_{i}/kernel" for i in (0, 1, 4)], ["Dense_{0,1,4}/kernel"]),
    "keys with dots": ([f"h.{i}.attn.w" for i in (0, 1)], ["h.{0,1}.attn.w"]),
    "layers and experts": (
        [f"layers/{i}/experts/{j}/up" for i in range(4) for j in range(3)],
        ["layers/{0..3}/experts/{0..2}/up"],
    ),
    "an expert is missing": (
        [f"layers/{i}/{j}/up" for i in range(4) for j in range(3) if (i, j) != (2, 1)],
        ["layers/{0,1,3}/{0..2}/up", "layers/2/{0,2}/up"],
    ),
    "numbers that belong to a name": (["fc1/w", "fc2/w"], ["fc1/w", "fc2/w"]),
    "one leaf": (["layers/0/up"], ["layers/0/up"]),
}


@pytest.mark.parametrize(("paths", "expected"), PATHS.values(), ids=PATHS.keys())
def test_leaves_that_are_alike_take_one_row(paths, expected):
    folded = fold([[path, "3x4"] for path in paths])
    assert [row[0] for row, _ in folded] == expected
    assert all(row[1:] == ["3x4"] for row, _ in folded)
    assert [count for _, count in folded] == [len(unfolded(row[0])) for row, _ in folded]
    assert sorted(path for row, _ in folded for path in unfolded(row[0])) == sorted(paths)


def test_a_leaf_that_differs_keeps_a_row_of_its_own_in_the_leaves_order():
    rows = [[f"layers/{i}/up", "4x4" if i == 1 else "3x4"] for i in range(4)]
    rows = [["embed", "9x4"], *rows, ["norm", "4"]]
    assert fold(rows) == [
        (["embed", "9x4"], 1),
        (["layers/{0,2,3}/up", "3x4"], 3),
        (["layers/1/up", "4x4"], 1),
        (["norm", "4"], 1),
    ]


def test_the_number_of_leaves_is_a_column_only_where_some_are_folded():
    rows = [["h_0/w", "3x4"], ["h_1/w", "3x4"], ["norm", "4"]]
    assert leaf_table(["path", "shape"], rows).splitlines() == [
        "path       leaves  shape",
        "---------  ------  -----",
        "h_{0,1}/w  2       3x4",
        "norm       1       4",
    ]
    assert leaf_table(["path", "shape"], rows[1:]) == table([["path", "shape"], *rows[1:]])


def test_totals_have_each_optimizers_share_and_bytes():
    muon = Total("Muon", 12, 3000, {"momentum": 12_000, "second moment": 0})
    adam = Total("AdamW", 1, 1000, {"first moment": 4000, "second moment": 4004})
    assert totals_table([muon, adam]).splitlines() == [
        "optimizer  leaves  parameters  share  state bytes  of which",
        "---------  ------  ----------  -----  -----------  ---------------------------------------",
        "Muon       12      3,000       75.0%  12,000       momentum 12,000",
        "AdamW      1       1,000       25.0%  8,004        first moment 4,000, second moment 4,004",
    ]
