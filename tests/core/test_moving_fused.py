"""Rules that cut a fused parameter into its parts, and join it of them."""

import numpy as np
import pytest

from normuon_core.moving import NameTable, Rule
from normuon_core.moving.format import Kept, read_metadata, written_metadata
from tests.core.test_moving import (
    ADAMW,
    MUON,
    NORMUON,
    assert_equal_arrays,
    assert_same,
    draw,
    printed_and_read,
)

QKV = ("query", "key", "value")

FUSED_IN_TORCH = Rule(
    "h.{n}.c_attn.weight",
    tuple(f"h/{each}/kernel" for each in QKV),
    "(heads size) in -> n in heads size",
    {"size": 2},
    cut={"heads": (4, 2, 2)},
)
FUSED_IN_FLAX = Rule(
    tuple(f"h.{{n}}.{each}.weight" for each in QKV),
    "h/qkv/kernel",
    "out in -> n in out",
    cut={"out": (8, 4, 4)},
)
FUSED_BIAS = Rule(
    "h.{n}.c_attn.bias",
    tuple(f"h/{each}/bias" for each in QKV),
    "(heads size) -> n heads size",
    cut={"heads": (4, 2, 2)},
)

SPLIT = Kept(NORMUON.settings, ((1, 8, 5), (2, 4, 5)))


def fused(name, kept=SPLIT, **statistics):
    """Everything that is kept of a fused (16, 5) weight; `statistics` by kind."""
    rng = np.random.default_rng(len(name))
    arrays = {kind: rng.standard_normal((16, 5)) for kind in ("parameter", "momentum")}
    arrays["remainder"] = rng.integers(0, 2**16, (16, 5), np.uint16)
    arrays["radius"] = rng.random((3, 1))
    arrays |= {kind: rng.random(shape) for kind, shape in statistics.items()}
    arrays["step"] = np.array(7)
    named = {f"{kind.replace('__', '.')}/{name}": array for kind, array in arrays.items()}
    return named, {name: kept}


def file_of(*parameters):
    arrays, kept = {"count": np.array(7)}, {}
    for own, said in parameters:
        arrays |= own
        kept |= said
    return arrays | {"metadata": written_metadata(kept)}


MIXED = {"second_moment__0": (8, 1), "second_moment__1": (1, 5), "second_moment__2": (1, 5)}


@pytest.mark.parametrize(
    ("statistics", "of_query"),
    [
        ({"second_moment": (16, 1)}, (2, 1, 4, 2)),
        ({"second_moment": (3, 5)}, (2, 5, 1, 1)),
        (MIXED, (2, 1, 4, 2)),
    ],
    ids=["outputs", "inputs", "both"],
)
def test_a_fused_weight_is_cut_into_its_parts_and_joined_of_them(statistics, of_query):
    """Fused in PyTorch, and in Flax the parts' layers are stacks with their heads apart; from there to
    a fused stack in Flax, whose parts and layers are apart in PyTorch."""
    names = [f"h.{n}.c_attn.weight" for n in range(2)]
    arrays = file_of(*(fused(name, **statistics) for name in names))
    parts = NameTable([FUSED_IN_TORCH]).to_flax(arrays)
    assert parts["second_moment/h/query/kernel"].shape == of_query
    assert parts["radius/h/key/kernel"].shape == (2, 1, 1, 1)
    for kind in ("parameter", "momentum", "remainder"):
        for n, name in enumerate(names):
            blocks = [parts[f"{kind}/h/{each}/kernel"][n].reshape(5, -1).T for each in QKV]
            np.testing.assert_array_equal(np.concatenate(blocks), arrays[f"{kind}/{name}"])
    assert read_metadata(parts)["h/key/kernel"].matrices == ((2, 4, 5),)
    assert_same(NameTable([FUSED_IN_TORCH]).to_torch(parts), arrays)

    heads_apart = [
        Rule(f"h.{{n}}.{each}.weight", f"h/{each}/kernel", FUSED_IN_TORCH.axes, {"size": 2})
        for each in QKV
    ]
    apart = NameTable(heads_apart).to_torch(parts)
    stack = NameTable([FUSED_IN_FLAX]).to_flax(apart)
    assert stack["momentum/h/qkv/kernel"].shape == (2, 5, 16)
    assert read_metadata(stack)["h/qkv/kernel"].matrices == ((2, 8, 5), (4, 4, 5))
    own = {key: array for key, array in stack.items() if key.startswith("second_moment")}
    assert {key.partition("/")[0] for key in own} == {
        kind.replace("__", ".") for kind in statistics
    }
    assert_same(NameTable([FUSED_IN_FLAX]).to_torch(stack), apart)


