"""swap_neurons(net, replace=...): a net's own classes, in the idioms of published ones."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sj_taid import ALIFNode, accelerate, swap_neurons
from sj_taid._internal import compat
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.helpers import default_dtype
from tests.nets.alike import assert_alike, results, robust


class Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, most):
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(0, most).round()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= 0) & (x <= ctx.most)), None


class MemUpdate(nn.Module):
    """SpikeYOLO's integer neuron with a membrane."""

    def forward(self, x):
        memory, count, counts = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for step in x:
            memory = (memory - count.detach()) * 0.25 + step
            count = Quantize.apply(memory, 4)
            counts.append(count)
        return torch.stack(counts)


class MultiSpike4(nn.Module):
    """SpikeYOLO's integer neuron of one step."""

    def forward(self, x):
        return Quantize.apply(x, 4)


class MultiSpike(nn.Module):
    """V3's, which divides its counts; its input has no time."""

    def __init__(self, most=8):
        super().__init__()
        self.most = most

    def forward(self, x):
        return Quantize.apply(x, self.most) / self.most


class OwnNode(getattr(neuron, "SimpleBaseNode", neuron.BaseNode)):
    """A BaseNode of one's own, with a decay that learns."""

    def __init__(self, decay=0.75, **options):
        super().__init__(**options)
        self.decay = nn.Parameter(torch.tensor(decay))

    def neuronal_charge(self, x):
        self.v = self.v * self.decay + x


class TDBN(nn.BatchNorm2d):
    """Threshold-dependent batch norm over ``[T, N, C, H, W]``, written out."""

    def __init__(self, channels, v_threshold=0.5):
        super().__init__(channels)
        self.v_threshold = v_threshold

    def forward(self, x):
        axes = [0, 1, 3, 4]
        if self.training:
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            with torch.no_grad():
                size = x.numel() / x.shape[2]
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * size / (size - 1), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, 1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return self.v_threshold * x * self.weight.view(shape) + self.bias.view(shape)


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


FROZEN = {"learn_threshold": False, "step_mode": "m"}
TRIANGLE = {"surrogate_function": surrogate.PiecewiseQuadratic(alpha=1.0), "learn_tau": False}


def from_rest(node, inputs):
    """A hook that lets each call start from rest, as where the voltage is a local variable."""
    node.reset()


def plain_integer_lif(old):
    return ALIFNode(4 / 3, False, v_reset=None, detach_reset=True, levels=4, **FROZEN)


def integer_lif(old):
    new = plain_integer_lif(old)
    new.register_forward_pre_hook(from_rest)
    return new


def tdbn(old, scale=None):
    new = layer.ThresholdDependentBatchNorm2d(1.0, old.v_threshold, old.num_features)
    new.step_mode = "m"
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        new.weight *= old.v_threshold if scale is None else scale
    return new


def of_own_node(old):
    tau = 1.0 / (1.0 - old.decay.item())
    names = ("v_threshold", "v_reset", "surrogate_function", "detach_reset", "step_mode")
    options = {name: getattr(old, name) for name in names}
    return ALIFNode(tau, False, learn_threshold=False, **options)


MADE = {
    MemUpdate: integer_lif,
    MultiSpike4: lambda old: ALIFNode(None, levels=4, **FROZEN),
    MultiSpike: lambda old: ALIFNode(None, levels=old.most, normalize=True, **FROZEN),
    OwnNode: of_own_node,
    TDBN: tdbn,
    Kept: lambda old: ALIFNode(2.0, False, **TRIANGLE, **FROZEN),
}
OWN = {OwnNode: partial(OwnNode, step_mode="m"), TDBN: partial(TDBN, 6)}


def make(kind):
    """A class of one's own between layers; ``[4, 2, 3, 8, 8]`` is an input."""
    own = OWN.get(kind, kind)()
    norm = [layer.BatchNorm2d(6)] if kind is not TDBN else []
    net = nn.Sequential(layer.Conv2d(3, 6, 3), *norm, own, layer.Conv2d(6, 4, 1), layer.Flatten(2))
    functional.set_step_mode(net, "m")
    return net


#: of what both nets have: the gradients of the convolutions' weights
COMPARED = ("output 0", "grad of x", "grad of 0.weight", "grad of 3.weight", "grad of 2.weight")


