"""The product for Hopper compiles on a machine without a GPU, in every form that an iteration uses."""

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES_OF_A_MULTIPROCESSOR = 227 * 1024


def test_every_product_of_an_iteration_compiles_for_hopper():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.in_jax.compiled_products"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # The table may prefer the other kernel for some sizes, and not for most.
    compiled = [each for each in json.loads(done.stdout) if each["module"].endswith("hopper")]
    assert len(compiled) >= 4
    assert {tuple(each["dtypes"]) for each in compiled} == {("bf16",), ("f16",)}
    for each in compiled:
        # Two groups of four warps that multiply, and a group that one warp of loads.
        assert each["warps"] == 12, each
        assert each["shared"] <= SHARED_BYTES_OF_A_MULTIPROCESSOR, each
        assert each["products"] > 0, each
        assert each["loads"] > 0, each
