"""Routing of leaves that can be read in two ways."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_normuon
from optax_normuon import MatrixLayout, describe, layout_by_path, normuon
from optax_normuon.leaves.layout import find_routes, resolve_layouts
from tests.in_jax.routing import ADAMW, outcome, shapes
from tests.in_jax.tables import leaf_rows, read_table, unfolded


def ask(params, layout=None):
    """What the error says below its table, and the layout that it says to paste."""
    with pytest.raises(ValueError, match="in more than one way") as raised:
        normuon(0.1, layout=layout).init(params)
    _, table, question = str(raised.value).split("\n\n")
    # The table that is printed says the same, and asks the same.
    printed = describe(params, layout)
    assert question in printed
    columns, asked = read_table(table)
    doubts = {row[0] for row in asked if row[columns.index("optimizer")] == "?"}
    assert doubts
    doubts = {path for folded in doubts for path in unfolded(folded)}
    assert doubts == {p for p, row in leaf_rows(printed).items() if row["optimizer"] == "?"}
    (written,) = re.findall(r"layout=(.*?\}\))$", question, flags=re.MULTILINE | re.DOTALL)
    return question, eval(written, {"optax_normuon": optax_normuon})


def test_a_kernel_with_two_readings_is_refused_with_a_line_to_paste():
    params = shapes({"mixer": {"kernel": (3, 12, 20)}, "up": {"kernel": (12, 20)}})
    message, layout = ask(params)
    assert "mixer/kernel: shape (3, 12, 20)" in message
    assert (
        "3 linear layers, 12 in, 20 out: MatrixLayout(reduction_axis=-2, output_axis=-1)" in message
    )
    assert "a 1-D convolution, 36 in, 20 out: MatrixLayout(reduction_axis=(-3, -2)" in message
    assert outcome(params, layout) == {"mixer/kernel": "3 x (20, 12)", "up/kernel": "1 x (20, 12)"}
    # Every reading that is printed can be pasted.
    for reading, expected in [
        (MatrixLayout((-3, -2), -1), "1 x (20, 36)"),
        (MatrixLayout(-3, (-2, -1)), "1 x (240, 3)"),
        (None, ADAMW),
    ]:
        assert (
            outcome(params, layout_by_path({"mixer/kernel": reading}))["mixer/kernel"] == expected
        )


@pytest.mark.parametrize("name", ["mixer[0]", "mixer*", "Mixer"])
def test_the_line_to_paste_means_its_own_leaf_alone(name):
    params = shapes({name: {"kernel": (3, 12, 20)}, "mixer0": {"conv": {"kernel": (3, 12, 20)}}})
    _, layout = ask(params)
    assert outcome(params, layout) == {
        f"{name}/kernel": "3 x (20, 12)",
        "mixer0/conv/kernel": "1 x (20, 36)",
    }


AMBIGUOUS = {
    "an unnamed stack": {"layers": {"wq": {"kernel": (3, 12, 8)}}},
    "square heads": {"q_proj": {"kernel": (8, 8, 8)}, "o_proj": {"kernel": (8, 8, 8)}},
    "an attention kernel alone": {"query": {"kernel": (12, 2, 4)}},
    "a DenseGeneral without bias": {"DenseGeneral_0": {"kernel": (12, 2, 4)}},
    "a stacked convolution without bias": {"ScanBlock_0": {"conv": {"kernel": (3, 4, 6, 20)}}},
}


@pytest.mark.parametrize("tree", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_path_and_shape_do_not_settle_is_asked(tree):
    params = shapes(tree)
    _, layout = ask(params)
    assert "?" not in outcome(params, layout).values()


# Leaves whose first name misleads, with the right outcome; asking about them is right as well.
CONTRADICTIONS = {
    # The bias beside the kernel is no stack, so the kernel is not one either.
    "a ConvTranspose named up": ({"up": {"kernel": (2, 2, 6, 20), "bias": (20,)}}, "1 x (20, 24)"),
    "a 1x1 Conv named query": ({"query": {"kernel": (1, 1, 6, 20), "bias": (20,)}}, "1 x (20, 6)"),
    "a Conv named gate": ({"gate": {"kernel": (3, 12, 20), "bias": (20,)}}, "1 x (20, 36)"),
    # The scanned axis is the second, as in MaxText.
    "a scan over axis 1": ({"Dense_0": {"kernel": (12, 3, 20), "bias": (20, 3)}}, "3 x (20, 12)"),
    # Stored (out, in, ...), as the rule for a single `weight` knows.
    "a stack of weights": ({"layers": {"fc1": {"weight": (3, 20, 12)}}}, "3 x (20, 12)"),
    "a convolution weight": ({"conv": {"weight": (20, 6, 3, 3)}}, "1 x (20, 54)"),
}


@pytest.mark.parametrize(("tree", "right"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_name_does_not_overrule_what_the_shapes_say(tree, right):
    params = shapes(tree)
    table = outcome(params)
    if "?" in table.values():
        ask(params)
        return
    assert {cell for path, cell in table.items() if "bias" not in path} == {right}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["mixer", "query", "o_proj", "Conv_0", "Dense_0", "w", "proj", "blocks"]),
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=5).map(tuple),
    bias=st.one_of(st.none(), st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)),
)
def test_every_kernel_is_routed_or_asked_about_and_the_answer_is_taken(name, shape, bias):
    params = shapes({name: {"kernel": shape} | ({} if bias is None else {"bias": bias})})
    routes = find_routes(None, params)
    doubts = [found for found in routes.values() if found.in_doubt]
    if doubts:
        with pytest.raises(ValueError, match="more than one way") as raised:
            resolve_layouts(None, params)
        for reading in doubts[0].readings:
            assert f"{reading.meaning}: {reading.layout}" in str(raised.value)
        routes = find_routes(
            layout_by_path({f"{name}/kernel": doubts[0].readings[0].layout}), params
        )
    (kernel,) = (found for path, found in routes.items() if path[-1].key == "kernel")
    assert not kernel.in_doubt
    if kernel.layout is None:
        assert name == "Conv_0" or "vectors" in kernel.why or "embedding" in kernel.why
    else:
        assert np.prod(kernel.layout.on(shape).stack_shape) == np.prod(shape)
