"""The table of names between PyTorch and Flax, and what of a file does not fit an optimizer."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from normuon_core import RECIPES, MatrixLayout
from normuon_core.moving import NameTable, Rule, derive_table
from normuon_core.moving.format import (
    Kept,
    matrices_of,
    read_metadata,
    written_metadata,
)
from normuon_core.moving.matching import Wanted, matching_parameters, matching_state
from normuon_core.moving.settings import settings_of_adamw, settings_of_recipe

UP = Rule("blocks.{n}.up.weight", "blocks/up/kernel", "out in -> n in out")
QUERY = Rule(
    "{b}.query.weight", "{b}/query/kernel", "(heads size) in -> in heads size", {"heads": 2}
)
NORM = Rule("norm.weight", "norm/scale")
TABLE = NameTable([UP, QUERY, NORM])

NORMUON = Kept(settings_of_recipe(RECIPES["normuon"]), ((1, 6, 4),))
MUON = Kept(settings_of_recipe(RECIPES["torch_muon"]), ((1, 6, 4),))
ADAMW = Kept(settings_of_adamw(b1=0.9, b2=0.95, eps=1e-10, eps_root=0.0, nesterov=False))


def draw(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def of_torch(layers=3):
    """Twelve layers where asked, so that the tenth is no neighbour of the first by its name."""
    arrays, kept = {"count": np.array(7)}, {"norm.weight": ADAMW}
    names = [f"blocks.{n}.up.weight" for n in range(layers)]
    for seed, name in enumerate(["attention.query.weight", *names]):
        rng = np.random.default_rng(seed)
        arrays[f"momentum/{name}"] = rng.standard_normal((6, 4))
        arrays[f"second_moment/{name}"] = rng.standard_normal((6, 1))
        arrays[f"step/{name}"] = np.array(7)
        kept[name] = NORMUON
    arrays["exp_avg/norm.weight"] = draw(4)
    return arrays | {"metadata": written_metadata(kept)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        if key != "metadata":
            np.testing.assert_array_equal(ours[key], array, strict=True)
    assert read_metadata(ours) == read_metadata(theirs)


@pytest.mark.parametrize("layers", [1, 12])
def test_arrays_go_to_flax_and_come_back_as_they_were(layers):
    arrays = of_torch(layers)
    moved = TABLE.to_flax(arrays)
    up = moved["momentum/blocks/up/kernel"]
    assert up.shape == (layers, 4, 6)
    np.testing.assert_array_equal(up[-1], arrays[f"momentum/blocks.{layers - 1}.up.weight"].T)
    query = moved["momentum/attention/query/kernel"]
    np.testing.assert_array_equal(query.reshape(4, 6).T, arrays["momentum/attention.query.weight"])
    assert moved["second_moment/attention/query/kernel"].shape == (1, 2, 3)
    assert moved["second_moment/blocks/up/kernel"].shape == (layers, 1, 6)
    assert moved["step/blocks/up/kernel"] == 7
    assert read_metadata(moved)["blocks/up/kernel"].matrices == ((layers, 6, 4),)
    assert_same(TABLE.to_torch(moved), arrays)


def test_a_stack_may_be_on_any_axis_and_over_several_names():
    rule = Rule("l.{n}.e.{k}.weight", "l/e", "out in -> in n k out")
    arrays = {
        f"parameter/l.{n}.e.{k}.weight": draw(5, 4) + n + 10 * k for n in range(3) for k in range(2)
    }
    moved = NameTable([rule]).to_flax(arrays)
    assert moved["parameter/l/e"].shape == (4, 3, 2, 5)
    np.testing.assert_array_equal(
        moved["parameter/l/e"][:, 2, 1], arrays["parameter/l.2.e.1.weight"].T
    )
    assert_equal_arrays(NameTable([rule]).to_torch(moved), arrays)


def test_a_statistic_keeps_size_one_on_a_reduced_axis_that_is_several_on_the_other_side():
    arrays = {"momentum/a.query.weight": draw(6, 4), "second_moment/a.query.weight": draw(1, 4)}
    moved = NameTable([QUERY]).to_flax(arrays)
    assert moved["second_moment/a/query/kernel"].shape == (4, 1, 1)
    assert_equal_arrays(NameTable([QUERY]).to_torch(moved), arrays)


def assert_equal_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, strict=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("a", "b", "out in"), "no two sides"),
        (lambda: Rule("a", "b", "out [in] -> in out"), "no list of names"),
        (lambda: Rule("a", "b", "x x -> x"), "stands twice"),
        (lambda: Rule("a", "b", "out in -> in"), "out is on one side alone"),
        (lambda: Rule("a.{n}", "b", "out in -> in out"), "n is on one side alone"),
        (lambda: Rule("a.{n}", "b"), "{n} is in one of the names alone"),
        (lambda: Rule("a.{n}.{n}", "b.{n}"), "stands twice in 'a.{n}.{n}'"),
        (lambda: Rule("a", ("b", "c"), "out in -> in out"), "parts' sizes along one axis"),
        (lambda: Rule("a", "b", "out in -> in out", cut={"out": (2, 1)}), "a tuple of its parts"),
        (
            lambda: Rule("a", ("b", "c"), "o i -> i o", cut={"o": (2, 1, 1)}),
            "are 2 parts, and o is",
        ),
        (lambda: Rule("a", ("b", "b"), "o i -> i o", cut={"o": (2, 1)}), "there are 1 parts"),
        (lambda: Rule("a", ("b", "c"), cut={"out": (2, 1)}), "out is cut, and is no axis"),
        (
            lambda: TABLE.to_flax({"momentum/down.weight": draw(2, 3)}),
            "no rule fits .*'down.weight'",
        ),
        (
            lambda: TABLE.to_flax({"momentum/blocks.1.up.weight": draw(2, 3)}),
            "stack over n lacks number 0",
        ),
        (
            lambda: TABLE.to_flax({"momentum/blocks.x.up.weight": draw(2, 3)}),
            "'x' is no number",
        ),
        (
            lambda: TABLE.to_flax({"momentum/blocks.0.up.weight": draw(2, 3, 1)}),
            r"shape \(2, 3, 1\) has 3 axes, and its rule names 2: out in",
        ),
        (
            lambda: TABLE.to_flax({"momentum/a.query.weight": draw(5, 3)}),
            r"5 entries is no \(heads size\) with sizes={'heads': 2}",
        ),
        (
            lambda: TABLE.to_flax(
                {
                    "step/blocks.0.up.weight": np.array(1),
                    "step/blocks.1.up.weight": np.array(2),
                }
            ),
            "have done 1, 2 steps",
        ),
        (
            lambda: TABLE.to_flax(
                {
                    "momentum/blocks.0.up.weight": draw(2, 3),
                    "exp_avg/blocks.1.up.weight": draw(2, 3),
                }
            ),
            "blocks.1.up.weight has no momentum",
        ),
        (
            lambda: NameTable([Rule("a", "c"), Rule("b", "c")]).to_flax(
                {"parameter/a": draw(2), "parameter/b": draw(2)}
            ),
            "two rules make c, Rule",
        ),
        (
            lambda: NameTable(
                [Rule("c", "a"), Rule(("q", "k"), "a", "o -> o", cut={"o": (2, 1)})]
            ).to_flax(
                {f"parameter/{name}": draw(size) for name, size in {"c": 3, "q": 2, "k": 1}.items()}
            ),
            "two rules make a, Rule",
        ),
    ],
)
def test_what_a_rule_does_not_fit_is_an_error_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_members_of_a_stack_that_were_stepped_otherwise_are_refused():
    arrays = of_torch(2)
    kept = read_metadata(arrays)
    other = dataclasses.replace(RECIPES["normuon"], shape_scale="none")
    kept["blocks.1.up.weight"] = Kept(settings_of_recipe(other), ((1, 6, 4),))
    with pytest.raises(ValueError, match="blocks/up/kernel: .* different settings"):
        TABLE.to_flax(arrays | {"metadata": written_metadata(kept)})


TORCH = {
    "embed.weight": (9, 4),
    "layers.0.up.weight": (6, 4),
    "layers.1.up.weight": (6, 4),
    "layers.0.norm.weight": (4,),
    "layers.1.norm.weight": (4,),
    "stem.weight": (8, 3, 5, 7),
    "stem.bias": (8,),
}
REST = {"embed/embedding": (9, 4), "stem/kernel": (5, 7, 3, 8), "stem/bias": (8,)}
STACKED = {**REST, "layers/up/kernel": (2, 4, 6), "layers/norm/scale": (2, 4)}
APART = {
    **REST,
    **{f"layers/{n}/up/kernel": (4, 6) for n in range(2)},
    **{f"layers/{n}/norm/scale": (4,) for n in range(2)},
}


@pytest.mark.parametrize("flax", [STACKED, APART], ids=["stacked", "apart"])
def test_a_derived_table_gives_every_parameter_the_shape_of_the_other_side(flax):
    table = derive_table(TORCH, flax)
    arrays = {f"parameter/{name}": draw(*shape) for name, shape in TORCH.items()}
    moved = table.to_flax(arrays)
    assert {key.removeprefix("parameter/"): x.shape for key, x in moved.items()} == flax
    assert_equal_arrays(table.to_torch(moved), arrays)
    # Printed, it is code.
    assert printed_and_read(table).rules == table.rules


def printed_and_read(table):
    return eval(repr(table), {"NameTable": NameTable, "Rule": Rule})


def test_parameters_without_a_counterpart_are_named():
    with pytest.raises(ValueError, match=r"PyTorch for extra/kernel \(4, 4\).*Flax for nothing"):
        derive_table(TORCH, {**APART, "extra/kernel": (4, 4)})
    with pytest.raises(ValueError, match=r"for stem/kernel \(7, 5, 3, 8\).* stem.weight \(8, 3, 5"):
        derive_table(TORCH, {**APART, "stem/kernel": (7, 5, 3, 8)})
    with pytest.raises(
        ValueError, match=r"for nothing.* for down.weight \(2, 2\); .* rule with cut"
    ):
        derive_table({**TORCH, "down.weight": (2, 2)}, APART)


WANTED = Wanted(
    NORMUON,
    {
        "momentum": ((6, 4), np.dtype(np.float32)),
        "second_moment": ((6, 1), np.dtype(np.float32)),
    },
)


def of_one(**arrays):
    own = {"momentum": draw(6, 4), "second_moment": draw(6, 1), "step": np.array(3)} | arrays
    named = {f"{kind}/w": array for kind, array in own.items() if array is not None}
    return named | {"count": np.array(3), "metadata": written_metadata({"w": NORMUON})}


def kept_as(kept):
    return of_one() | {"metadata": written_metadata({"w": kept})}


def with_settings(**changes):
    settings = json.loads(json.dumps(NORMUON.settings))
    for key, value in changes.items():
        *way, last = key.split("__")
        target = settings
        for each in way:
            target = target[each]
        target[last] = value
    return kept_as(Kept(settings, NORMUON.matrices))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            of_one(momentum=draw(4, 6)),
            r"momentum/w: the file has shape \(4, 6\), .* \(6, 4\); .*NameT",
        ),
        (
            of_one(momentum=draw(6, 4, dtype=np.float64)),
            "file has float64, .* float32; .*enable_x64",
        ),
        (
            of_one(momentum=draw(6, 4).astype(ml_dtypes.bfloat16)),
            "has bfloat16, .*momentum_dtype=bfloat16",
        ),
        (
            of_one(second_moment=None),
            "w: the file has momentum, step, and here .* second_moment, step",
        ),
        (of_one(remainder=draw(6, 4)), "with_bf16_remainder"),
        (kept_as(MUON), "recipe='torch_muon' to continue"),
        (
            with_settings(momentum__rule="heavy_ball"),
            "rule is heavy_ball in the file and lerp here",
        ),
        (
            with_settings(momentum__momentum=0.9),
            r"momentum is 0.9 in the file and 0.95 here.*=0.9 to",
        ),
        (with_settings(neuron_norm__beta2=0.5), "make the optimizer with beta2=0.5"),
        (kept_as(ADAMW), "w: the file's run stepped it as AdamW, .* matrices .*layout None"),
        (
            kept_as(Kept(NORMUON.settings, ((3, 2, 4),))),
            r"3 matrices of \(2, 4\), and .* one of \(6, 4",
        ),
        (
            {**of_one(), "momentum/v": draw(2)},
            "has 'v', which are not among what the optimizer steps",
        ),
        ({"momentum/w": draw(6, 4)}, "no 'metadata' .*there are 'momentum/w'"),
        (
            of_one() | {"metadata": np.frombuffer(b'{"format": "x"}', np.uint8)},
            "format='x', version=None, and this program reads",
        ),
        (
            of_one()
            | {
                "metadata": np.frombuffer(
                    bytes(of_one()["metadata"]).replace(b'"version": 1', b'"version": 2'), np.uint8
                )
            },
            "version=2, .* up to version 1; update",
        ),
        ({k.replace("/w", "/v"): x for k, x in of_one().items()}, "lacks 'w', .* has 'v'"),
    ],
)
def test_what_does_not_fit_the_optimizer_is_refused_by_name(arrays, message):
    with pytest.raises(ValueError, match=message):
        matching_state(arrays, {"w": WANTED}, ())
    assert matching_state(of_one(), {"w": WANTED}, ())["w"].keys() == {*WANTED.arrays, "step"}


def test_a_setting_may_be_changed_on_purpose():
    arrays = with_settings(momentum__momentum=0.9)
    matching_state(arrays, {"w": WANTED}, ("momentum.momentum",))
    with pytest.raises(ValueError, match="momentum.momentum is 0.9"):
        matching_state(arrays, {"w": WANTED}, ("momentum.nesterov",))


def test_a_file_of_before_adam_every_is_one_that_updates_at_every_step():
    arrays = {f"{kind}/w": draw(4) for kind in ("exp_avg", "exp_avg_sq")} | {"step/w": np.array(3)}
    older = Kept({key: value for key, value in ADAMW.settings.items() if key != "every"})
    arrays["metadata"] = written_metadata({"w": older})
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), ((4,), np.dtype(np.float32)))
    for every in (None, 1):
        kept = Kept(settings_of_adamw(b1=0.9, every=every))
        matching_state(arrays, {"w": Wanted(kept, moments)}, ())
    sums = Wanted(
        Kept(settings_of_adamw(b1=0.9, every=np.int64(2))),
        moments | {"gradient_sum": moments["exp_avg"]},
    )
    with pytest.raises(ValueError, match="gradient_sum, step are kept; .* by adam_every=k"):
        matching_state(arrays, {"w": sums}, ())
    arrays["metadata"] = written_metadata({"w": ADAMW})
    with pytest.raises(ValueError, match=r"every is 1 in the file and 2 here.* adam_every=1"):
        matching_state(arrays, {"w": sums}, ("every",))


def test_a_setting_that_one_side_does_not_know_is_not_compared():
    scheduled = with_settings()
    kept = read_metadata(scheduled)["w"]
    del kept.settings["momentum"]["momentum"]
    matching_state(kept_as(kept), {"w": WANTED}, ())


def test_parameters_are_matched_by_name_shape_and_dtype():
    wanted = {"w": ((2, 3), np.dtype(np.float32))}
    matching_parameters({"parameter/w": draw(2, 3)} | of_one(), wanted)
    for arrays in ({}, {"parameter/v": draw(2, 3)}, {"parameter/w": draw(3, 2)}):
        with pytest.raises(ValueError, match=r"lacks 'w'|has shape \(3, 2\)"):
            matching_parameters(arrays, wanted)


def write_npz(arrays, path):
    np.savez(path, **arrays)
    return np.load(path)


def write_safetensors(arrays, path):
    save_file(arrays, path)
    return load_file(path)


@pytest.mark.parametrize("write", [write_npz, write_safetensors])
def test_files_keep_every_bit_and_every_dtype(write, tmp_path):
    arrays = of_one(
        momentum=draw(6, 4).astype(ml_dtypes.bfloat16),
        remainder=np.arange(24, dtype=np.uint16).reshape(6, 4),
        second_moment=draw(6, 1, dtype=np.float64),
    )
    read = write(arrays, tmp_path / "run.npz")
    kinds = {
        kind: (arrays[f"{kind}/w"].shape, arrays[f"{kind}/w"].dtype)
        for kind in ("momentum", "remainder", "second_moment")
    }
    found = matching_state(read, {"w": Wanted(NORMUON, kinds)}, ())["w"]
    for kind in kinds:
        own = arrays[f"{kind}/w"]
        assert found[kind].dtype == own.dtype
        np.testing.assert_array_equal(found[kind].view(np.uint8), own.view(np.uint8))


def test_moved_arrays_are_row_major_whatever_they_were(tmp_path):
    """safetensors writes an array's memory."""
    arrays = {
        key: np.asfortranarray(array) if array.ndim else array for key, array in of_torch().items()
    }
    moved = TABLE.to_flax(arrays)
    assert_same(write_safetensors(moved, tmp_path / "run.safetensors"), TABLE.to_flax(of_torch()))
    kept = NameTable([Rule("w", "w")]).to_flax({"momentum/w": draw(6, 4).T})
    assert kept["momentum/w"].flags.c_contiguous


def test_matrices_are_counted_by_their_sides_whatever_axis_holds_them():
    split = MatrixLayout(-1, -2, output_splits=3).on((6, 4))
    batch = MatrixLayout(0, 2).on((4, 3, 2))
    assert matrices_of(split) == matrices_of(batch) == ((3, 2, 4),)
    assert matrices_of(MatrixLayout(1, 0, (4, 2)).on((6, 4))) == ((1, 2, 4), (1, 4, 4))