if not compat.FUNCTIONAL_STATES:  # 0.0.0.0.14's does not run
    MADE.pop(TDBN)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_successors_train_as_the_nets_own_classes_do(kind):
    with default_dtype(torch.float64):  # its rounding moves no spike
        net, x = make(kind), torch.randn(4, 2, 3, 8, 8) * 2
        plain, path = copy.deepcopy(net), "1" if kind is TDBN else "2"
        (row,) = swap_neurons(net, replace={kind: MADE[kind]}, example=x).rows
    assert (row.layer, row.kind, row.done != "") == (path, kind.__name__, True)
    assert row.note == "by replace=, equal on the example"
    for training in (True, False):
        found = (results(n.train(training), x) for n in (net, plain))
        got, expected = ({k: v for k, v in f.items() if k[8:] in COMPARED} for f in found)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [MemUpdate, MultiSpike4, MultiSpike, OwnNode, Kept])
def test_successors_are_fused_with_the_norm(kind):
    def make_swapped():
        net = make(kind)
        swap_neurons(net, replace={kind: MADE[kind]})
        return net, torch.randn(4, 2, 3, 8, 8) * 2

    net, x = robust(make_swapped)
    plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    report = accelerate(net, x)
    before, after = report.saved_bytes
    assert [row.done for row in report.rows] == ["fused into 2", "fused operator"]
    assert after < before
    assert_alike(results(net, x), results(plain, x), results(exact, x.double()))


def like(kind, **changes):
    """A function of ``replace`` with other options than the right one's."""

    def make_one(old):
        new = MADE[kind](old)
        for name, value in changes.items():
            if isinstance(getattr(new, name), torch.Tensor):
                getattr(new, name).data.fill_(value)
            else:
                setattr(new, name, value)
        return new

    return make_one


def never_reset(old):
    new = MADE[Kept](old)
    new.reset = lambda: None
    return new


