"""``calibrate``: the target rate on any net, nothing else changed, and why it is missed."""

import copy
import io
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import sj_taid
from sj_taid import ALIFNode, calibrate, monitor
from sj_taid.calibration import fixed_thresholds, set_fixed_thresholds
from tests.zoo import build

LIF, PLIF, IF = neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode


class Own(getattr(neuron, "SimpleBaseNode", neuron.BaseNode)):
    def neuronal_charge(self, x):
        self.v = self.v * 0.5 + x


@pytest.mark.parametrize("threshold", [0.01, 10.0])
def test_calibrate_reaches_the_rate_in_every_layer(threshold):
    net, x_seq = build("sew_resnet", LIF)
    for path in fixed_thresholds(net):
        net.get_submodule(path).v_threshold = threshold
    report = calibrate(net, x_seq, rate=0.15)
    assert len(report.rows) > 8 and not report.missed, str(report)
    with monitor(net) as watch, torch.no_grad():
        net(x_seq)
    for path, state in watch.layers().items():
        assert state.firing_rate == pytest.approx(0.15, rel=0.2), path


@pytest.mark.parametrize(
    ("levels", "options"), [(14, {}), (4, {"init_tau": None, "normalize": True})]
)
def test_calibrate_gives_a_mean_count_of_the_rate_times_what_a_step_gives(levels, options):
    make = partial(ALIFNode, levels=levels, v_reset=None, step_mode="m", **options)
    net = nn.Sequential(nn.Linear(8, 64), make(v_threshold=9.0), nn.Linear(64, 32), make())
    x_seq = torch.rand(4, 32, 8)
    report = calibrate(net, x_seq, rate=0.1)
    assert not report.missed, str(report)
    with monitor(net) as watch, torch.no_grad():
        net(x_seq)
    for state in (watch.layers()["1"], watch.layers()["3"]):
        assert state.firing_rate == pytest.approx(0.1 * levels, rel=0.05)


