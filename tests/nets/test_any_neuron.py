"""``accelerate`` of all neurons of SpikingJelly's and of one's own, next to the plain net."""

import copy
import pickle
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("numba", reason="needs numba: pip install numba")
import sj_taid
from sj_taid._internal import graph
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.fused_neuron import Accelerated
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.nets import own_neurons
from tests.nets.own_neurons import (
    GLIF,
    OWN,
    AdaptiveThreshold,
    PerChannel,
    Refractory,
    Ternary,
    ThreeStates,
)

#: SpikingJelly's neurons whose own step is read
READ = (
    *("IFNode", "LIFNode", "ParametricLIFNode", "KLIFNode", "QIFNode", "EIFNode", "IzhikevichNode"),
    *("ILIFNode", "CUBALIFNode", "ComplementaryLIFNode", "RAFNode", "TernaryIFNode"),
    *("SimpleIFNode", "TernaryLIFNode", "HalfThresholdIFNode", "SimpleLIFNode"),
)


def theirs(name, **options):
    if name == "SimpleLIFNode":
        options |= {"tau": 3.0, "decay_input": True}
    node = getattr(neuron, name)(**options)
    node.step_mode = "m"
    return node


MAKERS = {name: partial(theirs, name) for name in READ if hasattr(neuron, name)}
MAKERS |= {kind.__name__: kind for kind in OWN}
if FUNCTIONAL_STATES:
    fires = MultiLevelSpikeCount(4, grad_window=(-0.5, 3.25))
    integer = partial(theirs, "ILIFNode", v_threshold=0.3, surrogate_function=fires)
    MAKERS["ILIFNode, window"] = integer
    MAKERS["ILIFNode, detached"] = partial(integer, tau=1.7, detach_reset=True)


def net_of(node):
    first, norm = layer.Conv2d(2, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4)
    nn.init.constant_(norm.weight, 1.5)
    net = nn.Sequential(first, norm, node, layer.Conv2d(4, 3, 3))
    functional.set_step_mode(net, "m")
    return net


def images():
    return torch.randn(4, 2, 2, 6, 5)