def test_a_part_may_be_split_into_heads_and_stored_head_by_head():
    """One number for each head of each part, and q, k, v of each head in turn."""
    per_head = Rule("a", ("q", "k"), "(heads size) in -> in heads size", cut={"heads": (4, 2)})
    turns = Rule(
        "a",
        ("q", "k"),
        "(heads kinds size) in -> in heads (kinds size)",
        {"heads": 3},
        {"kinds": (1, 1)},
    )
    for rule, radii, blocks in (
        (per_head, np.arange(6.0), ((0, 1, 2, 3), (4, 5))),
        (turns, np.arange(2.0), ((0,), (1,))),
        (turns, np.arange(6.0), ((0, 2, 4), (1, 3, 5))),
    ):
        arrays = {"momentum/a": draw(12, 5), "radius/a": radii[:, None], "step/a": np.array(7)}
        arrays["metadata"] = written_metadata({"a": Kept(NORMUON.settings, ((len(radii), 2, 5),))})
        moved = NameTable([rule]).to_flax(arrays)
        for name, own in zip(("q", "k"), blocks, strict=True):
            assert tuple(moved[f"radius/{name}"].ravel()) == own
            assert read_metadata(moved)[name].matrices == ((len(own), 2, 5),)
        assert_same(NameTable([rule]).to_torch(moved), arrays)


def test_equal_blocks_of_a_stack_are_divided_over_its_members():
    rule = Rule(("l.{n}.q", "l.{n}.k"), "l/qk", "out in -> n in out", cut={"out": (2, 2)})
    arrays = {"momentum/l/qk": draw(4, 5, 4)}
    arrays["metadata"] = written_metadata({"l/qk": Kept(NORMUON.settings, ((8, 2, 5),))})
    moved = NameTable([rule]).to_torch(arrays)
    assert {own.matrices for own in read_metadata(moved).values()} == {((1, 2, 5),)}
    assert_same(NameTable([rule]).to_flax(moved), arrays)


def test_a_part_of_one_output_may_have_its_second_moment_along_the_inputs():
    rule = Rule("a", ("q", "k"), "out in -> in out", cut={"out": (8, 1)})
    arrays = {"momentum/a": draw(9, 5), "second_moment.0/a": draw(8, 1)}
    arrays["second_moment.1/a"] = draw(1, 5)
    moved = NameTable([rule]).to_flax(arrays)
    assert moved["second_moment/k"].shape == (5, 1)
    assert_equal_arrays(NameTable([rule]).to_torch(moved), arrays)


def test_what_adamw_steps_is_cut_and_joined_freely():
    kinds = ("parameter", "exp_avg", "exp_avg_sq", "gradient_sum")
    arrays = {f"{kind}/h.0.c_attn.bias": draw(16) + place for place, kind in enumerate(kinds)}
    arrays |= {"step/h.0.c_attn.bias": np.array(4), "count": np.array(4)}
    arrays["metadata"] = written_metadata({"h.0.c_attn.bias": ADAMW})
    moved = NameTable([FUSED_BIAS]).to_flax(arrays)
    assert moved["gradient_sum/h/key/bias"].shape == (1, 2, 2)
    assert_same(NameTable([FUSED_BIAS]).to_torch(moved), arrays)


def of_parts(**changed):
    """The parts of a fused weight in Flax, and what is changed: None leaves an array out."""
    parts = NameTable([FUSED_IN_TORCH]).to_flax(
        file_of(fused("h.0.c_attn.weight", second_moment=(16, 1)))
    )
    for key, array in changed.items():
        kind, name = key.split("__")
        parts[f"{kind}/h/{name}/kernel"] = array
    return {key: array for key, array in parts.items() if array is not None}


