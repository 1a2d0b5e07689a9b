"""Tools that count, trace, transform or show a net say of an accelerated one what they say."""

import copy
from contextlib import nullcontext
from functools import partial
from importlib import import_module

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sj_taid
from sj_taid._internal.compat import FUNCTIONAL_STATES
from tests.nets.alike import accelerated, robust


def count(kind):
    """A counter of SpikingJelly's."""

    def tool(net, x):
        if not FUNCTIONAL_STATES:
            pytest.skip("0.0.0.0.14 has no counters")
        counters = import_module("spikingjelly.activation_based.op_counter")
        counter = getattr(counters, kind)()
        with counters.DispatchCounterMode([counter]):
            net(x)
        return counter.get_total()

    return tool


def count_flops(net, x):
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return counter.get_total_flops()


def trace(net, x):
    traced = torch.jit.trace(net.eval(), x, check_trace=False)
    functional.reset_net(net)
    return traced(x)


def export(net, x):
    return torch.export.export(net.eval(), (x,), strict=False).module()(x)


def per_sample(net, x):
    return torch.func.vmap(lambda x: net.eval()(x), in_dims=1)(x.unsqueeze(2))


def jacobian(net, x, **options):
    def outputs(x):
        functional.reset_net(net)
        return net(x).sum((1, 3, 4)).flatten()

    return torch.autograd.functional.jacobian(outputs, x, **options)


TOOLS = {
    **{f"jacobian, {way}": partial(jacobian, vectorize=way) for way in (True, False)},
    **{kind: count(kind) for kind in ("ACCounter", "SynOpCounter", "MemoryAccessCounter")},
    **{tool.__name__: tool for tool in (count_flops, trace, export, per_sample)},
}


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_tool_says_the_same(name):
    if not FUNCTIONAL_STATES and name in ("export", "per_sample"):
        pytest.skip("0.0.0.0.14's neurons run in TorchScript")
    options = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.4}

    def make():
        net = nn.Sequential(
            *(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(**options)),
            *(layer.MaxPool2d(2), layer.Conv2d(4, 4, 3), neuron.ParametricLIFNode(**options)),
        )
        if FUNCTIONAL_STATES and name not in ("export", "per_sample"):  # SpikingJelly's cannot
            net.extend([neuron.ILIFNode(v_threshold=0.2), layer.Conv2d(4, 2, 1)])
        functional.set_step_mode(net, "m")
        return net, torch.rand(4, 2, 2, 8, 8) * 3

    plain, x = robust(
        make, passes=lambda net, x: (net(x), functional.reset_net(net), net.eval()(x))
    )
    fast = accelerated(copy.deepcopy(plain))
    expected, got = (TOOLS[name](net, x) for net in (plain, fast))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(layer.Conv2d(4, 4, 1, bias=False), layer.BatchNorm2d(4))
        self.shortcut, self.lif = layer.BatchNorm2d(4), neuron.LIFNode()

    def forward(self, x):
        return self.lif(self.branch(x) + self.shortcut(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_tensors_may_be_rounded(dtype, training):
    """As people do to save memory, by hooks; gradients differ by the rounding alone."""
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(3, 4, 3, bias=False), layer.BatchNorm2d(4), neuron.LIFNode())
    net.extend([Residual(), layer.BatchNorm2d(4)])
    functional.set_step_mode(net, "m")
    accelerated(net.train(training))
    x = torch.randn(4, 3, 3, 8, 8) * 3
    rounding = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.to(dtype) if t.is_floating_point() else t, t.dtype),
        lambda saved: saved[0].to(saved[1]),
    )
    found = []
    for hooks in (nullcontext(), rounding):
        functional.reset_net(net)
        with hooks:
            y = net(x)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(y, [*net.parameters()], torch.randn(y.shape)))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() <= 0.05 * exact.norm() + 1e-5


def test_spikes_of_outside_within_a_transform_of_functions():
    net, x = nn.Sequential(neuron.LIFNode(step_mode="m")), torch.rand(4, 2, 3, 5, 6) * 3
    weight, found = torch.rand(2, 3, 1, 1), []
    for fast in (net, copy.deepcopy(net)):
        if fast is not net:
            sj_taid.accelerate(fast)
        spikes = fast(x.requires_grad_())
        convolve = partial(lambda s, w: F.conv2d(s.flatten(0, 1), w).square().sum(), spikes)
        found.append(torch.func.grad(convolve)(weight))
    assert torch.equal(*found) and found[0].any()
