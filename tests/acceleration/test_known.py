"""Classes of a net's own, in the idioms of published ones, and what describes them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from published_nets import KNOWN as INTEGER
from published_nets import MemoryUpdate, MultiSpike
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sj_taid
from sj_taid import known
from sj_taid._fused_neuron import Accelerated
from sj_taid._graph import record_saved
from sj_taid.acceleration import own
from sj_taid.acceleration.compact import Compact
from tests.helpers import default_dtype

pytest.importorskip("numba", reason="needs numba: pip install numba")


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1.0 - x.abs()).clamp(min=0)


class LIFSpike(nn.Module):
    """A hard reset, firing above the threshold, time on axis 1."""

    def forward(self, x):
        memory, spikes = 0, []
        for t in range(x.shape[1]):
            memory = memory * 0.5 + x[:, t]
            spike = Fire.apply(memory - 1.0)
            memory = (1 - spike) * memory
            spikes.append(spike)
        return torch.stack(spikes, 1)


class Stateful(LIFSpike):
    """It keeps its voltage, and time is on axis 0."""

    def __init__(self):
        super().__init__()
        self.mem = None

    def forward(self, x):
        spikes = []
        for step in x:
            self.mem = step if self.mem is None else self.mem * 0.5 + step
            spike = Fire.apply(self.mem - 1.0)
            self.mem = (1 - spike) * self.mem
            spikes.append(spike)
        return torch.stack(spikes)

    def reset(self):
        self.mem = None


class TDBN(nn.BatchNorm2d):
    """Threshold-dependent batch norm over ``[T, N, C, H, W]``, written out."""

    def __init__(self, channels, alpha=1.0, v_threshold=0.5):
        super().__init__(channels)
        self.alpha, self.v_threshold = alpha, v_threshold

    def forward(self, x):
        axes = [0, 1, 3, 4]
        if self.training:
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            with torch.no_grad():
                size = x.numel() / x.shape[2]
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * size / (size - 1), self.momentum)
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, 1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        x = self.alpha * self.v_threshold * x
        return x * self.weight.view(shape) + self.bias.view(shape)


class TDBN3d(nn.BatchNorm3d):
    """The same over ``[N, C, T, H, W]``."""

    def forward(self, x):
        return 0.5 * super().forward(x)


TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)
LIF = {"tau": 2.0, "v_reset": 0.0, "surrogate_function": TRIANGLE, "strict": True}
KNOWN = INTEGER | {
    LIFSpike: known.LIF(**LIF, time_axis=1),
    Stateful: known.LIF(**LIF, voltage="mem"),
}


def train(net, x):
    """Output, gradients by name and buffers of a step."""
    functional.reset_net(net)
    x = x.clone().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {"output": y.detach() + 0, "input": x.grad}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | dict(net.named_buffers())


@pytest.mark.parametrize("norm", [None, layer.BatchNorm2d, TDBN])
@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_described_nets_compute_what_they_did(kind, norm):
    norms = {None: [], TDBN: [TDBN(6)], layer.BatchNorm2d: [layer.BatchNorm2d(6, step_mode="m")]}
    plain = nn.Sequential(
        layer.Conv2d(3, 6, 3, step_mode="m"), *norms[norm], kind(), layer.Conv2d(6, 4, 1)
    )
    functional.set_step_mode(plain, "m")
    fast = copy.deepcopy(plain)
    described = KNOWN | {
        TDBN: lambda m: known.BatchNorm(scale=m.alpha * m.v_threshold, channel_axis=2)
    }
    report = sj_taid.accelerate(fast, known=described)
    assert [*fast.state_dict()] == [*plain.state_dict()]
    for net in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        reference = copy.deepcopy(plain)
        for _ in range(3):
            x = torch.randn(4, 2, 3, 8, 8) * 2
            expected, found = train(reference, x), train(net, x)
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert isinstance(fast[:-1](x.requires_grad_()), Compact)
    if norm and kind is not LIFSpike:  # whose time is not outermost in memory
        assert any(row.done.startswith("fused into") for row in report.rows), str(report)
    sj_taid.unaccelerate(fast)
    assert [type(m) for m in fast] == [type(m) for m in plain]
    assert {*vars(fast[-2])} == {*vars(plain[-2])}


def test_a_strict_threshold_is_the_next_float32():
    strict, plain = (known.LIF(v_threshold=0.3, strict=strict) for strict in (True, False))
    above = float(np.nextafter(np.float32(0.3), np.float32(1)))
    with default_dtype(torch.float64), torch.device("meta"):
        assert (strict.threshold, plain.threshold) == (above, 0.3)


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_over_time_apart(training):
    plain = nn.Sequential(nn.Conv3d(3, 5, 1), TDBN3d(5), nn.Tanh(), MultiSpike()).train(training)
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(fast, known=KNOWN | {TDBN3d: known.BatchNorm(scale=0.5, scales_bias=True)})
    for _ in range(6):
        x = torch.randn(2, 3, 4, 6, 6)
        torch.testing.assert_close(train(fast, x), train(plain, x), rtol=1e-4, atol=1e-4)


FALSE = {
    "other decay": (MemoryUpdate, known.IntegerLIF(tau=2.0, detach_reset=True), "output"),
    "no state": (MemoryUpdate, known.IntegerLIF(tau=None, detach_reset=True), "output"),
    "other levels": (MemoryUpdate, known.IntegerLIF(tau=4 / 3, levels=3), "output"),
    "reset with gradient": (MemoryUpdate, known.IntegerLIF(tau=4 / 3), "gradient"),
    "other window": (
        MultiSpike,
        known.IntegerLIF(tau=None, levels=8, window=(0, 4), divisor=8),
        "gradient",
    ),
    "no divisor": (MultiSpike, known.IntegerLIF(tau=None, levels=8), "output"),
    "other axis": (LIFSpike, known.LIF(**LIF), "output"),
    "other surrogate": (
        *(LIFSpike, known.LIF(**LIF | {"surrogate_function": surrogate.ATan()}, time_axis=1)),
        "gradient",
    ),
    "soft reset": (LIFSpike, known.LIF(**LIF | {"v_reset": None}, time_axis=1), "output"),
    "scaled bias": (
        TDBN,
        known.BatchNorm(scale=0.5, scales_bias=True, channel_axis=2),
        "gradient of bias",
    ),
    "other scale": (TDBN, known.BatchNorm(scale=0.6, channel_axis=2), "output"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_description_raises_at_the_first_call(name):
    kind, description, what = FALSE[name]
    net = nn.Sequential(kind(5) if kind is TDBN else kind(), neuron.LIFNode(step_mode="m"))
    sj_taid.accelerate(net, known={kind: description})
    net(torch.zeros(4, 2, 5, 16, 16))  # shows nothing
    x = torch.randn(4, 2, 5, 16, 16) * 4
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"^{kind.__name__} at '0' is not .*: \d+% of its {what}"
        ):
            net(x)
    sj_taid.unaccelerate(net)
    sj_taid.accelerate(net, known={kind: description}, check=False)
    net(x)


def test_what_is_no_description_leaves_the_net():
    net = nn.Sequential(MemoryUpdate(), TDBN(3))
    wrongs = {TDBN: 3}, {TDBN: None}, {TDBN: lambda m: None}, {MemoryUpdate: known.BatchNorm()}
    for wrong in wrongs:
        with pytest.raises(TypeError, match="known"):
            sj_taid.accelerate(net, known=INTEGER | wrong)
        assert [type(m) for m in net] == [MemoryUpdate, TDBN]
    wrong = [{"tau": 0.5}, {"levels": 0}, {"levels": 256}, {"v_reset": 0.0}, {"time_axis": -1}]
    wrong += [{"divisor": 0}, {"v_threshold": -1.0}, {"window": (3, 1)}, {"voltage": 3}]
    for arguments in wrong:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            known.IntegerLIF(**{"tau": 2.0} | arguments)


class Learned(LIFSpike):
    """Its decay is a parameter."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x + (self.decay - self.decay.detach()))