def said_of_parts(**changed):
    parts = of_parts()
    kept = read_metadata(parts) | {f"h/{name}/kernel": own for name, own in changed.items()}
    return parts | {"metadata": written_metadata(kept)}


@pytest.mark.parametrize(
    ("move", "arrays", "message"),
    [
        (
            "to_flax",
            file_of(fused("h.0.c_attn.weight", Kept(NORMUON.settings, ((1, 16, 5),)))),
            r"c_attn.weight: .* one of \(16, 5\), .* other matrices; .*output_splits.*\(4, 2, 2\)",
        ),
        (
            "to_torch",
            {
                "momentum/h/qkv/kernel": draw(4, 5, 16),
                "metadata": written_metadata(
                    {"h/qkv/kernel": Kept(NORMUON.settings, ((4, 16, 5),))}
                ),
            },
            r"qkv/kernel: .* 4 matrices of \(16, 5\), .* other matrices; .*output_splits",
        ),
        (
            "to_flax",
            file_of(fused("h.0.c_attn.weight", Kept(NORMUON.settings))),
            "does not say which matrices .* recipe='optax_muon'",
        ),
        (
            "to_flax",
            fused("h.0.c_attn.weight", second_moment=(1, 5))[0],
            r"second_moment/h.0.c_attn.weight: of shape \(1, 5\) .* output_splits",
        ),
        (
            "to_flax",
            {"parameter/h.0.c_attn.weight": draw(18, 5)},
            r"c_attn.weight: its heads has 9 entries, and 8 by its rule's cut",
        ),
        (
            "to_torch",
            {f"parameter/h/{each}/kernel": draw(1, 5, 4, 2) for each in QKV},
            r"h/key/kernel: its heads has 4 entries, and 2 by its rule's cut={'heads': \(4, 2, 2\)}",
        ),
        (
            "to_torch",
            {f"parameter/h/{e}/kernel": draw(1, 5, h, 2) for e, h in (("query", 4), ("value", 2))},
            r"weight: of its parts .*h/value/kernel the file lacks h/key/kernel; hand",
        ),
        (
            "to_torch",
            {
                f"parameter/h/{each}/kernel": draw(1, inputs, heads, 2)
                for each, inputs, heads in zip(QKV, (5, 5, 6), (4, 2, 2), strict=True)
            },
            "do not fit side by side along heads: .*kernel has .*'in': 6",
        ),
        ("to_torch", of_parts(momentum__key=None), "h/key/kernel has no momentum, and others"),
        ("to_torch", of_parts(step__key=np.array(6)), "different numbers of steps .*kernel 6,"),
        (
            "to_torch",
            of_parts(radius__query=draw(1, 1, 3, 1)),
            r"radius/h.0.c_attn.weight: .* side by side: h/query/kernel \(3, 1\), h/key",
        ),
        ("to_torch", said_of_parts(key=MUON), "stepped by different settings"),
        (
            "to_torch",
            said_of_parts(query=Kept(NORMUON.settings, ((1, 6, 5), (1, 2, 5)))),
            r"h/query/kernel for one of \(2, 5\) and one of .*has one block for each part",
        ),
        (
            "to_torch",
            said_of_parts(key=Kept(NORMUON.settings)),
            "h/key/kernel: .* not say which matr",
        ),
    ],
)
def test_what_cannot_be_cut_or_joined_is_an_error_by_name(move, arrays, message):
    with pytest.raises(ValueError, match=message):
        getattr(NameTable([FUSED_IN_TORCH, FUSED_IN_FLAX]), move)(arrays)


def test_a_table_that_cuts_is_printed_as_code():
    table = NameTable([FUSED_IN_TORCH, FUSED_IN_FLAX, FUSED_BIAS])
    assert printed_and_read(table).rules == table.rules
    assert "'out in -> n in out', cut={'out': (8, 4, 4)})" in repr(table)
