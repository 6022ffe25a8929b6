"""The example as a run of several processes, which are started as on a cluster."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.__main__ import main
from examples.errors import BadInput
from examples.gpt import GPTConfig, apply_with_largest_logits, first_parameters
from examples.mesh import read_mesh
from examples.processes import join
from examples.runs import read_run
from examples.word_problems import write_problems

ROOT = Path(__file__).parents[2]
# Of these sizes DPO stops with Gloo's error where its two passes through the blocks are loops.
SIZES = ["--batch=4", "--steps=4", "--evaluate-every=2", "--evaluation-batches=2"]
MODEL = ["--width=32", "--depth=2", "--heads=4", "--kv-heads=2", "--context=128", "--scan=True"]
DATA = {"pretrain": "text", "sft": "sft.jsonl", "dpo": "pairs.jsonl"}
MEASURED = 9.6e-7  # the largest difference of a loss below, in nats
TIMEOUT = 180
EACH_IN_TURN = """
import json, sys
from examples.__main__ import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0
"""


def commands(problems, output, starts):
    """The three phases, one after the other; a phase starts from what lies in `starts`."""
    told, before = [], None
    for phase, rows in DATA.items():
        start = MODEL if before is None else [str(starts / before)]
        data = f"--data={problems / rows}"
        samples = f"--samples={int(phase == 'dpo')}"
        told.append([phase, *start, data, f"--output={output / phase}", samples, *SIZES])
        before = phase
    return told


def started(told, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", EACH_IN_TURN, json.dumps(told)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    printed, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return printed, errors


def losses(output):
    run = read_run(output)
    evaluated = [each.validation_loss for each in run.evaluations]
    return np.array([*run.losses.values(), *evaluated])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_all_phases_on_two_processes_have_the_losses_of_one_and_the_first_alone_speaks(tmp_path):
    problems = tmp_path / "problems"
    write_problems(problems, count=100, held_out=2)
    together = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = []
    for i, output in enumerate(outputs):
        told = [[*each, "--mesh=fsdp=2"] for each in commands(problems, output, outputs[0])]
        processes.append(started(told, JAX_PROCESS_ID=str(i), **together))
    try:
        with jax.numpy_dtype_promotion("standard"):
            for command in commands(problems, tmp_path / "alone", tmp_path / "alone"):
                assert main(command) == 0
        (first, _), (second, _) = [finished(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for phase in DATA:
        alone, divided = losses(tmp_path / "alone" / phase), losses(outputs[0] / phase)
        np.testing.assert_allclose(divided, alone, rtol=0, atol=4 * MEASURED, err_msg=phase)
        assert alone[-1] < alone[-3], phase
    assert first.count("2 processes") == 3
    assert all(line.startswith("[Gloo]") for line in second.splitlines())
    assert not outputs[1].exists()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("127.0.0.1:1", None, 0), "--processes missing"),
        ((None, 2, None), "--coordinator and --process missing"),
        (("127.0.0.1:1", 2, 2), "--process 2 is none of 0 to 1"),
    ],
)
def test_half_of_what_a_process_must_know_is_an_error(told, said):
    with pytest.raises(BadInput, match=said):
        join(*told)


def test_without_arguments_a_process_stays_alone():
    join(None, None, None)
    assert not jax.distributed.is_initialized()


def test_over_processes_on_cpus_no_loop_goes_through_a_stack_of_blocks(monkeypatch):
    config = GPTConfig(width=8, heads=1, context=4, vocabulary=8, scan=True)
    params = jax.eval_shape(lambda: first_parameters(config, 0))
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")

    def loops():
        program = jax.jit(lambda params, tokens: apply_with_largest_logits(config, params, tokens))
        return program.lower(params, tokens).as_text().count("stablehlo.while")

    assert loops() == 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert loops() == (jax.default_backend() != "cpu") * 2


def test_several_processes_share_all_their_devices(monkeypatch):
    assert read_mesh("fsdp=4").size == 4
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(BadInput, match="4 devices, but JAX has 8.*JAX_NUM_CPU_DEVICES=2 in every"):
        read_mesh("fsdp=4")