class Raw(Stateful):
    """It keeps the voltage before the reset."""

    def forward(self, x):
        spikes = []
        for step in x:
            rest = 0.0 if self.mem is None else (self.mem <= 1.0) * self.mem * 0.5
            self.mem = rest + step
            spikes.append(Fire.apply(self.mem - 1.0))
        return torch.stack(spikes)


@pytest.mark.parametrize(
    ("kind", "description", "steps", "what"),
    [
        (Learned, known.LIF(**LIF, time_axis=1), 4, "gradient of decay"),
        (Stateful, known.LIF(**LIF), 4, "output|gradient of the input"),
        (Raw, known.LIF(**LIF, voltage="mem"), 4, "gradient|attribute 'mem'"),
        (MemoryUpdate, known.IntegerLIF(tau=3.0, detach_reset=True), 1, "output"),
        (MemoryUpdate, known.IntegerLIF(tau=4 / 3, levels=8, detach_reset=True), 4, "output"),
    ],
)
def test_what_the_first_input_does_not_show_is_checked(kind, description, steps, what):
    net = nn.Sequential(kind(), neuron.LIFNode(step_mode="m"))
    sj_taid.accelerate(net, known={kind: description})
    x = torch.rand(4, steps, 64) if description.time_axis else torch.rand(steps, 4, 64)
    with pytest.raises(ValueError, match=f"of its ({what})"):
        net(x * 1.5)


