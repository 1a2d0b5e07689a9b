"""swap_neurons(net, replace=...): a net's own classes, in the idioms of published ones."""

import copy
import random
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from sj_taid import ALIFNode, swap_neurons
from sj_taid._internal import compat
from tests.helpers import default_dtype
from tests.nets.alike import results


def count(x, most=4):
    y = x.clamp(0, most)
    return y + (y.round() - y).detach()


class MemUpdate(nn.Module):
    """SpikeYOLO's integer neuron with a membrane."""

    def forward(self, x):
        memory, spikes, counts = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for step in x:
            memory = (memory - spikes.detach()) * 0.25 + step
            spikes = count(memory)
            counts.append(spikes)
        return torch.stack(counts)


class MultiSpike(nn.Module):
    """V3's, which divides its counts; its input has no time."""

    def forward(self, x):
        return count(x, 8) / 8


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1.0 - x.abs()).clamp(min=0)


class Kept(nn.Module):
    """A hard reset, firing above the threshold; it keeps its voltage until a reset."""

    def __init__(self):
        super().__init__()
        self.mem = 0.0

    def forward(self, x):
        spikes = []
        for step in x:
            memory = self.mem * 0.5 + step
            spikes.append(Fire.apply(memory - 1.0))
            self.mem = (1 - spikes[-1]) * memory
        return torch.stack(spikes)

    def reset(self):
        self.mem = 0.0


FROZEN = {"learn_tau": False, "learn_threshold": False, "step_mode": "m"}
TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)


def from_rest(node, inputs):
    """A hook that lets each call start from rest, as where the voltage is a local variable."""
    node.reset()


def integer_lif(old):
    new = ALIFNode(4 / 3, False, v_reset=None, detach_reset=True, levels=4, **FROZEN)
    new.register_forward_pre_hook(from_rest)
    return new


MADE = {
    MemUpdate: integer_lif,
    MultiSpike: lambda old: ALIFNode(None, levels=8, normalize=True, **FROZEN),
    Kept: lambda old: ALIFNode(2.0, False, surrogate_function=TRIANGLE, **FROZEN),
}
if compat.FUNCTIONAL_STATES:  # 0.0.0.0.14's gives no gradient in evaluation
    MADE[neuron.LIFNode] = lambda old: ALIFNode(old.tau, **FROZEN)


def make(kind):
    """Such a module between layers; ``[4, 2, 3, 8, 8]`` is an input."""
    net = nn.Sequential(
        *(layer.Conv2d(3, 6, 3), layer.BatchNorm2d(6), kind()),
        *(layer.Conv2d(6, 4, 1), layer.Flatten(2)),
    )
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_successors_train_as_the_nets_own_classes_do(kind):
    with default_dtype(torch.float64):  # its rounding moves no spike
        net, x = make(kind), torch.randn(4, 2, 3, 8, 8) * 2
        plain = copy.deepcopy(net)
        (row,) = swap_neurons(net, replace={kind: MADE[kind]}, example=x).rows
    assert (row.layer, row.kind, row.done) == ("2", kind.__name__, "ALIFNode")
    but = " but for its mem" if kind is Kept else ""
    assert row.note == f"by replace=, equal on the example{but}"
    for training in (True, False):
        found = (results(n.train(training), x) for n in (net, plain))
        got, expected = ({k: v for k, v in f.items() if k[-2:] != ".v"} for f in found)
        assert_close(got, expected, rtol=1e-9, atol=1e-9)


def widen(x, axis, small=1.0):
    """The last channel is 1,000 times the others."""
    factors = torch.tensor([small] * (x.shape[axis] - 1) + [1000.0])
    return (count(x).movedim(axis, -1) * factors).movedim(-1, axis)


def with_gradient_of(y, z):
    return y.detach() + z - z.detach()


@dataclass
class Both:
    counts: torch.Tensor
    rate: float


