"""After ``train()`` an accelerated neuron is the plain one, whatever was done to the program."""

import importlib.util
from operator import attrgetter
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("numba", reason="needs numba: pip install numba")
from sj_taid import ALIFNode, accelerate
from sj_taid._internal import compat
from sj_taid.ops.step import compiled, record, reference, verify
from sj_taid.ops.step.plan import ENGINES, find_plan
from sj_taid.ops.step.program import Reading
from sj_taid.ops.step.readings import read_neuron
from tests.nets.own_neurons import Own, _Triangle
from tests.ops.step.test_read import check_equal, pair
from tests.test_compile import Operators, needs_2


def load_world():
    spec = importlib.util.spec_from_file_location("world", Path(__file__).with_name("world.py"))
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    return world


class Other(Own):
    def leak(self, v):
        return v * 0.1


def other_step(self, x, v):
    spike = self.surrogate_function(v + x * self.tilt - 0.4)
    return spike, v * 0.3 + x


def other_sequence(self, x_seq):
    self.v = x_seq.sum(0)
    return x_seq.flip(0) * 2


def without_gradients(self, x, v):
    return self.surrogate_function(v - 0.1), v * 0.2 + x * (1.0 + torch.is_grad_enabled())


def code_of(function, *path):
    """Sets a function's code, as a tool does that loads an edited file into a session."""
    return lambda world, nodes, patch: patch.setattr(
        attrgetter(".".join(path))(world), "__code__", function.__code__
    )


def of_cell(value, *path):
    """Sets a variable of the function that a function was made in."""
    return lambda world, nodes, patch: patch.setattr(
        attrgetter(".".join(path))(world).__closure__[0], "cell_contents", value
    )


def put(path, value):
    """Sets a name of the world, or of what has this path in it."""
    home, _, name = f"self.{path}".rpartition(".")
    return lambda world, nodes, patch: patch.setattr(
        attrgetter(home)(SimpleNamespace(self=world)), name, value, raising=False
    )


def of_torch(name, value, home=torch):
    return lambda world, nodes, patch: patch.setattr(home, name, value)


def of_each(edit):
    return lambda world, nodes, patch: [edit(node) for node in nodes]