FALSE = {
    "decay": (MemUpdate, like(MemUpdate, w=0.0), "output"),
    "reset with gradient": (MemUpdate, like(MemUpdate, detach_reset=False), "gradient"),
    "no reset between calls": (MemUpdate, plain_integer_lif, "output 2"),
    "no reset": (Kept, never_reset, "output 3"),
    "no state": (MemUpdate, MADE[MultiSpike4], "output"),
    "levels": (MultiSpike4, lambda old: ALIFNode(None, levels=2, **FROZEN), "output"),
    "window": (
        MultiSpike4,
        like(MultiSpike4, surrogate_function=MultiLevelSpikeCount(4, grad_window=(-1.0, 4.0))),
        "gradient",
    ),
    "not divided": (MultiSpike, lambda old: ALIFNode(None, levels=8, **FROZEN), "output"),
    "threshold": (OwnNode, like(OwnNode, v_threshold=1.01), "output"),
    "surrogate": (Kept, like(Kept, surrogate_function=surrogate.ATan()), "gradient"),
    "soft reset": (Kept, like(Kept, v_reset=None), "output"),
    "scale": (TDBN, lambda old: tdbn(old, 0.501), "output"),
    "momentum": (TDBN, lambda old: like(TDBN, momentum=0.2)(old), "output"),
    "shape": (MultiSpike4, lambda old: nn.Flatten(), "output"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_successor_is_named_and_the_net_stays(name):
    kind, function, what = FALSE[name]
    if kind not in MADE:
        pytest.skip("0.0.0.0.14's tdBN does not run")
    net, x = make(kind), torch.randn(4, 2, 3, 8, 8) * 2
    kinds, state = [*map(type, net.modules())], copy.deepcopy(net.state_dict())
    mode = "eval" if name == "momentum" else "training"
    message = rf"change '\d', a {kind.__name__}: in {mode} mode the {what}.* stays as it was"
    with pytest.raises(ValueError, match=message):
        swap_neurons(net, replace={kind: function}, example=x)
    assert [*map(type, net.modules())] == kinds
    assert all(map(torch.equal, state.values(), net.state_dict().values()))
    swap_neurons(net, replace={kind: function})  # without an example nothing is claimed


def test_the_difference_is_named_with_its_size_and_first_step():
    net = nn.Sequential(MultiSpike4())
    x = torch.ones(6, 300)
    x[4, 7] = 3.0  # one value of 1,800
    replace = {MultiSpike4: lambda old: ALIFNode(None, levels=2, **FROZEN)}
    message = "output 1 differs by up to 1, of 3 at most, first at step 4"
    with pytest.raises(ValueError, match=message):
        swap_neurons(net, replace=replace, example=x)


class Above(nn.Module):
    """It fires above the threshold, not at it."""

    def forward(self, x):
        return Fire.apply(x - 1.0)


class At(Above):
    def forward(self, x):
        return Fire.apply(x - 1.0 + 1e-7)


def test_what_lies_at_a_threshold_is_a_difference_unless_it_is_rare():
    replace, x = {Above: lambda old: At()}, 2 * torch.rand(100, 100)
    x[3, 3] = 1.0
    assert "equal" in str(swap_neurons(nn.Sequential(Above()), replace=replace, example=x))
    with pytest.raises(ValueError, match="the output 1 differs by up to 1"):
        swap_neurons(nn.Sequential(Above()), replace=replace, example=torch.ones(4, 5))


def test_a_successor_that_raises_is_named():
    net, replace = nn.Sequential(MultiSpike4()), {MultiSpike4: lambda old: nn.Linear(3, 3)}
    with pytest.raises(RuntimeError, match="shapes") as caught:
        swap_neurons(net, replace=replace, example=torch.rand(4, 5))
    assert caught.value.__notes__ == ["raised by what replace= gives for '0', on its input there"]
    assert type(net[0]) is MultiSpike4


def test_notes_of_what_is_kept_not_reached_or_shows_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.idle, self.silent = (MultiSpike() for _ in range(3))
            self.kept = MultiSpike(3)

        def forward(self, x):
            return self.kept(self.read(x)) + self.silent(-x.abs())

    net, replace = Net(), {MultiSpike: lambda o: o if o.most == 3 else MADE[MultiSpike](o)}
    report = swap_neurons(net, replace=replace, example=torch.randn(4, 5) * 4)
    assert {row.layer: row.note for row in report.rows} == {
        "read": "by replace=, equal on the example",
        "idle": "by replace=, not reached by the example",
        "silent": "by replace=, not compared: it gives one value on the example",
        "kept": "kept by replace=",
    }
    assert type(net.kept) is MultiSpike and isinstance(net.silent, ALIFNode)


def test_what_is_no_successor_leaves_the_net():
    net = nn.Sequential(MultiSpike4(), neuron.LIFNode())
    for wrong in (None, ALIFNode):
        with pytest.raises(TypeError, match=r"for each MultiSpike4, .* for '0' it gave"):
            swap_neurons(net, replace={MultiSpike4: lambda old, wrong=wrong: wrong})
    for kind in (MultiSpike, "MultiSpike4", nn.Module):
        with pytest.raises(ValueError, match="no module of exactly this class"):
            swap_neurons(net, replace={kind: MADE[MultiSpike4]})
    one, both = MADE[MultiSpike4](None), nn.Sequential(MultiSpike4(), MultiSpike4())
    for wrong, path in ((5, "0"), (lambda old: nn.Sequential(old), "0"), (lambda old: one, "1")):
        message = f"a module of its own for each MultiSpike4, which .* but for '{path}' it gave"
        with pytest.raises(TypeError, match=message):
            swap_neurons(both, replace={MultiSpike4: wrong})
    assert [type(module) for module in both] == [MultiSpike4, MultiSpike4]
    with pytest.raises(ValueError, match="example= compares the modules that replace= names"):
        swap_neurons(net, example=torch.rand(2, 3))
    with pytest.raises(TypeError, match="the example must be a tensor, or a tuple"):
        swap_neurons(net, replace={MultiSpike4: MADE[MultiSpike4]}, example=[1])
    assert [type(module) for module in net] == [MultiSpike4, neuron.LIFNode]


class Slotted(nn.Module):
    """A class whose objects none of another class can become."""

    __slots__ = ("size",)


class SlottedLIF(neuron.LIFNode):
    __slots__ = ("size",)


def test_a_neuron_that_can_become_no_other_leaves_the_net():
    net = nn.Sequential(neuron.LIFNode(), SlottedLIF())
    with pytest.raises(TypeError, match=r"'1' cannot become a ALIFNode .* leave out __slots__"):
        swap_neurons(net)
    assert [type(module) for module in net] == [neuron.LIFNode, SlottedLIF]


def test_a_successor_that_no_neuron_can_become_leaves_the_net():
    net = nn.Sequential(neuron.LIFNode(), MultiSpike4(), MultiSpike4())
    before = [dict(vars(module)) for module in net]
    made = iter([nn.Identity(), Slotted()])
    with pytest.raises(TypeError, match=r"'2' cannot become a Slotted .* leave out __slots__"):
        swap_neurons(net, replace={MultiSpike4: lambda old: next(made)})
    assert [type(module) for module in net] == [neuron.LIFNode, MultiSpike4, MultiSpike4]
    assert [dict(vars(module)) for module in net] == before


def test_other_neurons_become_alif_and_a_class_of_spikingjellys_may_be_named():
    lif, plif = neuron.LIFNode(), neuron.ParametricLIFNode()
    net = nn.Sequential(MultiSpike4(), lif, plif)
    kept = {neuron.LIFNode: lambda old: old}
    report = swap_neurons(net, replace={MultiSpike4: MADE[MultiSpike4]} | kept)
    assert [row.done for row in report.rows] == ["ALIFNode", "", "ALIFNode"]
    assert net[1] is lif and net[2].w is plif.w and net[2].w.requires_grad


def test_a_successor_is_reset_and_may_hold_parts_of_the_old_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.lif = nn.Linear(2, 2), neuron.LIFNode()

        def forward(self, x):
            return self.lif(self.linear(x))

    block = Block()
    net = nn.Sequential(nn.Identity(), block, MultiSpike4())
    net.by_name, weight = {"one": [block]}, block.linear.weight
    functional.reset_net(net)  # which remembers what to reset
    one = ALIFNode(v_threshold=0.1)
    replace = {Block: lambda old: nn.Sequential(old.linear, old.lif), MultiSpike4: lambda old: one}
    assert [row.layer for row in swap_neurons(net, replace=replace).rows] == ["1", "1.lif", "2"]
    assert net[1] is block is net.by_name["one"][0] and block[0].weight is weight
    net(torch.rand(1, 2))
    assert type(block[1]) is type(net[2]) is ALIFNode
    functional.reset_net(net)
    assert block[1].v == net[2].v == 0.0


def test_a_successor_takes_device_dtype_mode_and_hooks():
    class Weighted(MultiSpike4):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.weight

    calls = []

    def weighted(old):
        new = Weighted()
        new.register_forward_hook(lambda *_: calls.append("new"))
        new.register_full_backward_hook(lambda *_: calls.append("new backward"))
        return new

    net = nn.Sequential(nn.Linear(3, 3).double(), MultiSpike4()).eval()
    handle = net[1].register_forward_hook(lambda *_: calls.append("old"))
    x = torch.randn(4, 3, dtype=torch.float64)
    report = swap_neurons(net, replace={MultiSpike4: weighted}, example=x)
    assert report.rows[0].done == "Weighted" and "equal" in report.rows[0].note
    assert net[1].weight.dtype == torch.float64 and not net[1].training
    calls.clear()
    net(x).sum().backward()
    assert calls == ["old", "new", "new backward"]
    handle.remove()
    net(x)
    assert calls[3:] == ["new"]


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_comparison_leaves_random_numbers_hooks_and_state(context):
    class Noisy(nn.Module):
        def forward(self, x):
            return MultiSpike4()(x + torch.rand_like(x))

    net = nn.Sequential(neuron.LIFNode(step_mode="m"), nn.Dropout(0.5), Noisy())
    x = torch.rand(4, 3, 5) * 4
    net(x)  # with a voltage
    v, packed = net[0].v, []
    before = torch.get_rng_state()
    with context(), saved_tensors_hooks(packed.append, lambda t: t):
        report = swap_neurons(
            net, replace={Noisy: lambda old: Noisy()}, example=x, filter=lambda *_: False
        )
    assert "equal on the example" in report.rows[1].note
    assert torch.equal(torch.get_rng_state(), before) and not packed and net[0].v is v


def test_each_step_of_single_steps_is_a_call():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = OwnNode()

        def forward(self, x_seq):
            return torch.stack([self.node(x) for x in x_seq])

    x = torch.rand(5, 3, 8)
    report = swap_neurons(Loop(), replace={OwnNode: of_own_node}, example=x)
    assert "equal on the example" in report.rows[0].note
    with pytest.raises(ValueError, match="the output 2 differs"):  # of the second step
        swap_neurons(Loop(), replace={OwnNode: like(OwnNode, w=2.0)}, example=x)