@pytest.mark.parametrize(
    ("trained", "frozen", "warned"),
    [(False, True, True), (False, False, False), (True, True, False)],
)
def test_calibrate_warns_of_running_statistics_that_are_those_of_the_start(trained, frozen, warned):
    net = nn.Sequential(layer.Conv2d(2, 6, 3), layer.BatchNorm2d(6), LIF())
    functional.set_step_mode(net, "m")
    if trained:
        net(images())
        functional.reset_net(net)
    net.train(not frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(net, images())
    found = [str(w.message) for w in caught if "have never trained" in str(w.message)]
    assert bool(found) == warned and all("'1'" in text for text in found)


def small_net(make, **options):
    return nn.Sequential(
        *(layer.Conv2d(2, 6, 3), make(v_threshold=7.0, **options)),
        *(layer.Flatten(), layer.Linear(6 * 6 * 6, 64), make(v_threshold=1e-3, **options)),
    )


def images(steps=4, batch=16):
    return torch.rand(steps, batch, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def thresholds(net):
    return [torch.as_tensor(m.v_threshold).clone() for m in net if hasattr(m, "v_threshold")]


@pytest.mark.parametrize(
    ("kind", "v_reset"), [(LIF, 0.0), (IF, -0.25), (ALIFNode, -65.0), (Own, None)]
)
def test_calibrate_stays_above_the_reset(kind, v_reset):
    net = small_net(kind, v_reset=v_reset)
    functional.set_step_mode(net, "m")
    report = calibrate(net, images(), rate=0.3)
    assert [row.after.firing_rate for row in report.rows] == pytest.approx([0.3, 0.3], rel=0.01)
    assert min(thresholds(net)) > (v_reset or 0.0)


def test_calibrate_sets_each_channel():
    net = nn.Sequential(layer.Conv2d(2, 3, 3), ALIFNode(channels=3, v_threshold=9.0))
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        net[0].weight.abs_().mul_(torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1))
    report = calibrate(net, images(batch=4), rate=0.2)
    assert not report.missed
    rates = net(images(batch=4)).mean((0, 1, 3, 4))
    torch.testing.assert_close(rates, torch.full((3,), 0.2), rtol=0.02, atol=0.0)
    assert len(net[1].v_threshold.unique()) == 3


@pytest.mark.parametrize("training", [True, False])
def test_calibrate_changes_only_thresholds_and_takes_a_fused_norm_as_the_norm_before(training):
    options = {"v_threshold": 5.0, "store_v_seq": True}
    net = nn.Sequential(
        *(layer.Conv2d(2, 3, 3), layer.BatchNorm2d(3), ALIFNode(**options), layer.Dropout(0.5)),
        *(layer.Conv2d(3, 3, 3), layer.BatchNorm2d(3, momentum=None), LIF(**options)),
    )
    functional.set_step_mode(net, "m")
    sj_taid.accelerate(net)
    net(images()).sum().backward()
    apart = copy.deepcopy(net.train(training))
    sj_taid.unaccelerate(apart)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    before = torch.get_rng_state()
    report = calibrate(net, images(), rate=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not report.missed and report.rows[0].before.firing_rate < 0.01, str(report)
    assert net[2].v == net[6].v == 0.0
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]) == (name != "2.v_threshold"), name
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.requires_grad
    assert net.training == training and all(m.training == training for m in net.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert not calibrate(apart, images(), rate=0.1).missed
    torch.testing.assert_close(thresholds(net), thresholds(apart), rtol=1e-3, atol=0.0)


class Hostile(nn.Module):
    """Neurons that have no threshold of their own for one call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64)
        self.twice, self.idle, self.one, self.other = (
            ALIFNode(step_mode="m", v_threshold=0.3) for _ in range(4)
        )
        self.other.v_threshold = self.one.v_threshold
        self.stepped = layer.MultiStepContainer(LIF())
        self.positive = ALIFNode(step_mode="m")
        register_parametrization(self.positive, "v_threshold", nn.Softplus())
        self.readout = LIF(step_mode="m", v_threshold=math.inf)
        self.fine = LIF(step_mode="m", v_threshold=7.0)

    def forward(self, x_seq):
        x_seq = self.twice(self.second(self.twice(self.first(x_seq))))
        x_seq = self.first.bias + self.stepped(self.other(self.one(x_seq)))
        return self.fine(x_seq), self.readout(self.positive(x_seq))


def test_calibrate_reports_neurons_without_a_threshold_of_their_own():
    net = Hostile()
    report = calibrate(net, torch.rand(6, 16, 8))
    shares = "another neuron shares its threshold"
    assert {row.layer: row.note for row in report.missed} == {
        "twice": "it is called 2 times, and has one threshold",
        "idle": "it does not run on x_seq",
        "one": shares,
        "other": shares,
        "stepped.0": "it is in step mode 's'; calibrate sees whole sequences alone",
        "positive": "its threshold is parametrized",
        "readout": "its threshold is infinite: it never fires",
    }
    assert all(row.after.v_threshold == row.before.v_threshold for row in report.missed)
    assert report.rows[1].after.firing_rate is None
    assert "1 layers calibrated, 7 missed" in str(report)


NONE = "no threshold gives the rate: the nearest is 0"
BOUNDED = "no threshold from min_v_threshold=0.9 up gives the rate: the nearest is 0"
RAMP = partial(LIF, surrogate_function=surrogate.ATan(spiking=False))
NO_SPIKES = "it gives no spikes: its surrogate has spiking=False"


class FiresAtItsOwn(Own):
    """It compares with another number than its threshold."""

    def neuronal_fire(self):
        return self.surrogate_function(self.v - 0.5)


@pytest.mark.parametrize(
    ("make", "x_seq", "note"),
    [
        (partial(IF, 6.0, 5.0), -torch.rand(3, 5, 4), NONE),
        (partial(ALIFNode, min_v_threshold=0.9), torch.rand(3, 5, 4), BOUNDED),
        (RAMP, torch.rand(3, 5, 4), NO_SPIKES),
        (FiresAtItsOwn, torch.rand(3, 5, 4), "it fires at any threshold"),
    ],
)
def test_calibrate_says_why_a_rate_is_missed_and_keeps_the_threshold(make, x_seq, note):
    report = calibrate(nn.Sequential(make(step_mode="m")), x_seq, rate=0.1)
    (row,) = report.missed
    assert row.note == note and row.after.v_threshold == row.before.v_threshold
    assert "set_fixed_thresholds" not in str(report)  # nothing is to be saved


def test_calibrate_takes_the_nearest_rate_above_0_and_counts_channels_that_miss():
    net = nn.Sequential(IF(v_threshold=100.0, step_mode="m"))
    for rate, nearest in ((0.05, 0.25), (0.3, 0.25), (0.45, 0.5), (0.9, 1.0)):
        (row,) = calibrate(net, torch.ones(4, 3, 2), rate=rate).rows
        assert row.after.firing_rate == nearest
    net = nn.Sequential(ALIFNode(channels=4, step_mode="m"))
    x_seq = torch.rand(4, 32, 4, 5)
    x_seq[:, :, 1:3] *= -1
    (row,) = calibrate(net, x_seq).missed
    assert row.note == "no threshold gives the rate: in 2 of 4 channels, the nearest is 0"
    assert net[0].v_threshold[1:3].tolist() == [1.0, 1.0]


def test_calibrate_takes_a_huge_input_as_one_spike():
    x_seq = torch.rand(4, 32, 8)
    x_seq[0, 0, 0] = 1e30  # it fires at any threshold
    (row,) = calibrate(nn.Sequential(IF(step_mode="m")), x_seq).rows
    assert not row.note and row.after.firing_rate == pytest.approx(0.2, rel=0.2)


def test_calibrate_names_a_layer_whose_voltage_is_not_finite():
    net, x_seq = nn.Sequential(nn.Linear(8, 64), LIF(step_mode="m")), torch.rand(4, 32, 8)
    net[0].weight.data[0, 0] = math.inf
    (row,) = calibrate(net, x_seq).missed
    assert row.note == "its voltage is not finite"


def tree(kinds):
    """Neurons of these kinds below other modules, the last one by two paths."""
    blocks = [nn.Sequential(nn.Linear(32, 32), kind(v_threshold=9.0)) for kind in kinds]
    net = nn.Sequential(nn.Linear(8, 32), nn.Sequential(*blocks))
    net.forward = lambda x_seq: net[1](net[0](x_seq))
    net.last = blocks[-1]
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize(
    ("kinds", "fixed"), [((IF, ALIFNode, LIF, PLIF), (0, 2, 3)), ((ALIFNode, ALIFNode), ())]
)
def test_calibrated_thresholds_are_saved_and_put_back(kinds, fixed):
    torch.manual_seed(1)
    net, fresh, x_seq = tree(kinds), tree(kinds), 4 * torch.rand(4, 32, 8)
    sj_taid.accelerate(net)
    report = calibrate(net, x_seq)
    paths = [f"1.{n}.1" for n in fixed]
    assert [*report.fixed_thresholds] == paths
    last = str(report).splitlines()[-1]
    assert (f"{len(paths)} thresholds" in last and "set_fixed_thresholds" in last) == bool(paths)
    expected = net(x_seq)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "thresholds": report.fixed_thresholds}, file)
    file.seek(0)
    saved = torch.load(file)
    fresh.load_state_dict(saved["net"])
    assert torch.equal(fresh(x_seq), expected) == (not paths)
    functional.reset_net(fresh)
    set_fixed_thresholds(fresh, saved["thresholds"])
    assert torch.equal(fresh(x_seq), expected)


def test_set_fixed_thresholds_sets_all_or_none():
    net = tree((IF, ALIFNode, LIF))
    with pytest.raises(ValueError, match=r"at '1.1.1'; there are \['1.0.1', '1.2.1'\]"):
        set_fixed_thresholds(net, {"1.0.1": 0.5, "1.1.1": 0.5})
    with pytest.raises(ValueError, match=r"threshold of '1.2.1' must be a number"):
        set_fixed_thresholds(net, {"1.0.1": 0.5, "1.2.1": "0.5"})
    assert fixed_thresholds(net) == {"1.0.1": 9.0, "1.2.1": 9.0}


@pytest.mark.parametrize("threshold", [9, np.float32(9.0)])
def test_a_threshold_of_any_kind_of_number_is_calibrated_and_kept(threshold):
    net = nn.Sequential(nn.Linear(8, 64), LIF(step_mode="m"))
    net[1].v_threshold = threshold
    assert fixed_thresholds(net) == {"1": 9.0}
    report = calibrate(net, torch.rand(4, 32, 8))
    assert not report.missed and report.fixed_thresholds == {"1": net[1].v_threshold}


def test_calibrate_takes_a_compiled_net():
    net = nn.Sequential(nn.Linear(8, 64), ALIFNode(step_mode="m", v_threshold=5.0))
    compiled = torch.compile(net, backend="eager")
    x_seq = torch.rand(4, 16, 8)
    with torch.no_grad():
        compiled(x_seq)
    functional.reset_net(net)
    (row,) = calibrate(compiled, x_seq).rows
    assert row.after.firing_rate == pytest.approx(0.2, rel=0.02)


def test_calibrate_changes_nothing_after_an_error():
    net = small_net(LIF)
    with pytest.raises(ValueError, match=r"in step mode 's'.*set_step_mode\(net, 'm'\)"):
        calibrate(net, images())
    functional.set_step_mode(net, "m")
    with pytest.raises(ValueError, match="x_seq has no values"):
        calibrate(net, images()[:, :0])
    with pytest.raises(ValueError, match="values in x_seq are NaN"):
        calibrate(net, images().index_fill(0, torch.tensor(1), torch.nan))
    with pytest.raises(ValueError, match="rate must be more than 0 and less than 1"):
        calibrate(net, images(), rate=1.0)
    net.append(layer.Linear(63, 1, step_mode="m"))  # after both neurons
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(net, images())
    assert [t.item() for t in thresholds(net)] == pytest.approx([7.0, 1e-3])
    assert net[1].v == 0.0 and not net[1]._forward_pre_hooks
