"""`torch.compile` around the step: it stays outside the graph, says so, and makes the eager bits."""

import pytest
import torch

from torch_ref import NorMuon


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> torch.nn.Module:
    """Matrices of one shape and of another, and biases: every kind of state."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)]
    return torch.nn.Sequential(*layers)


def optimizer(net: torch.nn.Module) -> NorMuon:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": biases, "optimizer": "adamw", "lr": 0.01}]
    return NorMuon(groups, lr=0.02, weight_decay=0.1)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 8, generator=generator) for _ in range(3)]


def train(how: str, *, eager_steps: int = 0) -> list[torch.Tensor]:
    """Parameters and states after three steps, `how` saying what is compiled."""
    net = model()
    each = optimizer(net)

    def training_step(x):
        net(x).square().sum().backward()
        each.step()
        each.zero_grad()

    def with_closure(x):
        def closure():
            each.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            return loss

        return each.step(closure)

    compiled_step = torch.compile(each.step, backend="eager")

    def only_the_step(x):
        net(x).square().sum().backward()
        compiled_step()
        each.zero_grad()

    run = {
        "step": only_the_step,
        "training step": torch.compile(training_step, backend="eager"),
        "closure": torch.compile(with_closure, backend="eager"),
        "nothing": training_step,
    }[how]
    for index, x in enumerate(batches()):
        (training_step if index < eager_steps else run)(x)
    states = [each.state[p] for p in net.parameters()]
    return [*net.parameters(), *(state[key] for state in states for key in sorted(state))]


@pytest.mark.parametrize("eager_steps", [0, 1])
@pytest.mark.parametrize("how", ["step", "training step", "closure"])
def test_a_compiled_step_is_the_eager_step(how, eager_steps):
    found, wanted = train(how, eager_steps=eager_steps), train("nothing")
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_whole_graph_is_refused_and_told_why():
    net = model()
    each = optimizer(net)
    net(batches()[0]).square().sum().backward()
    compiled = torch.compile(lambda: each.step(), backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="NorMuon steps outside compiled graphs"
    ):
        compiled()
    assert not each.state


def test_a_compiled_model_is_still_compiled_within_a_closure():
    """The step stays outside of graphs; what the closure calls does not."""
    net, graphs = model(), []

    def backend(graph, inputs):
        del inputs
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend)
    each = optimizer(net)

    def closure():
        each.zero_grad()
        loss = compiled(batches()[0]).square().sum()
        loss.backward()
        return loss

    each.step(closure)
    assert graphs
