"""The command that counts how many files a step passes through."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import crossings


def calls_of(tmp_path, monkeypatch, *, first, second):
    """What is counted while `run` of the first file runs."""
    monkeypatch.setattr(crossings, "PACKAGES", (f"{tmp_path}/",))
    monkeypatch.setattr(crossings, "ROOT", tmp_path)
    names: dict[str, object] = {}
    for name, source in (("second.py", second), ("first.py", first)):
        exec(compile(source, str(tmp_path / name), "exec"), names)
    run, calls = names["run"], crossings.Calls()
    assert callable(run)
    before = sys.getprofile()
    sys.setprofile(calls)
    try:
        run()
    finally:
        sys.setprofile(before)
    return {Path(each).name for each in calls.files}, dict(calls.crossings)


def test_a_call_of_another_file_is_a_crossing_and_one_within_a_file_is_none(tmp_path, monkeypatch):
    second = "def other(): return same()\ndef same(): return 1"
    files, found = calls_of(
        tmp_path, monkeypatch, first="def run(): return other() + other()", second=second
    )
    assert files == {"first.py", "second.py"}
    assert found == {("first.py", "second.py"): 2}


def test_a_generator_counts_once(tmp_path, monkeypatch):
    _, found = calls_of(
        tmp_path,
        monkeypatch,
        first="def run(): return [*numbers()]",
        second="def numbers():\n yield 1\n yield 2\n yield 3",
    )
    assert found == {("first.py", "second.py"): 1}


def test_a_call_by_way_of_a_library_is_none(tmp_path, monkeypatch):
    files, found = calls_of(
        tmp_path,
        monkeypatch,
        first="import json\ndef run(): return json.dumps(object(), default=other)",
        second="def other(x): return 1",
    )
    assert files == {"first.py", "second.py"}
    assert found == {}


def test_the_command_counts_a_step(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    command = [sys.executable, "-m", "benchmarks.crossings", "--case", "one weight", "--pairs"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, *pairs = printed.splitlines()
    found = re.fullmatch(r"one weight: (\d+) files, (\d+) crossings, (\d+) launches", first)
    assert found
    files, crossed, launches = map(int, found.groups())
    # Five steps of the polynomial on a whole matrix take fifteen products, beside the other kernels.
    assert launches >= 20
    assert sum(int(line.split()[0]) for line in pairs) == crossed
    assert len({name for line in pairs for name in line.split()[1::2]}) <= files
    assert any(
        line.split()[1:] == ["normuon_core/fused_step.py", "->", "normuon_core/kernels/launches.py"]
        for line in pairs
    )