class Own(nn.Module):
    """A class of the net's own, by the text of what it computes of ``x`` and a list ``seen``."""

    def __init__(self, text, norm=None, scale=None):
        super().__init__()
        self._text, self.norm, self.scale = text, norm, scale
        self.mem = self._kept = 0.0

    def forward(self, x, seen=None):
        return eval(self._text, globals(), {"m": self, "x": x, "seen": seen})

    def normed(self, x):
        return self.norm(x.flatten(0, 1)).view_as(x)

    def remember(self, x, name="mem"):
        setattr(self, name, getattr(self, name) * 0.5 + x)
        return getattr(self, name)

    def reset(self):
        self.mem = 0.0


class Successor(Own):
    pass


class Net(nn.Module):
    """It gives all that it can see of its ``Own``."""

    def __init__(self, text):
        super().__init__()
        norm = nn.BatchNorm1d(5, momentum=0.5).eval()  # it is frozen
        norm.running_var.fill_(4.0)
        self.linear = nn.Linear(3, 5)
        self.own = Own(text, norm, nn.Parameter(torch.tensor(1.5)))

    def forward(self, x):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        steps, seen = [4 * self.linear(x) for x in x], []
        return [self.own(step, seen) for step in steps], steps, seen


#: what the error names, a text, one of something else, and another one of the same
KINDS = {
    "value": ("output 1", "count(x)", "count(x) + 0.01"),
    "gradient": ("gradient of input 1", "count(x)", "with_gradient_of(count(x), x)"),
    "state": ("output 2", "m.remember(x)", "x * 1"),
    "reset": ("output 5", "m.remember(x)", "m.remember(x, '_kept')"),
    "mode": ("output 1", "x if m.training else count(x)", "x * 1"),
    "modes within": ("output 1", "m.normed(x)", "(m.norm.train(m.training), m.normed(x))[1]"),
    "tuple of one": ("structure of output 1", "(count(x),)", "count(x)[None]"),
    "dataclass": (r"output 1\['Both'\]\['rate'\]", "Both(x, x.mean().item())", "Both(x, 0.5)"),
    "integer": ("output 1", "50_000 * count(x).long()", "50_000 * count(x).long() + 1"),
    "dtype": ("output 1", "x > 1", "(x > 1).float()"),
    "complex": ("output 1", "torch.fft.rfft(x)", "torch.fft.rfft(x).conj()"),
    "written": ("input after call 1", "count(x.clamp_(0, 4))", "count(x)"),
    "gradient of what is written": (
        "gradient through what is written of input 1",
        "count(x.mul_(2).detach())",
        "count(x.copy_(2 * x.detach()).detach())",
        "count(x.add_(x).detach())",
    ),
    "written list": ("structure of input after", "(x, seen.append(x.detach()))", "(x, None)"),
    "parameter": ("gradient of parameter scale", "count(x * m.scale)", "count(x * m.scale.data)"),
    "small channel's gradient": (
        "gradient of input 1",
        "widen(x, 2)",
        "with_gradient_of(widen(x, 2), widen(x, 2, 1.01))",
    ),
    "small channel, first": ("output 1", "widen(x, 0)", "widen(x, 0, 1.01)"),
    "small channel, last": ("output 1", "widen(x, 2)", "widen(x, 2, 1.01)"),
    "random numbers": (
        "output 1",
        "x * (torch.rand(()) + np.random.rand() + random.random())",
        "x * 0.5",
    ),
}
SHARED = ("parameter", "modes within")  #: also with the parts of the old module in its successor


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize(
    ("kind", "shared"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in SHARED)]
)
def test_a_successor_computes_what_the_module_does_or_is_refused(kind, shared):
    what, text, wrong, *others = KINDS[kind]
    net, x = Net(text), torch.randn(2, 4, 6, 3)
    plain = copy.deepcopy(net)

    def replace(text):
        def make(old):
            parts = old.norm, old.scale
            return Successor(text, *(parts if shared else copy.deepcopy(parts)))

        return {Own: make}

    message = rf"change 'own', a Own: in \w+ mode the {what}.*; the net stays as it was"
    with pytest.raises(ValueError, match=message):
        swap_neurons(net, replace=replace(wrong), example=x)
    swap_neurons(copy.deepcopy(net), replace=replace(wrong))  # without one nothing is claimed
    assert type(net.own) is Own
    (row,) = swap_neurons(net, replace=replace((others or [text])[0]), example=x).rows
    assert row.note == "by replace=, equal on the example" and type(net.own) is Successor
    assert_close(results(net, x), results(plain, x))
    assert_close(results(net.eval(), x), results(plain.eval(), x))


