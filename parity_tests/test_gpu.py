"""What only a GPU can show of the kernels, beside the bits that `test_bitwise.py` compares."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from normuon_core import MatrixLayout
from normuon_core.kernels.products import KernelProducts
from optax_normuon import normuon, polar_factor
from parity_tests.compare import frobenius_distance
from torch_ref import NorMuon
from torch_ref.kernels import launcher
from torch_ref.steps import fused

pytestmark = pytest.mark.gpu

SHAPES = [(96, 200), (200, 96), (3, 64, 64), (7, 5)]
OUT_IN = MatrixLayout(-1, -2)


@pytest.fixture(autouse=True)
def _first_device():
    """JAX leaves another of several devices current, and PyTorch would make a capture's stream there."""
    torch.cuda.set_device(0)


def torch_training(**keywords):
    """(parameters with gradients, an optimizer of matrices and AdamW), the same at every call."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, device="cuda")

    params = [torch.nn.Parameter(draw(shape)) for shape in (*SHAPES, (11,))]
    for param in params:
        param.grad = draw(param.shape)
    groups = [
        {"params": params[:-1], "layout": OUT_IN},
        {"params": params[-1:], "optimizer": "adamw", "adam_weight_decay": 0.1},
    ]
    keywords = {"lr": 0.02, "weight_decay": 0.1, "backend": "triton", **keywords}
    return params, NorMuon(groups, **keywords)


def test_a_captured_step_replays_to_the_bits_of_steps():
    captured, in_graph = torch_training()
    stepped, plain = torch_training()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        in_graph.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        plain.step()
    for ours, theirs in zip(captured, stepped, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("recipe", ["normuon", "optax_muon"])
def test_a_resumed_step_is_captured_at_once_and_replays_to_the_bits_of_steps(backend, recipe):
    """A warm-up step would change the weights, so there is none: the kernels are compiled already."""
    params, first = torch_training(backend=backend, recipe=recipe)
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save([first.state_dict(), [param.detach() for param in params]], file)
    runs = []
    for _ in range(2):
        others, resumed = torch_training(backend=backend, recipe=recipe)
        file.seek(0)
        state, saved = torch.load(file, weights_only=True, map_location="cpu")
        resumed.load_state_dict(state)
        with torch.no_grad():
            for param, value in zip(others, saved, strict=True):
                param.copy_(value)
        runs.append((others, resumed))
    (captured, in_graph), (stepped, plain) = runs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    for ours, theirs in zip(captured, stepped, strict=True):
        assert torch.equal(ours, theirs)
        for key, value in in_graph.state[ours].items():
            assert torch.equal(value, plain.state[theirs][key]), key
    assert all(state["step"] == 5 for state in in_graph.state.values())


def test_a_multiplier_changes_where_a_graph_has_captured_it():
    captured, in_graph = torch_training()
    stepped, plain = torch_training()
    in_graph.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    graph.replay()
    for _ in range(2):
        plain.step()
    for optimizer in (in_graph, plain):
        optimizer.param_groups[0]["lr_mul"] = 0.5
        optimizer.step()
    # The graph still reads the same memory, so its next replay takes the new number.
    graph.replay()
    plain.step()
    for ours, theirs in zip(captured, stepped, strict=True):
        assert torch.equal(ours, theirs)


def test_a_first_step_launches_kernels_that_are_compiled(monkeypatch):
    from triton.runtime.jit import JITFunction

    late, launch = [], fused.launch

    def counting(*arguments):
        with pytest.MonkeyPatch.context() as patched:
            compile_now = JITFunction._do_compile

            def compiled(kernel, *own):
                late.append(kernel)
                return compile_now(kernel, *own)

            patched.setattr(JITFunction, "_do_compile", compiled)
            return launch(*arguments)

    monkeypatch.setattr(fused, "launch", counting)
    # Sizes of no other test, so that this process has none of the kernels.
    params = [torch.nn.Parameter(torch.randn(72, 312, device="cuda")) for _ in range(3)]
    for param in params:
        param.grad = torch.randn_like(param)
    NorMuon(params, 0.02, layout=OUT_IN, backend="triton").step()
    assert not late


def test_rates_on_the_gpu_change_between_replays():
    rates = {"lr": torch.tensor(0.02), "weight_decay": torch.tensor(0.1)}
    rates = {name: rate.cuda() for name, rate in rates.items()}
    captured, in_graph = torch_training(**rates)
    stepped, plain = torch_training()
    in_graph.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    rates["lr"].fill_(0.005)
    rates["weight_decay"].fill_(0.4)
    graph.replay()
    plain.step()
    for group in plain.param_groups:
        group["lr"] = 0.005
        if group["optimizer"] == "normuon":
            group["weight_decay"] = 0.4
    plain.step()
    for ours, theirs in zip(captured, stepped, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("recipe", ["normuon", "optax_muon"])
def test_a_step_never_waits_for_the_gpu(backend, recipe):
    _, optimizer = torch_training(backend=backend, recipe=recipe)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def jax_training():
    rng = np.random.default_rng(0)
    draw = {str(s): jnp.asarray(rng.standard_normal((2, *s)), jnp.float32) for s in SHAPES}
    params, grads = ({name: x[i] for name, x in draw.items()} for i in range(2))
    return normuon(0.02, layout=OUT_IN, weight_decay=0.1, backend="triton"), params, grads


def test_scan_vmap_and_shard_map_keep_the_bits():
    tx, params, grads = jax_training()

    def steps(scale):
        def one(carry, _):
            params, state = carry
            scaled = jax.tree.map(lambda g: g * scale, grads)
            updates, state = tx.update(scaled, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), None, length=3)[0][0]

    scales = jnp.asarray([1.0, -2.0])
    alone = [jax.jit(steps)(scale) for scale in scales]
    together = jax.jit(jax.vmap(steps))(scales)
    mesh = jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Explicit,))
    everywhere = jax.P()
    mapped = jax.shard_map(
        steps, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    for index, wanted in enumerate(alone):
        in_map = jax.jit(mapped)(scales[index])
        for name in params:
            np.testing.assert_array_equal(together[name][index], wanted[name])
            np.testing.assert_array_equal(in_map[name], wanted[name])
    assert (np.asarray(alone[0]["(96, 200)"]) != np.asarray(alone[1]["(96, 200)"])).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_products_are_as_exact_as_the_vendors(dtype):
    """Error of A B + 2 B against float64, A symmetric: at most that of cuBLAS with float32 sums."""
    count, short, long = 3, 200, 1000
    generator = torch.Generator("cuda").manual_seed(0)
    kind = getattr(torch, dtype)
    a = torch.randn(count, short, short, generator=generator, device="cuda")
    a = (a + a.mT).to(kind)
    x = torch.randn(count, short, long, generator=generator, device="cuda").to(kind)
    device = launcher.describe_device(x.device)
    products = KernelProducts(launcher.launch, device, count, short, long, dtype)
    ours = products.apply(a, x, alpha=1.0, addend=2.0)
    theirs = (torch.bmm(a, x, torch.float32) + 2 * x.float()).to(kind)
    exact = (a.double() @ x.double() + 2 * x.double()).cpu()
    errors = [frobenius_distance(y.double().cpu(), exact) for y in (ours, theirs)]
    assert errors[0] <= 1.01 * errors[1]


def test_products_of_a_stack_of_more_than_two_to_the_31_entries_are_right():
    count, short, long = 1100, 1024, 2048
    assert count * short * long > 2**31
    x = torch.zeros(count, short, long, dtype=torch.float16, device="cuda")
    x[-1] = torch.randn(short, long, device="cuda")
    device = launcher.describe_device(x.device)
    products = KernelProducts(launcher.launch, device, count, short, long, "float16")
    s = torch.zeros(count, short, short, dtype=torch.float16, device="cuda")
    s[-1] = 2 * torch.eye(short, device="cuda")
    assert torch.equal(products.apply(s, x, alpha=1.0)[-1], 2 * x[-1])
    assert products.gram(x, alpha=1.0)[:-1].abs().max() == 0


def test_a_kernels_first_launch_is_right():
    """A launch that also compiles: no other test uses this shape, and nothing runs before it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 72, 344)), jnp.float32)
    keywords = dict(compute_dtype=jnp.float16, algorithm="standard")
    ours, theirs = (polar_factor(x, backend=b, **keywords) for b in ("triton", "xla"))
    assert frobenius_distance(ours, theirs) < 5e-3


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_two_gpus_make_the_bits_of_one(param_dtype):
    """Fifty steps, parameters and state. `test_sharded_kernels.py` does it on more virtual devices."""
    layout = MatrixLayout(reduction_axis=-2, output_axis=-1)
    shapes = {"a": (256, 768), "b": (256, 768), "c": (768, 256), "d": (3, 96, 320), "e": (130, 64)}
    specs = dict.fromkeys(shapes, jax.P("fsdp")) | {"d": jax.P(None, None, "fsdp")}
    tx = normuon(0.02, layout=layout, weight_decay=0.1, algorithm="standard", backend="triton")

    def steps(count):
        mesh = jax.make_mesh(
            (count,),
            ("fsdp",),
            axis_types=(jax.sharding.AxisType.Explicit,),
            devices=jax.devices()[:count],
        )

        def draw(seed):
            rng = np.random.default_rng(seed)
            return {
                name: jax.device_put(
                    rng.standard_normal(shape).astype(param_dtype),
                    jax.NamedSharding(mesh, specs[name]),
                )
                for name, shape in shapes.items()
            }

        @jax.jit
        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = draw(0)
        state = tx.init(params)
        for seed in range(1, 51):
            params, state = step(draw(seed), state, params)
        return jax.tree.map(np.asarray, (params, state))

    jax.tree.map(np.testing.assert_array_equal, steps(1), steps(2))
