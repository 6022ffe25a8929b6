"""The command that times the host's part of a step runs without a GPU."""

import re
import subprocess
import sys

import pytest


def test_the_host_time_of_a_step_is_printed():
    """In a process of its own: launches are remembered, and here they are of kernels that do nothing."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    command = [sys.executable, "-m", "benchmarks.host_time", "--steps", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(
        r"GPT-2 124M, normuon, \d+ cores: median [\d.]+ ms, least [\d.]+ ms of 2 steps\n", printed
    )