def results(net, x, steps=1):
    """Outputs, gradients by name, and the neuron's states."""
    found = {}
    net.zero_grad()
    for step in range(steps):
        x = x.detach().clone().requires_grad_()
        y = net(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found |= {f"output {step}": y.detach(), f"grad of x {step}": x.grad}
        functional.detach_net(net)
    found |= {f"grad of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    states = {n: v for n, v in net[2]._memories.items() if n != "v_seq"}
    return found | {n: torch.as_tensor(v).detach() for n, v in states.items()}


def assert_alike(got, want, tolerance=2e-5):
    assert got.keys() == want.keys()
    floor = 1e-2 * max(float(t.abs().max()) for n, t in want.items() if "grad" in n)
    for name, plain in want.items():
        bound = tolerance * max(float(plain.abs().max()), floor if "grad" in name else 1.0)
        torch.testing.assert_close(got[name], plain, rtol=0.0, atol=bound)


@pytest.mark.parametrize("name", MAKERS)
def test_a_neuron_equals_its_class(name):
    """Behind a norm in evaluation a net's outputs are equal to the bit, or as the report says."""
    plain = net_of(MAKERS[name]())
    fast = copy.deepcopy(plain)
    report = sj_taid.accelerate(fast)
    assert isinstance(fast[2], Accelerated), report
    x = images()
    seen = []
    for net in (plain, fast):
        node = copy.deepcopy(net[2])
        x_seq = (torch.arange(4 * 2 * 4 * 30).view(4, 2, 4, 6, 5) % 17 / 6 - 1).requires_grad_()
        node(x_seq).pow(2).sum().backward()
        node.store_v_seq = True
        seen.append([x_seq.grad, node(x_seq), node.v, getattr(node, "v_seq", None)])
    is_rounded = name in ("ComplementaryLIFNode", "EIFNode")
    r = 1e-6 * is_rounded
    assert ("to rounding" in str(report)) == is_rounded
    (want, *outputs), (got, *others) = seen
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    for want, got in zip(outputs, others, strict=True):
        if isinstance(want, torch.Tensor):  # what its class gives
            torch.testing.assert_close(got + 0, want, rtol=r, atol=r)
    assert_alike(results(fast, x, 2), results(plain, x, 2))


def test_hooks_and_other_parameters_are_as_in_the_plain_net():
    plain = net_of(GLIF())
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(fast)
    x, found = images(), []
    for net in (plain, fast):
        for parameter in net[2].parameters():
            parameter.register_hook(lambda grad: grad * 3)
        net[2].register_forward_hook(lambda module, args, y: y.register_hook(lambda g: g / 2) and y)
    assert_alike(results(fast, x, 2), results(plain, x, 2))
    for net in (plain, fast):
        functional.reset_net(net)
        given = {n: (0.7 * p).detach().requires_grad_() for n, p in plain.named_parameters()}
        y = torch.func.functional_call(net, given, (x,))
        y.pow(2).sum().backward()
        found.append({"output": y.detach()} | {f"grad of {n}": p.grad for n, p in given.items()})
    assert_alike(*reversed(found))


def test_the_report_says_for_how_many_axes_a_neuron_is_fused():
    (row,) = sj_taid.accelerate(nn.Sequential(PerChannel())).rows
    assert row.note == "equal outputs; fused for inputs of 5 axes alone", row
    (row,) = sj_taid.accelerate(nn.Sequential(AdaptiveThreshold())).rows
    assert row.note == "equal outputs"


@pytest.mark.parametrize("name", sorted(MAKERS.keys() & {"GLIF", "ThreeStates", "ILIFNode"}))
def test_a_norm_and_a_neuron_keep_few_bytes(name):
    plain = net_of(MAKERS[name]())[1:]
    fast, kept = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    x = torch.randn(4, 4, 4, 16, 16)
    for net in (plain, fast):
        leaf = x.clone().requires_grad_()
        _, size = graph.record_saved(partial(net, leaf), [leaf, *net.parameters()])
        kept.append(size)
    assert kept[1] <= 0.35 * kept[0]


def test_a_checkpoint_and_unaccelerate_give_the_same():
    plain = net_of(ThreeStates())
    fast, x = copy.deepcopy(plain), images()
    sj_taid.accelerate(fast)
    want, leaf = results(fast, x), x.clone().requires_grad_()
    y = checkpoint(lambda x: (functional.reset_net(fast), fast(x))[1], leaf, use_reentrant=False)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert torch.equal(y, want["output 0"]) and torch.equal(leaf.grad, want["grad of x 0"])
    sj_taid.unaccelerate(fast)
    functional.reset_net(fast)
    assert type(fast[2]) is ThreeStates and vars(fast[2]).keys() == vars(plain[2]).keys()
    assert_alike(results(fast, x), results(plain, x), 0.0)


def test_bfloat16_computes_in_float32():
    node = Refractory()
    sj_taid.accelerate(nn.Sequential(node))
    x = images().bfloat16().requires_grad_()
    want = copy.deepcopy(node)(x.detach().float())
    y = node(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and torch.equal(y.float(), want)


@pytest.mark.parametrize("shape", [(9, 0, 4, 2, 2), (1, 1, 1, 1, 1), (9, 7, 1, 3, 5)])
def test_spikes_below_zero_come_back_from_four_bits(shape):
    """Odd numbers of neurons too, whose bytes hold the values of two steps."""
    node = Ternary()
    sj_taid.accelerate(nn.Sequential(node))
    x = torch.randn(shape).mul(2).requires_grad_()
    spikes = node(x)
    weight = torch.ones((), requires_grad=True)
    _, size = graph.record_saved(lambda: spikes * weight, [x])
    assert size <= spikes.numel() // 2 + 8
    (spikes * weight).sum().backward()
    assert weight.grad == spikes.sum()


class Biased(own_neurons.Refractory):
    """It has a parameter, or a number, or none."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.3))

    def step(self, x, *states):
        return super().step(x if self.bias is None else x + self.bias, *states)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_a_parameter_that_goes_and_comes_back(grad):
    plain, x = Biased(), torch.randn(3, 2, 4)
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(nn.Sequential(fast))
    parameter = plain.bias
    for bias in (parameter, None, parameter, 0.2, torch.tensor(0.4), None, 0.2, parameter):
        outputs = []
        for node in (plain, fast):
            node.__dict__.pop("bias", None)
            node._parameters.pop("bias", None)
            node.bias = bias
            functional.reset_net(node)
            with torch.set_grad_enabled(grad):
                outputs.append(node(x))
        assert torch.equal(*outputs), bias


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_shares_what_the_net_shares(copied):
    net = nn.Sequential(own_neurons.Refractory(), own_neurons.Refractory())
    net[0].shared = net[1].shared = torch.ones((), requires_grad=True)
    sj_taid.accelerate(net)
    net(torch.randn(3, 2, 4, requires_grad=True))
    again = copied(net)
    assert again[0].shared is again[1].shared and again[0].shared.requires_grad
    assert again[0].v.grad_fn is None


def test_every_voltage_has_the_plain_neurons_gradient():
    net, found, x = nn.Sequential(neuron.LIFNode(store_v_seq=True, step_mode="m")), [], images()
    for run in (copy.deepcopy(net), net):
        if run is net:
            sj_taid.accelerate(net)
        leaf = x.detach().clone().requires_grad_()
        run(leaf)
        run[0].v_seq.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