class Leaky(nn.Module):
    """Its threshold and surrogate are changed while it trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(1.0))
        self.function = surrogate.ATan()

    def forward(self, x):
        v, spikes = 0.0, []
        for step in x:
            v = v + (step - v) / 2
            spikes.append(self.function(v - self.threshold))
            v = v * (1.0 - spikes[-1])
        return torch.stack(spikes)


def test_a_function_describes_the_module_as_it_is_at_each_call():
    plain = nn.Sequential(nn.Linear(5, 7), Leaky(), nn.Linear(7, 3))
    fast, x = copy.deepcopy(plain), torch.randn(4, 6, 5) * 3
    sj_taid.accelerate(
        fast,
        known={
            Leaky: lambda m: known.LIF(
                v_threshold=m.threshold.item(), surrogate_function=m.function, decay_input=True
            )
        },
    )
    changes = [
        lambda net: None,
        lambda net: net.load_state_dict(plain.state_dict() | {"1.threshold": torch.tensor(0.25)}),
        lambda net: setattr(net[1], "function", surrogate.Sigmoid()),
        lambda net: setattr(net[1].function, "alpha", 1.5),
        lambda net: setattr(net[1], "function", surrogate.Sigmoid()),  # as before it was changed
        lambda net: net[1].threshold.fill_(0.5),
    ]
    nets = (plain, fast, copy.deepcopy(fast))
    for change in changes:
        for net in nets:
            change(net)
            net.zero_grad()
        expected = train(plain, x)
        for net in nets[1:]:
            torch.testing.assert_close(train(net, x), expected, rtol=1e-4, atol=1e-4)
    for net in (plain, fast):  # a pickle has the description of its moment
        net[1].threshold.fill_(0.75)
        net.zero_grad()
    restored, expected = pickle.loads(pickle.dumps(fast)), train(plain, x)
    torch.testing.assert_close(train(restored, x), expected, rtol=1e-4, atol=1e-4)
    sj_taid.unaccelerate(fast)
    assert vars(fast[1]).keys() == vars(plain[1]).keys()


class SubLIF(neuron.LIFNode):
    pass


OWN = KNOWN | {TDBN: lambda module: known.BatchNorm(scale=0.5, channel_axis=2)}


@pytest.mark.parametrize(
    "make", [Stateful, lambda: TDBN(3), lambda: nn.BatchNorm3d(2), lambda: SubLIF(step_mode="m")]
)
def test_what_an_accelerated_module_gets_has_names_of_its_own(make):
    net = nn.Sequential(make(), MemoryUpdate())
    plain = copy.deepcopy(net)
    sj_taid.accelerate(net, known=OWN)
    train(net, torch.randn(4, 2, 3, 8, 8, requires_grad=True))
    kind, kinds = type(plain[0]), type(net[0]).__mro__
    added = {name for mixin in kinds[: kinds.index(kind)] for name in vars(mixin)}
    added |= vars(net[0]).keys() - vars(plain[0]).keys()
    others = {name for name in added if not name.startswith("_taid_")}
    of_modules = {*dir(nn.BatchNorm2d), *dir(neuron.LIFNode), "__weakref__"}
    assert others <= of_modules | {"_fused_backend"} and "__init__" in others
    assert type(net[0]).__doc__ == kind.__doc__


def test_the_class_of_an_accelerated_module_makes_modules_of_the_nets_class():
    subclasses = []

    class Listed(Stateful):
        def __init_subclass__(cls):
            subclasses.append(cls)

        def again(self):
            return type(self)()

    net = nn.Sequential(
        layer.BatchNorm2d(3, step_mode="m"), Listed(), neuron.LIFNode(step_mode="m")
    )
    sj_taid.accelerate(net, known={Listed: KNOWN[Stateful]})
    for made in (type(net[0])(3), net[1].again(), type(net[2])(tau=3.0)):
        assert not isinstance(made, Accelerated)
    assert type(net[1].again()) is Listed and not subclasses
    assert type(net[2])(tau=3.0).tau == 3.0


def test_another_description_replaces_a_wrong_one():
    x = torch.randn(4, 2, 3, 8, 8) * 2
    net = nn.Sequential(Stateful())
    plain = copy.deepcopy(net)
    for wrong in (known.LIF(tau=3.0, voltage="mem"), lambda module: known.LIF(voltage="mem")):
        sj_taid.accelerate(net, known={Stateful: wrong})
        with pytest.raises(ValueError, match=r"correct known= and accelerate again, or"):
            net(x)
        report = sj_taid.accelerate(net, known=KNOWN)
        assert report.rows[0].note == f"as {KNOWN[Stateful]}"
        torch.testing.assert_close(train(net, x), train(plain, x))
    sj_taid.unaccelerate(net)
    assert type(net[0]) is Stateful


def test_another_description_leaves_the_modules_within():
    class Outer(Stateful):
        def __init__(self):
            super().__init__()
            self.inner = MemoryUpdate()

    net = nn.Sequential(Outer())
    sj_taid.accelerate(net, known=KNOWN | {Outer: known.LIF(voltage="mem")})
    sj_taid.accelerate(net, known={Outer: KNOWN[Stateful]})
    assert isinstance(net[0].inner, Accelerated)
    assert net[0]._taid_description == KNOWN[Stateful]


class Fewer(nn.Module):
    """It counts otherwise in eval mode."""

    def forward(self, x):
        counts = x.clamp(0, 4 if self.training else 2)
        return counts + (counts.round() - counts).detach()


@pytest.mark.parametrize("example", [None, torch.randn(8, 3) * 5, -torch.ones(8, 3)])
def test_eval_mode_is_checked_after_an_example_too(example):
    net = nn.Sequential(Fewer())
    sj_taid.accelerate(net, example, known={Fewer: known.IntegerLIF(tau=None, levels=4)})
    x = torch.randn(8, 3) * 5
    net(x)
    with pytest.raises(ValueError, match="Fewer at '0' is not IntegerLIF"):
        net.eval()(x)


def test_a_layer_that_gives_nothing_is_compared_ever_more_seldom(monkeypatch):
    net, checks = nn.Sequential(MemoryUpdate()), []
    check = own._check
    monkeypatch.setattr(own, "_check", lambda *given: checks.append(check(*given)) or checks[-1])
    sj_taid.accelerate(net, known=KNOWN)
    for _ in range(100):
        assert not net(-torch.ones(4, 2, 3)).any()
    assert checks == [False] * 7  # at calls 1, 2, 4 to 64
    for _ in range(40):
        net(torch.randn(4, 2, 3) * 4)
    assert checks == [False] * 7 + [True]  # at call 128


@pytest.mark.parametrize("shape", [(), (1, 5), (4, 1), (4, 5)])
def test_a_voltage_of_any_shape_that_broadcasts(shape):
    net = nn.Sequential(Stateful())
    fast = copy.deepcopy(net)
    sj_taid.accelerate(fast, known=KNOWN)
    x = torch.randn(3, 4, 5) * 2
    for this in (net, fast):
        this[0].mem = torch.full(shape, 0.7)
    torch.testing.assert_close(fast(x), net(x))
    torch.testing.assert_close(fast[0].mem, net[0].mem)


def test_a_voltage_that_the_class_does_not_have_is_named():
    with pytest.raises(AttributeError, match=r"voltage='v', but the Stateful at '0' has no such"):
        sj_taid.accelerate(nn.Sequential(Stateful()), known={Stateful: known.LIF(voltage="v")})


def test_the_report_names_described_classes_that_the_net_does_not_have():
    net = nn.Sequential(MemoryUpdate(), TDBN(3))
    net.kind, net[1].kind = ["no class"], "lif"  # attributes of the net's own
    for _ in range(2):  # an accelerated module is of its class
        report = sj_taid.accelerate(
            net, known={MemoryUpdate: KNOWN[MemoryUpdate], Leaky: KNOWN[LIFSpike]}
        )
        assert "known= has Leaky, but the net has no such module" in repr(report)


def test_the_report_measures_without_the_check():
    net = nn.Sequential(layer.BatchNorm2d(8, step_mode="m"), MemoryUpdate())
    report = sj_taid.accelerate(net, torch.randn(4, 2, 8, 16, 16, requires_grad=True), known=KNOWN)
    before, after = report.saved_bytes
    assert after < 0.5 * before
    assert report.rows[0].note == "equal outputs to rounding"
    assert sj_taid.accelerate(net).rows[1].note == "on the fused operator already"


def test_what_stays_plain_is_in_the_report():
    class Sub(MemoryUpdate):
        pass

    net = nn.Sequential(MemoryUpdate(), MemoryUpdate(), Sub(), MemoryUpdate())
    net[1].forward = lambda x: x
    net[3].register_forward_hook(lambda module, inputs, output: output * 0.5)
    notes = [row.note for row in sj_taid.accelerate(net, known=KNOWN).rows]
    assert notes[1] == "its forward was replaced" and notes[2].startswith("a subclass of Memory")
    x = torch.randn(4, 2, 64)
    torch.testing.assert_close(net[3](x=x), 0.5 * MemoryUpdate()(x))  # the hook once
    assert torch.equal(net[0](x[:, 0, 0]), MemoryUpdate()(x[:, 0, 0]))


class Blocked(nn.Module):
    def forward(self, x):
        return x.round().detach()


def test_a_class_that_is_not_in_the_net_is_named():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nor a module of known= \(MultiSpike\)$"):
        sj_taid.accelerate(net, known={MultiSpike: known.IntegerLIF(tau=None)})
    with pytest.raises(TypeError, match=r"^known= has a class for each description, not 'Mul"):
        sj_taid.accelerate(net, known={"MultiSpike": known.IntegerLIF(tau=None)})


def test_what_cannot_be_compared_raises():
    net = nn.Sequential(nn.Linear(3, 3), Blocked())
    sj_taid.accelerate(net, known={Blocked: known.IntegerLIF(tau=None)})
    with pytest.raises(TypeError, match=r"^Blocked at '1' must give a tensor"):
        net(torch.rand(4, 3))


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call:RuntimeWarning")
def test_half_precision_without_a_fused_operator_is_divided_too():
    net, x = nn.Sequential(MultiSpike(8, 3)), torch.randn(4, 5) * 4
    plain = copy.deepcopy(net).half()
    sj_taid.accelerate(net, known=KNOWN, check=False)
    torch.testing.assert_close(net(x.half()), plain(x.half()), rtol=0, atol=1e-3)


def test_half_precision_is_compared_in_float32():
    net = nn.Sequential(nn.BatchNorm2d(5), MemoryUpdate())
    sj_taid.accelerate(net, known=KNOWN)
    x = torch.randn(16, 5, 8, 8, requires_grad=True)
    assert net(x.bfloat16()).dtype == torch.bfloat16
    assert net[1]._taid_unchecked.keys() == {False}


def test_counts_behind_a_norm_are_saved_in_four_bits():
    net = nn.Sequential(layer.BatchNorm2d(8, step_mode="m"), MemoryUpdate())
    x = torch.randn(4, 2, 8, 16, 16, requires_grad=True)
    _, plain = record_saved(lambda: net(x * 1).square(), [])
    sj_taid.accelerate(net, known=KNOWN)
    net(x)  # checks
    _, saved = record_saved(lambda: net(x * 1).square(), [])
    assert saved < 0.4 * plain


def test_divided_counts_in_another_memory_order_are_saved_in_four_bits():
    """As tokens behind a linear layer and a transposed norm."""
    norm, node = nn.BatchNorm1d(32), MultiSpike()
    net = nn.ModuleList([nn.Linear(16, 32), norm, node, nn.Conv1d(32, 8, 1)])

    def run(tokens):
        y = node(norm(net[0](tokens).transpose(-1, -2)))
        return net[3](y), y

    tokens = torch.randn(4, 64, 16, requires_grad=True)
    there = [tokens, *net.parameters()]
    (expected, counts), plain = record_saved(lambda: run(tokens), there)
    sj_taid.accelerate(net, known=KNOWN, check=False)
    (got, ours), saved = record_saved(lambda: run(tokens), there)
    assert type(ours) is Compact and torch.equal(ours, counts)
    assert torch.equal(got, expected) and saved < 0.6 * plain
    weight = net[3].weight
    grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)
