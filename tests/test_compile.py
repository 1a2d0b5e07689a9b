"""torch.compile without graph breaks, autocast under it, export, and torch.func."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid import TAID, ALIFNode, accelerate, fresh_state, monitor
from sj_taid._internal import compat
from sj_taid.ops import backends
from tests.helpers import assert_equal
from tests.nets import own_neurons

needs_2 = pytest.mark.skipif(
    not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons"
)
OPTIONS = {
    "hard": {},
    "soft": {
        **{"v_reset": None, "decay_input": False, "detach_reset": True},
        **{"channels": 5, "min_v_threshold": 0.1, "store_v_seq": True},
    },
    "step": {"step_mode": "s"},
    "autocast": {},
}


def make_net(step_mode="m", surrogate_function=surrogate.ATan(), **options):
    shared = {"v_threshold": 0.2, "surrogate_function": surrogate_function}
    net = nn.Sequential(
        layer.Linear(4, 5), ALIFNode(**shared, **options), layer.Linear(5, 3), ALIFNode(**shared)
    )
    functional.set_step_mode(net, step_mode)
    return net


def inputs(step_mode="m"):
    return 4.0 * torch.randn((3, 8, 4) if step_mode == "m" else (8, 4))


def outputs_and_gradients(net, forward, x):
    with fresh_state(net):
        net.zero_grad()
        spikes = forward(x)
        spikes.square().sum().backward()
        v = net[1].v.detach()
    return {
        "spikes": spikes.detach(),
        "v": v,
        **{name: parameter.grad.clone() for name, parameter in net.named_parameters()},
    }


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPTIONS)
def test_compile_gives_equal_outputs_and_gradients(name):
    net, x = make_net(**OPTIONS[name]), inputs(OPTIONS[name].get("step_mode", "m"))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")
    forward = autocast(lambda x: net(x))
    expected = outputs_and_gradients(net, forward, x)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(net, compiled, x)
    assert expected["spikes"].sum() > 0
    for name in ("spikes", "v"):
        assert torch.equal(got.pop(name), expected.pop(name)), name
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Operators:
    """A backend of torch.compile that counts the neurons that are one operator."""

    def __init__(self):
        self.found = 0

    def __call__(self, graph, inputs):
        for node in graph.graph.nodes:
            self.found += node.target is torch.ops.sj_taid.neuron.default
        return graph


#: no tensors, counts, two states; many parameters, a buffer, a surrogate of one's own, three states
ACCELERATED = [
    *("LIFNode", "ILIFNode", "IzhikevichNode", own_neurons.GLIF, own_neurons.PerChannel),
    *(own_neurons.OwnSurrogate, own_neurons.ThreeStates),
]


@needs_2
@pytest.mark.parametrize("kind", [ALIFNode, *ACCELERATED])
def test_an_accelerated_neuron_is_one_operator(kind):
    kind = getattr(neuron, kind) if isinstance(kind, str) else kind
    net = nn.Sequential(layer.Conv2d(3, 4, 1), layer.BatchNorm2d(4), kind())
    functional.set_step_mode(net, "m")
    plain, x = copy.deepcopy(net), torch.randn(3, 2, 3, 4, 5)
    accelerate(net)
    operators, found = Operators(), []
    for forward, module in ((plain, plain), (torch.compile(net, backend=operators), net)):
        functional.reset_net(module)
        spikes = forward(x)
        spikes.square().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        found[-1]["spikes"] = spikes.detach()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert operators.found == 1


class Scaled(own_neurons.Refractory):
    """One with a parameter."""

    def __init__(self, surrogate_function):
        super().__init__(surrogate_function)
        self.scale = nn.Parameter(torch.rand(5))

    def step(self, x, *states):
        return super().step(x if self.scale is None else x * self.scale, *states)


#: what may change of a neuron after a graph of it was compiled
CHANGES = {
    "nothing": lambda node: None,
    "a number": lambda node: setattr(node, "v_threshold", 0.8),
    "a number of the surrogate": lambda node: setattr(node.surrogate_function, "alpha", 2.0),
    "one value": lambda node: setattr(node, "scale", nn.Parameter(torch.tensor(0.5))),
    "a shape": lambda node: setattr(node, "scale", nn.Parameter(torch.full((3, 5), 0.6))),
    "no parameter": lambda node: setattr(node, "scale", None),
    "float64": lambda node: node.double(),
    "a state's dtype": lambda node: setattr(node, "v", torch.full((3, 5), 0.3).double()),
}


@needs_2
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_whatever_changes_a_graph_computes_what_the_step_does(change):
    plain, x = Scaled(surrogate.Sigmoid()), torch.randn(4, 3, 5)
    fast, operators, found = copy.deepcopy(plain), Operators(), []
    accelerate(nn.Sequential(fast))
    compiled = torch.compile(fast, backend=operators)
    compiled(x)
    assert operators.found == 1
    functional.reset_net(fast)
    for node, run in ((plain, plain), (fast, compiled)):
        CHANGES[change](node)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sum().backward()
        found.append([y.detach(), leaf.grad, node.v.detach()])
    torch.testing.assert_close(found[1], found[0])


@needs_2
def test_a_forgotten_reset_is_an_error_in_a_graph():
    node = neuron.SimpleLIFNode(tau=2.0, decay_input=True, step_mode="m")
    accelerate(nn.Sequential(node))
    compiled = torch.compile(node, backend="aot_eager")
    compiled(torch.randn(4, 3, 5))
    with pytest.raises(RuntimeError, match="size"):
        compiled(torch.randn(4, 50, 5))


@needs_2
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_and_a_pickle_compile(copied, monkeypatch):
    charge = own_neurons.Refractory.step
    monkeypatch.setattr(own_neurons.Refractory, "step", lambda *args: charge(*args))
    net = nn.Sequential(nn.Linear(4, 5), own_neurons.Refractory())
    expected, x = copy.deepcopy(net), torch.randn(3, 8, 4)
    accelerate(net)
    compiled = torch.compile(copied(net), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected(x))


def test_compile_once_with_resets():
    net, x = nn.Sequential(make_net(), TAID(T=3)), inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(3):
        with fresh_state(net):
            compiled(x).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_once_with_a_monitor():
    net, x = make_net(), inputs()
    counter = CompileCounterWithBackend("aot_eager")
    with monitor(net) as watch:
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        graphs = []
        for _ in range(6):
            with fresh_state(net):
                spikes = compiled(x)
            graphs.append(counter.frame_count)
    assert graphs[2:] == graphs[2:3] * 4
    assert watch.layers()["3"].firing_rate == pytest.approx(spikes.mean().item())


@pytest.mark.filterwarnings("error:backend")
def test_exported_program_is_of_torch_alone():
    net, x = make_net(surrogate_function=surrogate.Sigmoid()).eval(), inputs()
    expected = net(x)
    functional.reset_net(net)
    program = torch.export.export(net, (x,))
    assert "sj_taid" not in str(program.graph)
    assert torch.equal(program.module()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_shares_graphs_between_batch_sizes(channels_last):
    node = ALIFNode(v_threshold=0.2, step_mode="m")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(node, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (2, 3, 5):
        x = 4.0 * torch.randn(3, n, 4, 6, 5)
        if channels_last:
            x = x.movedim(2, 4).contiguous().movedim(4, 2)
        with fresh_state(node):
            expected = node(x)
        with fresh_state(node):
            got = compiled(x)
        assert torch.equal(got, expected) and got.stride() == x.stride()
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs == graphs[:1] * 3


@pytest.mark.slow
def test_compile_without_a_fused_backend_warns_once(monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'numba'")

    monkeypatch.setitem(backends.BACKENDS, "numba", load)
    monkeypatch.setattr(backends, "_warned", set())
    net, x = make_net(), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match=r"No module named 'numba'.*pip install numba") as said:
        got = outputs_and_gradients(net, compiled, x)
        expected = outputs_and_gradients(net, net, x)
    assert len(said.list) == 1
    assert_equal(got, expected)


def test_func_gives_the_gradients_of_autograd_and_of_each_sample():
    # SpikingJelly's surrogates have no vmap rule where they fire.
    smooth = surrogate.Sigmoid(spiking=False)
    net, x = make_net(surrogate_function=smooth, min_v_threshold=0.2), inputs()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x):
        functional.reset_net(net)
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    expected = outputs_and_gradients(net, net, x)
    torch.testing.assert_close(
        torch.func.grad(loss)(parameters, x), {name: expected[name] for name in parameters}
    )
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x.unsqueeze(2))
    for i in range(x.shape[1]):
        alone = torch.func.grad(loss)(parameters, x[:, i : i + 1])
        torch.testing.assert_close({name: g[i] for name, g in per_sample.items()}, alone)