EDITS = {
    "the step's code": code_of(other_step, "Neuron", "step"),
    "a helper's code": code_of(lambda x, gain=1.0, *, offset=0.0: x * 2 + offset, "helper"),
    "a method's code": code_of(lambda self, x: x * 0.7, "Neuron", "read_world"),
    "the step": put("Neuron.step", other_step),
    "a helper": put("helper", lambda x: x * 3),
    "defaults": put("helper.__defaults__", (2.0,)),
    "keyword defaults": put("helper.__kwdefaults__", {"offset": 0.5}),
    "a builtin that is shadowed": put("max", lambda *numbers: 0.3),
    "a global that is defined later": put("LATER", 0.4),
    "a global": put("GAIN", 0.2),
    "a global list": put("LIST", [2.0]),
    "an item": lambda world, nodes, patch: world.LIST.append(world.LIST.pop() * 3),
    "an item of a dict": lambda world, nodes, patch: patch.setitem(world.TABLE, "gain", 0.3),
    "an alias": put("squash", torch.relu),
    "a module's alias": put("maths", SimpleNamespace(pi=0.1)),
    "an imported name": put("sqrt", lambda x: 0.7),
    "a closure's cell": of_cell(0.7, "add"),
    "a scripted function": put("by_script", torch.neg),
    "a class's number": put("Config.gain", 0.1),
    "a class": put("Config", SimpleNamespace(gain=0.1, type=2.0)),
    "a metaclass": put("Meta.bias", property(lambda cls: 0.6)),
    "a Function's forward": put("Scale.forward", staticmethod(lambda ctx, x: x * 0.4)),
    "a Function's backward": put("Scale.backward", staticmethod(lambda ctx, grad: grad * 3)),
    "torch": of_torch("sin", torch.cos),
    "a tensor's method": of_torch("sigmoid", torch.Tensor.tanh, torch.Tensor),
    "a class attribute": put("Neuron.decay", 0.3),
    "a property": put("Neuron.rest", property(lambda self: 0.4)),
    "a method of the parent": put("Parent.leak", lambda self, v: v * 0.1),
    "a method": put("Neuron.leak", lambda self, v: v * 0.2),
    "a method that is no longer there": lambda world, nodes, patch: patch.delattr(
        world.Neuron, "leak"
    ),
    "a method under a decorator": of_cell(lambda self, v: v * 0.2, "Neuron", "fall"),
    "the parent": lambda world, nodes, patch: setattr(world.Neuron, "__bases__", (Other,)),
    "a surrogate's method": put("Spike.forward", lambda self, x: _Triangle.apply(x, 0.2)),
    "a surrogate's class method": put("Spike.width", classmethod(lambda cls: 0.3)),
    "a surrogate's class attribute": put("Spike.scale", -1.0),
    "the sequence": put("Neuron.multi_step_forward", other_sequence),
    "a step of the batch": put("Neuron.step", lambda self, x, v: (x + x.mean(), v + x)),
    "a step that asks for gradients": put("Neuron.step", without_gradients),
    "a step of random numbers": put("Neuron.step", lambda self, x, v: (x * 0 + 1, v * 0 + 2)),
    "the neuron's own step": of_each(lambda n: setattr(n, "step", MethodType(other_step, n))),
    "the surrogate's own forward": of_each(
        lambda n: setattr(n.surrogate_function, "forward", lambda x: _Triangle.apply(x, 0.2))
    ),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.filterwarnings("ignore:.*")
def test_after_train_an_accelerated_neuron_is_the_plain_one(name, monkeypatch):
    """Of its own class, of whose world one thing is edited, and put back."""
    world, x = load_world(), torch.randn(3, 2, 4, 2, 3)
    nodes = pair(world.Neuron())
    check_equal(*nodes, x=x)
    before = run(nodes[0], x)
    with monkeypatch.context() as patch:
        EDITS[name](world, nodes, patch)
        for node in nodes:
            node.train()
        check_equal(*nodes, x=x)
        assert not torch.equal(run(nodes[0], x), before)
    for node in nodes:
        node.eval()
    check_equal(*nodes, x=x)


def run(node, x):
    """Spikes, the last voltage and the gradient, in one tensor."""
    functional.reset_net(node)
    leaf = x.clone().requires_grad_()
    y = node(leaf)
    y.backward(torch.ones_like(y))
    functional.detach_net(node)
    return torch.cat([y.detach().flatten(), node.v.flatten(), leaf.grad.flatten()])


def other_lif(x_seq, v, *others, **options):
    return x_seq * 0.5, v + x_seq.sum(0), None


#: what is replaced of a class of SpikingJelly's: whose, its name, and by what
OF_LIBRARY = [
    (neuron.LIFNode, neuron.LIFNode, "multi_step_forward", other_sequence),
    (neuron.KLIFNode, surrogate.ATan, "forward", lambda self, x: _Triangle.apply(x, 0.7)),
]
if compat.FUNCTIONAL_STATES:
    home = neuron.LIFNode.multi_step_forward.__globals__["functional"]
    OF_LIBRARY.append((neuron.LIFNode, home, "lif_multi_step", other_lif))
else:
    charge = lambda self, x: setattr(self, "v", self.v * 0.3 + x)  # noqa: E731
    OF_LIBRARY.append((neuron.LIFNode, neuron.LIFNode, "neuronal_charge", charge))


@pytest.mark.parametrize(("kind", "home", "name", "value"), OF_LIBRARY)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_after_train_a_neuron_of_the_library_is_the_plain_one(kind, home, name, value, monkeypatch):
    plain, fast = pair(kind(v_threshold=0.3, surrogate_function=surrogate.ATan()))
    x = torch.randn(3, 2, 4, 2, 3)
    before = run(plain, x)
    with monkeypatch.context() as patch:
        patch.setattr(home, name, value)
        fast.train()
        check_equal(plain, fast, x=x)
        assert not torch.equal(run(plain, x), before)
    fast.train()
    check_equal(plain, fast, x=x)


def alif(**options):
    return ALIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan(), step_mode="m", **options)