#: two texts that differ by rounding: at a threshold, in a small channel, in a sum that cancels
ROUNDED = (
    ("Fire.apply(x - 1) * m.scale.mean()", "Fire.apply(x - 1 + 1e-7) * m.scale.mean()"),
    ("torch.stack([x + 3e4 - 3e4, 3e4 * x])", "torch.stack([x, 3e4 * x])"),
    ("m.norm(x + m.scale)", "m.norm((x * 3 + m.scale * 3) / 3)"),
)


@pytest.mark.parametrize("texts", ROUNDED)
def test_what_rounding_moves_is_no_difference_unless_much_lies_at_a_threshold(texts):
    def make(kind, text):
        return kind(text, nn.BatchNorm1d(100), nn.Parameter(torch.ones(100)))

    net, replace = make(Own, texts[0]), {Own: lambda old: make(Successor, texts[1])}
    x = 2 * torch.rand(100, 100)
    x[3, 3] = 1.0
    if texts == ROUNDED[0]:
        with pytest.raises(ValueError, match="output 1 differs by up to 1, of 0 at most, first at"):
            swap_neurons(net, replace=replace, example=torch.ones(4, 5))
    assert "equal on the example" in str(swap_neurons(net, replace=replace, example=x))


def test_a_parameter_by_another_name_is_the_same():
    net, x = Own("x * m.scale", scale=nn.Parameter(torch.ones(5))), torch.rand(4, 5)
    replace = {Own: lambda old: Successor("x * m.norm[0].data", nn.ParameterList([old.scale]))}
    with pytest.raises(ValueError, match="gradient of parameter scale"):
        swap_neurons(net, replace=replace, example=x)


def test_an_error_of_a_successors_names_it_and_floats_may_be_of_another_dtype():
    net, x = nn.Sequential(Own("count(x.double())")), torch.rand(4, 5)
    with pytest.raises(RuntimeError, match="shapes") as caught:
        swap_neurons(net, replace={Own: lambda old: nn.Linear(3, 3)}, example=x)
    assert caught.value.__notes__ == ["raised by what replace= gives for '0', on its input there"]
    replace = {Own: lambda old: Successor("count(x)")}
    assert "equal" in str(swap_neurons(net, replace=replace, example=x))


def test_notes_say_what_is_kept_or_lost_and_what_shows_nothing():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.idle, self.silent, self.kept = (MultiSpike() for _ in range(4))
            self.kept.stays, self.read.gain, self.read.levels, self.read.table = 1, 2.0, 9, x
            self.state = Kept()
            self.writes = Own("x * m.scale.data.clamp_(0, 1)", scale=nn.Parameter(2 * x[0]))

        def forward(self, x):
            y = self.kept(self.read(x)) + self.silent(-x.abs()) + self.writes(x)
            return y + self.state(x) + self.state.mem * self.read.gain

    x = torch.randn(4, 5) * 4
    net, replace = Reads(), {Kept: MADE[Kept]}
    replace[MultiSpike] = lambda old: old if hasattr(old, "stays") else MADE[MultiSpike](old)
    replace[Own] = lambda old: Successor("x * m.scale.data.clamp(0, 1)", scale=old.scale)
    report = swap_neurons(net, replace=replace, example=x)
    assert {row.layer: row.note for row in report.rows} == {
        "read": "by replace=, not kept: levels, table, equal on the example",
        "idle": "by replace=, not reached by the example",
        "silent": "by replace=, not compared: it gives one value on the example",
        "kept": "kept by replace=",
        "state": "by replace=, equal on the example but for its mem",
        "writes": "by replace=, equal on the example but for its scale",
    }
    assert type(net.kept) is MultiSpike and isinstance(net.silent, ALIFNode)
    assert (net.read.gain, net.read.levels) == (2.0, 8)


