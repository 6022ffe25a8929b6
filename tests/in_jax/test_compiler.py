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
    compiled = json.loads(done.stdout)
    # Both halves of the table: tiles of 256 columns in bfloat16, of 128 in float16.
    assert {tuple(each["dtypes"]) for each in compiled} == {("bf16",), ("f16",)}
    for each in compiled:
        assert each["module"].endswith("hopper"), each
        # Two groups of four warps that multiply, and a group that one warp of loads.
        assert each["warps"] == 12, each
        assert each["shared"] <= SHARED_BYTES_OF_A_MULTIPROCESSOR, each
        assert each["products"] > 0, each
        assert each["loads"] > 0, each
