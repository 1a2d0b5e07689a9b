"""``accelerate`` of modules that loop over time by themselves, next to the plain ones."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

pytest.importorskip("numba", reason="needs numba: pip install numba")
import sj_taid
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.fused_neuron import Accelerated
from tests.nets import loops
from tests.nets.loops import HOSTILE, IDIOMS, FixedWindow, FoldedView, TimeSecond, shape_of
from tests.nets.published_loops import PUBLISHED, STBP

#: those that take one number of steps alone
FIXED = {"FixedWindow", "FoldedView", "FoldedSlices"}


def results(net, x):
    """Outputs and gradients, or the error."""
    torch.manual_seed(0)
    net.zero_grad()
    x = x.clone().requires_grad_()
    try:
        y = net(x)
    except Exception as error:
        return {"error": type(error)}
    y = y[0] if isinstance(y, tuple) else y
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {f"grad of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "grad of x": x.grad} | found


def check_equal(net, plain, x, exact=False):
    found, wanted = results(net, x), results(plain, x)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if isinstance(want, torch.Tensor):
            bound = 0 if exact and name == "output" else 1e-5
            torch.testing.assert_close(found[name], want, rtol=bound, atol=bound, msg=name)
            if name == "output":
                assert found[name].stride() == want.stride()
        else:
            assert found[name] == want


def accelerated(module):
    """A net of a module, accelerated, its plain copy, and the report's row of it."""
    net = nn.Sequential(nn.Identity(), module)
    plain = copy.deepcopy(net)
    rows = sj_taid.accelerate(net).rows
    return net, plain, rows[0] if rows else None


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_are_read(name):
    kind, lies = IDIOMS[name]
    net, plain, row = accelerated(kind())
    assert row.done == "fused operator", row.note
    for steps in (4,) if name in FIXED else (1, 2, 4, 7):
        for scale in (0.5, 2.0):
            x = torch.randn(shape_of(lies, steps)) * scale
            check_equal(net, plain, x, row.note.startswith("equal outputs;"))
    x = torch.randn(shape_of(lies, 4))
    with torch.no_grad():
        assert torch.equal(net.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_neurons_are_read(kind):
    net, plain, row = accelerated(kind())
    assert row.done == "fused operator", row.note
    for steps in (1, 4, 6):
        check_equal(net, plain, torch.randn(shape_of(PUBLISHED[kind], steps)) * 1.5)


@pytest.mark.filterwarnings("ignore:.*gives other values:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*is not fused:RuntimeWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_loops_run_as_they_are(kind):
    net, plain, row = accelerated(kind())
    assert row.done == "" or kind is loops.VeryLateDiffers
    assert row.note
    for steps in (1, 3, 5, 9):
        for batch in (2, 3):
            check_equal(net, plain, torch.randn(steps, batch, 4, 3, 5))


def test_its_attributes_are_read_at_each_call():
    net, plain, _ = accelerated(loops.FirstStep(v_reset=-0.2))
    for name, value in (("v_reset", 0.1), ("v_reset", -0.2), ("v_reset", 0.0)):
        setattr(net[1], name, value)
        setattr(plain[1], name, value)
        check_equal(net, plain, torch.randn(5, 2, 4, 3, 5), exact=True)


@pytest.mark.parametrize("kind", [FixedWindow, FoldedView])
def test_another_number_of_steps_is_the_class(kind):
    net, plain, row = accelerated(kind())
    assert row.done
    check_equal(net, plain, torch.randn(6, 2, 4, 3, 5))
    check_equal(net, plain, torch.randn(7, 2, 4, 3, 5))


def test_what_it_needs_to_be_one():
    """A module without a state, of a library, or with layers within stays as it is."""

    class Activation(nn.Module):
        def forward(self, x):
            return torch.stack([loops.fire(x[t]) for t in range(x.shape[0])])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.neuron = nn.Conv2d(4, 4, 3, padding=1), STBP()

        def forward(self, x):
            return self.neuron(torch.stack([self.conv(x[t]) for t in range(x.shape[0])]))

    net = nn.Sequential(Activation(), Net())
    report = sj_taid.accelerate(net)
    assert [row.layer for row in report.rows] == ["1.neuron"]
    with pytest.raises(ValueError, match="no neuron"):
        sj_taid.accelerate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_back_copied_and_pickled():
    net, plain, _ = accelerated(TimeSecond())
    x = torch.randn(2, 4, 4, 3, 5)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other[1], Accelerated)
        check_equal(other, plain, x, exact=True)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert "on the fused operator already" in str(sj_taid.accelerate(net))
    sj_taid.unaccelerate(net)
    assert type(net[1]) is TimeSecond
    assert vars(net[1]).keys() == vars(plain[1]).keys()


def test_behind_a_norm():
    """A loop that has time first takes the input of a norm that is folded, and saves bits."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.neuron, self.head = STBP(), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            y = self.norm(self.conv(x.flatten(0, 1)))
            return self.head(self.neuron(y.view(*x.shape[:2], *y.shape[1:])).flatten(0, 1))

    net, x = Net(), torch.randn(4, 2, 3, 16, 16)
    plain = copy.deepcopy(net)
    report = sj_taid.accelerate(net, x)
    assert [row.done for row in report.rows] == ["fused into neuron", "fused operator"]
    before, after = report.saved_bytes
    assert after < 0.3 * before
    check_equal(net, plain, x)


class OwnSequence(neuron.BaseNode):
    """A neuron of SpikingJelly's that runs a sequence by a loop of its own."""

    def __init__(self, **options):
        super().__init__(surrogate_function=surrogate.ATan(), **options)
        self.w = nn.Parameter(torch.tensor(0.2))

    def multi_step_forward(self, x_seq):
        spikes = []
        for x in x_seq:
            self.v = self.v * self.w.sigmoid() + x
            spike = self.surrogate_function(self.v - self.v_threshold)
            self.v = self.v * (1 - spike)
            spikes.append(spike)
        return torch.stack(spikes)


class KeepsMean(OwnSequence):
    def multi_step_forward(self, x_seq):
        spikes = super().multi_step_forward(x_seq)
        self.v = self.v + x_seq[0]
        return spikes


@pytest.mark.parametrize("kind", [OwnSequence, KeepsMean])
def test_a_neuron_whose_sequence_is_its_own(kind):
    """From a reset it is fused, and from a voltage its class; both keep the same states."""
    net, plain, row = accelerated(kind(step_mode="m"))
    is_read = kind is OwnSequence and FUNCTIONAL_STATES
    assert row.done == ("fused operator" if is_read else "")
    for steps, is_reset in ((4, True), (3, False), (1, True), (6, True), (2, False)):
        x = torch.randn(steps, 2, 4, 3, 5) * 1.5
        for one in (net, plain):
            (functional.reset_net if is_reset else functional.detach_net)(one)
        check_equal(net, plain, x)
        torch.testing.assert_close(net[1].v, plain[1].v)
    if row.done:
        copy.deepcopy(net)