def test_what_is_no_successor_leaves_the_net():
    net, one = nn.Sequential(MultiSpike(), MultiSpike()), MADE[MultiSpike](None)
    for function in (ALIFNode, lambda _: None, lambda old: nn.Sequential(old), lambda _: one):
        with pytest.raises(TypeError, match=r"for each MultiSpike, .* for '[01]' it gave"):
            swap_neurons(net, replace={MultiSpike: function})
    with pytest.raises(ValueError, match="no module of exactly this class"):
        swap_neurons(net, replace={nn.Module: MADE[MultiSpike]})
    with pytest.raises(ValueError, match="example= compares the modules that replace= names"):
        swap_neurons(net, example=torch.rand(2, 3))
    assert [type(module) for module in net] == [MultiSpike, MultiSpike]


class Slotted(neuron.LIFNode):
    """A class whose objects can become none of another, nor others one of it."""

    __slots__ = ("size",)


def test_what_can_become_no_other_leaves_the_net():
    made = iter([nn.Identity(), Slotted()])
    for last, replace in ((Slotted(), None), (MultiSpike(), {MultiSpike: lambda _: next(made)})):
        net = nn.Sequential(neuron.LIFNode(), *[MultiSpike()] * (replace is not None), last)
        before = [(type(module), dict(vars(module))) for module in net]
        with pytest.raises(TypeError, match=r"'[12]' cannot become a .* leave out __slots__"):
            swap_neurons(net, replace=replace)
        assert [(type(module), dict(vars(module))) for module in net] == before


def test_a_successor_is_reset_and_may_hold_parts_of_the_old_module():
    block = Own("m.scale(m.norm(x))", nn.Linear(2, 2), neuron.LIFNode())
    net = nn.Sequential(nn.Identity(), block, MultiSpike())
    net.by_name, weight = {"one": [block]}, block.norm.weight
    functional.reset_net(net)  # which remembers what to reset
    one = ALIFNode(v_threshold=0.1)
    replace = {Own: lambda old: nn.Sequential(old.norm, old.scale), MultiSpike: lambda old: one}
    assert [row.layer for row in swap_neurons(net, replace=replace).rows] == ["1", "1.scale", "2"]
    assert net[1] is block is net.by_name["one"][0] and block[0].weight is weight
    net(torch.rand(1, 2))
    assert type(block[1]) is type(net[2]) is ALIFNode
    functional.reset_net(net)
    assert block[1].v == net[2].v == 0.0


def test_a_successor_takes_device_dtype_mode_and_hooks():
    calls = []

    def weighted(old):
        new = Successor("m.norm(x * m.scale)", nn.Dropout(), nn.Parameter(torch.ones(())))
        new.register_forward_hook(lambda *_: calls.append("new"))
        new.register_full_backward_hook(lambda *_: calls.append("new backward"))
        return new

    net = nn.Sequential(nn.Linear(3, 3).double(), Own("count(x)")).eval()
    handle = net[1].register_forward_hook(lambda *_: calls.append("old"))
    swap_neurons(net, replace={Own: weighted})
    assert net[1].scale.dtype == torch.float64
    assert not net[1].training and not net[1].norm.training
    net(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert calls == ["old", "new", "new backward"]
    handle.remove()
    net(torch.randn(4, 3, dtype=torch.float64))
    assert calls[3:] == ["new"]


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_comparison_leaves_random_numbers_hooks_state_and_the_example(context):
    def states():
        of_numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        return torch.get_rng_state().tolist(), f"{of_numpy}", random.getstate()

    text = "x.mul_(torch.rand(()) + np.random.rand() + random.random())"
    net = nn.Sequential(Own(text), neuron.LIFNode(step_mode="m"), nn.Dropout(0.5))
    x, packed = torch.rand(4, 3, 5), []
    net(x.clone())
    v, before, seen = net[1].v, x.clone(), states()
    with context(), saved_tensors_hooks(packed.append, lambda t: t):
        report = swap_neurons(net, replace={Own: lambda old: Successor(text)}, example=x)
    assert "equal on the example" in report.rows[0].note
    assert states() == seen and torch.equal(x, before) and not packed and net[1].v is v
