"""torch.compile without graph breaks, autocast under it, and torch.func."""

import copy
import pickle
import shutil
from types import MethodType

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid import TAID, ALIFNode, accelerate, fresh_state, monitor
from sj_taid._internal import compat
from sj_taid.ops import backends
from tests.helpers import TOLERANCE, assert_equal
from tests.nets import own_neurons

OPTIONS = {
    "hard": {},
    "soft": {"v_reset": None, "decay_input": False},
    "channels": {"channels": 5, "detach_reset": True},
    "bounded": {"min_v_threshold": 0.1},
    "v_seq": {"store_v_seq": True},
    "step": {"step_mode": "s"},
}


def make_net(step_mode="m", surrogate_function=surrogate.ATan(), backend="auto", **options):
    shared = {"v_threshold": 0.2, "surrogate_function": surrogate_function, "backend": backend}
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compile_gives_equal_outputs_and_gradients(options):
    net, x = make_net(**options), inputs(options.get("step_mode", "m"))
    expected = outputs_and_gradients(net, net, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
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


ACCELERATED = [
    *("LIFNode", "ParametricLIFNode", "IFNode", "ILIFNode", "KLIFNode", "QIFNode", "EIFNode"),
    *("ComplementaryLIFNode", "CUBALIFNode", "IzhikevichNode", "TernaryLIFNode"),
]


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize("kind", [ALIFNode, *ACCELERATED, *own_neurons.OWN])
def test_an_accelerated_neuron_is_one_operator(kind):
    kind = getattr(neuron, kind) if isinstance(kind, str) else kind
    node = kind()
    net = nn.Sequential(layer.Conv2d(3, 4, 1), layer.BatchNorm2d(4), node)
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


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize(("name", "value"), [("tau", 5.0), ("v_reset", None), ("alpha", 4.0)])
def test_a_change_after_compile_is_seen(name, value):
    node = neuron.LIFNode(v_threshold=0.2, surrogate_function=surrogate.ATan())
    net = nn.Sequential(layer.Linear(4, 5), node)
    functional.set_step_mode(net, "m")
    plain, x, found = copy.deepcopy(net), torch.randn(3, 8, 4), []
    accelerate(net)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x)
    for forward, module in ((plain, plain), (compiled, net)):
        functional.reset_net(module)
        setattr(module[1].surrogate_function if name == "alpha" else module[1], name, value)
        spikes = forward(x)
        spikes.square().sum().backward()
        found.append([spikes.detach(), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("of", ["neuron", "surrogate"])
def test_a_replaced_method_is_seen_in_a_graph(of, when):
    sigmoid = type("Own", (surrogate.Sigmoid,), {})
    kind = type("Own", (own_neurons.Refractory,), {})
    net = nn.Sequential(nn.Linear(4, 5), kind(surrogate_function=sigmoid()))
    plain, x, operators = copy.deepcopy(net), torch.randn(3, 8, 4), Operators()
    assert accelerate(net).rows[0].done
    compiled = torch.compile(net, backend=operators)
    if when == "after":
        compiled(x)
        assert operators.found == 1
    if of == "neuron":
        kind.step = lambda self, x, *states: super(kind, self).step(0.25 * x, *states)
    else:
        sigmoid.forward = lambda self, x: surrogate.Sigmoid.forward(self, x - 0.3)
    functional.reset_net(net)
    torch.testing.assert_close(compiled(x), plain(x))


class Scaled(own_neurons.Refractory):
    """One with a parameter."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(scale)

    def step(self, x, *states):
        return super().step(x if self.scale is None else x * self.scale, *states)


def set_step(node):
    node.step = MethodType(lambda self, x, *states: type(self).step(self, 2 * x, *states), node)


#: what may change of a neuron after accelerate
CHANGES = {
    "nothing": lambda node: None,
    "one value": lambda node: setattr(node, "scale", nn.Parameter(torch.tensor(0.5))),
    "a shape": lambda node: setattr(node, "scale", nn.Parameter(torch.full((3, 5), 0.6))),
    "no parameter": lambda node: setattr(node, "scale", None),
    "float64": lambda node: node.double(),
    "an own function": set_step,
    "a state's dtype": lambda node: setattr(node, "v", torch.full((3, 5), 0.3).double()),
}


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize("scale", [torch.rand(5), torch.tensor(0.7)], ids=["channels", "one"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_whatever_changes_a_graph_computes_what_the_step_does(change, scale):
    plain, x = Scaled(scale), torch.randn(4, 3, 5)
    fast = copy.deepcopy(plain)
    accelerate(nn.Sequential(fast))
    compiled, found = torch.compile(fast, backend="aot_eager"), []
    compiled(x)
    functional.reset_net(fast)
    for node, run in ((plain, plain), (fast, compiled)):
        CHANGES[change](node)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sum().backward()
        found.append([y.detach(), leaf.grad, node.v.detach()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize("batch", [2, 50])
def test_a_forgotten_reset_is_an_error_in_a_graph(batch):
    node = neuron.SimpleLIFNode(tau=2.0, decay_input=True, step_mode="m")
    accelerate(nn.Sequential(node))
    compiled = torch.compile(node, backend="aot_eager")
    compiled(torch.randn(4, 3, 5))
    with pytest.raises(RuntimeError, match="size"):
        compiled(torch.randn(4, batch, 5))


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 breaks graphs at its neurons")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_and_a_pickle_compile(copied, monkeypatch):
    charge = own_neurons.Refractory.step
    monkeypatch.setattr(own_neurons.Refractory, "step", lambda *args: charge(*args))
    net = nn.Sequential(nn.Linear(4, 5), own_neurons.Refractory())
    expected, x = copy.deepcopy(net), torch.randn(3, 8, 4)
    accelerate(net)
    compiled = torch.compile(copied(net), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected(x))


@pytest.mark.slow
def test_compile_under_autocast():
    net, x = make_net(), inputs()
    forward = torch.autocast("cpu", torch.bfloat16)(lambda x: net(x))
    expected = outputs_and_gradients(net, forward, x)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(net, compiled, x)
    assert got["spikes"].dtype == torch.bfloat16 and got["v"].dtype == torch.float32
    assert_equal(got, expected)


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with g++")
def test_compile_with_inductor():
    net, x = make_net("s"), inputs("s")
    expected = outputs_and_gradients(net, net, x)
    got = outputs_and_gradients(net, torch.compile(net, fullgraph=True), x)
    assert torch.equal(got.pop("spikes"), expected.pop("spikes"))
    for name, want in expected.items():
        bound = TOLERANCE[torch.float32]["value"] * max(1.0, want.abs().max().item())
        assert (got[name] - want).abs().max() <= bound, name


class Triangle(torch.autograd.Function):
    """A surrogate that torch.func can take apart; SpikingJelly's own have no vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1.0 - x.abs()).clamp(min=0.0)


def test_func_gives_the_gradients_of_autograd_and_of_each_sample():
    net, x = make_net(surrogate_function=Triangle.apply, backend="torch"), inputs()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x):
        functional.reset_net(net)
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    expected = outputs_and_gradients(net, net, x)
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        assert torch.equal(gradient, expected[name]), name
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x.unsqueeze(2))
    functional.reset_net(net)
    for i in range(x.shape[1]):
        expected = torch.func.grad(loss)(parameters, x[:, i : i + 1])
        for name, gradient in per_sample.items():
            torch.testing.assert_close(gradient[i], expected[name])