@pytest.mark.parametrize("accelerates", [False, True])
@pytest.mark.parametrize("edit", ["charge", "a surrogate"])
def test_alif_reads_its_step_again(edit, accelerates, monkeypatch):
    node, x = alif(), torch.randn(3, 2, 4, 2, 3)
    if accelerates:
        accelerate(nn.Sequential(node))
    before = run(node, x)
    if edit == "charge":
        monkeypatch.setattr(reference, "charge", lambda x, v, *others: v * 0.3 + x)
    else:
        monkeypatch.setattr(
            surrogate.ATan, "forward", lambda self, x: _Triangle.apply(x - 0.2, 0.7)
        )
    node.train()
    found = run(node, x)
    node.backend = "torch"
    torch.testing.assert_close(found, run(node, x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("kinds", [(), (neuron.LIFNode,)])
def test_a_net_is_read_once_for_each_class_and_values_and_compiled_once(kinds, monkeypatch):
    """In graphs at once, for inputs of four numbers of axes."""
    net = nn.Sequential(*(neuron.LIFNode(v_threshold=0.5 + k % 2) for k in range(6)), alif())
    functional.set_step_mode(net, "m")
    accelerate(net)
    x, readings = torch.randn(3, 2, 3), []
    net(x)
    plans = find_plan.cache_info().misses
    monkeypatch.setattr(compiled, "KINDS", {*kinds})
    monkeypatch.setattr(record, "read", lambda *a, read=record.read: readings.append(a) or read(*a))
    for mode in (True, False):
        net.train(mode)
        functional.reset_net(net)
        net(x)
        assert len(readings) == (9 if kinds else 3)
        readings.clear()
    assert find_plan.cache_info().misses == plans


PASSING = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    MemoryError(),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", [*PASSING, ValueError("no number")], ids=repr)
@pytest.mark.parametrize("after", ["run_plan", "differs"])
def test_nothing_is_kept_of_a_passing_error_in_the_first_calls_check(error, after, monkeypatch):
    class Fresh(Own):
        def step(self, x, v):
            return self.surrogate_function(v + x), v * 0.5 + x

    def fail(*arguments):
        raise error

    def read():
        return read_neuron(node, (2, 3), compat.step_of(Fresh), ENGINES["cpu"], "cpu")

    node = Fresh()
    with monkeypatch.context() as patch:
        patch.setattr(verify, after, fail)
        if error in PASSING:
            with pytest.raises(type(error)) as info:
                read()
            assert info.value is error
        else:
            with pytest.warns(RuntimeWarning, match="Fresh: its step does not compile .ValueError"):
                refusal = read()
    assert isinstance(read(), Reading) if error in PASSING else read() == refusal


def test_a_first_call_in_a_captured_graph_keeps_nothing(monkeypatch):
    node = neuron.IFNode(v_threshold=0.123)
    about = node, (2, 3), compat.step_of(neuron.IFNode), ENGINES["cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="run one training step before capturing"):
            read_neuron(*about, torch.device("cuda", 0))
    assert isinstance(read_neuron(*about, "cpu"), Reading)


#: some edits in graphs, of which a changed reading is traced again
IN_GRAPHS = (
    *("nothing", "the step's code", "a helper", "defaults", "a global", "a Function's backward"),
    *("a surrogate's class method", "the sequence", "a step of the batch"),
)


@needs_2
@pytest.mark.parametrize("name", IN_GRAPHS)
@pytest.mark.filterwarnings("ignore:.*")
def test_after_train_a_graph_computes_what_the_step_does(name, monkeypatch):
    torch._dynamo.reset()
    world, x, operators = load_world(), torch.randn(3, 2, 4), Operators()
    plain, fast = pair(world.Neuron())
    in_graph = torch.compile(fast, backend=operators)
    check_equal(plain, in_graph, x=x)
    assert operators.found == 1
    with monkeypatch.context() as patch:
        EDITS.get(name, lambda *args: None)(world, (plain, fast), patch)
        fast.train()
        check_equal(plain, in_graph, x=x)
    assert operators.found == (
        1 if name in ("nothing", "the sequence", "a step of the batch") else 2
    )
    fast.train()
    check_equal(plain, in_graph, x=x)


def under_a_mode(net, x):
    with FlopCounterMode(display=False):
        return net.eval()(x)


WATCHED = {
    "vmap": lambda net, x: torch.func.vmap(lambda x: net.eval()(x), in_dims=1)(x.unsqueeze(2)),
    # SpikingJelly's own surrogates cannot be differentiated so.
    "grad": lambda net, x: torch.func.grad(lambda x: (net.eval(), x.sum())[1])(x),
    "a mode": under_a_mode,
    "a trace": lambda net, x: torch.jit.trace(lambda x: net.eval()(x), x, check_trace=False)(x),
}


@needs_2
@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.filterwarnings("ignore:.*")
def test_eval_where_torch_transforms_or_watches(name):
    torch._dynamo.reset()
    x, operators = torch.randn(3, 2, 4), Operators()
    plain, fast = pair(neuron.LIFNode())
    in_graph = torch.compile(fast, backend=operators)
    check_equal(plain, in_graph, x=x)
    for node in (plain, fast):
        node.reset()
    assert torch.equal(WATCHED[name](fast, x), WATCHED[name](plain, x))
    fast.train()
    torch._dynamo.reset()
    for node in (plain, fast):
        node.reset()
    check_equal(plain, in_graph, x=x)
    assert operators.found == 2
