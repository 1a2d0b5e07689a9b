"""Firing rates, learned parameters, and the warnings of dead and saturated layers."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from sj_taid import ALIFNode, monitor, swap_neurons, to_lif
from sj_taid._internal import compat
from sj_taid.monitoring import LayerState


def make_net():
    net = nn.Sequential(
        ALIFNode(init_tau=4.0, v_threshold=0.5, channels=2, decay_input=False),
        neuron.LIFNode(tau=3.0, v_threshold=0.3),
        neuron.ParametricLIFNode(init_tau=2.0, v_threshold=0.4),
        neuron.IFNode(),
    )
    functional.set_step_mode(net, "m")
    return net


def test_monitor_counts_over_calls():
    net = make_net()
    watch = monitor(net, dead=0.0, saturated=1.0)
    x_seq = torch.rand(5, 3, 2)
    first = net[0](x_seq)
    functional.reset_net(net)
    second = net[0](x_seq[:2])
    expected = (first.sum() + second.sum()).item() / (first.numel() + second.numel())
    with torch.no_grad():
        net[0].v_threshold.copy_(torch.tensor([0.6, 0.8]))
    state = watch.state()
    assert 0.0 < expected < 1.0
    assert state["0"].firing_rate == pytest.approx(expected)
    assert state["0"].tau == pytest.approx(4.0)
    assert state["0"].v_threshold == pytest.approx(0.7)
    assert (state["1"].tau, state["2"].tau, state["3"].tau) == (3.0, pytest.approx(2.0), None)
    assert state["1"].firing_rate is None
    table = str(watch)
    assert all(text in table for text in ("rate", "threshold", "0.7", f"{expected:.4g}", "-"))
    watch.clear()
    assert watch.state()["0"].firing_rate is None


def test_monitor_counts_a_count_as_so_many_spikes():
    net = nn.ModuleDict({n: ALIFNode(levels=4, v_reset=None, init_tau=1.1) for n in ("few", "all")})
    with monitor(net, saturated=0.9) as watch:
        counts = net["few"](torch.tensor([[0.0, 2.4, 3.3]]))
        net["all"](torch.full((1, 3), 9.0))
    with pytest.warns(UserWarning, match=r"^saturated layers.*step: all \(4\)\. "):
        state = watch.state()
    assert counts.tolist() == [[0, 2, 3]] and state["few"].firing_rate == pytest.approx(5 / 3)
    divided = ALIFNode(levels=4, init_tau=None, normalize=True)
    with monitor(nn.Sequential(divided)) as watch:
        divided(torch.tensor([[0.0, 2.4, 3.3]]))
    assert watch.layers()["0"] == LayerState(pytest.approx(5 / 3), None, 1.0)


def test_monitor_names_dead_saturated_and_not_finite_layers():
    net = nn.ModuleDict({name: ALIFNode() for name in ("dead", "busy", "fine", "nan")})
    net["plain"] = neuron.LIFNode()
    with monitor(net) as watch:
        net["dead"](torch.zeros(4, 3))
        net["busy"](3 * torch.ones(4, 3))
        net["fine"](torch.tensor([[0.0, 3.0]]))
        for name in ("nan", "plain"):
            net[name](torch.tensor([[math.nan, 3.0]]))
    marks = [line.split()[-1] for line in str(watch).splitlines()[1:]]
    assert marks == ["dead", "saturated", "1", "finite", "finite"]
    with pytest.warns(UserWarning) as caught:
        states = watch.state()
    assert math.isnan(states["nan"].firing_rate) and math.isnan(states["plain"].firing_rate)
    dead, not_finite, saturated = sorted(str(warning.message) for warning in caught)
    assert dead.startswith("dead layers, spikes per neuron and step: dead (0).")
    assert saturated.startswith("saturated layers, spikes per neuron and step: busy (1).")
    assert "sj_taid.calibrate(net, x_seq)" in dead and dead[-40:] == saturated[-40:]
    assert "step: nan (nan), plain (nan). " in not_finite
    assert "torch.autograd.detect_anomaly()" in not_finite
    watch.clear()
    assert watch.layers()["nan"].firing_rate is None


def test_monitor_names_thresholds_at_their_bound():
    net = nn.ModuleDict({"low": ALIFNode(v_threshold=0.5, min_v_threshold=0.1, channels=3)})
    net["free"] = ALIFNode(v_threshold=0.05)
    net["high"] = ALIFNode(v_threshold=0.2, min_v_threshold=0.1)
    watch = monitor(net, dead=0.0, saturated=1.0)
    net["low"](torch.zeros(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.state()
    with torch.no_grad():
        net["low"].v_threshold.copy_(torch.tensor([0.1, 0.05, 0.11]))
    with pytest.warns(UserWarning, match=r"at their lower bound: low \(0\.1, 2 of 3\)\. "):
        watch.state()


def test_monitor_names_thresholds_at_the_reset():
    net = nn.ModuleDict({"per_channel": ALIFNode(channels=2), "soft": ALIFNode(v_reset=None)})
    net["negative"], net["plain"] = ALIFNode(v_reset=-0.5, v_threshold=-0.4), neuron.LIFNode()
    watch = monitor(net)
    assert "reset voltage" not in str(watch)
    with torch.no_grad():
        net["per_channel"].v_threshold[1] = 0.0
        net["soft"].v_threshold.fill_(-0.46)
    text = "thresholds at or below the reset voltage: per_channel, soft. "
    assert text in str(watch)
    with pytest.warns(UserWarning, match=text):
        watch.state()


def test_monitor_ends_with_its_block():
    net = nn.Sequential(ALIFNode())
    with monitor(net) as watch:
        net(torch.tensor([[0.0, 3.0]]))
    net(torch.zeros(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.state()["0"].firing_rate == 0.5


def test_monitor_reads_the_neuron_that_took_anothers_place():
    net = nn.Sequential(neuron.LIFNode(v_threshold=1.0))
    watch = monitor(net)
    swap_neurons(net)
    net[0].v_threshold.data.fill_(0.5)
    net(torch.tensor([[2.0, 0.0]]))
    expected = LayerState(firing_rate=0.5, tau=2.0, v_threshold=0.5)
    assert watch.state()["0"] == expected
    del net[0]
    assert watch.state()["0"] == expected


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), to_lif]
)
def test_monitor_in_copies_counts_apart(duplicate):
    net = nn.Sequential(ALIFNode())
    watch = monitor(net)
    net(torch.tensor([[0.0, 3.0]]))
    functional.reset_net(net)
    duplicate(net)(torch.ones(5, 2) * 3.0)
    assert watch.state()["0"].firing_rate == 0.5


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="these neurons are SpikingJelly 2.x's")
def test_monitor_of_ternary_and_traced_neurons():
    ternary = nn.Sequential(neuron.TernaryIFNode(v_threshold=1.0, step_mode="m"))
    with monitor(ternary, saturated=1.0) as watch:
        spikes = ternary(torch.tensor([[[2.0, -2.0, 0.0, -2.0]]]))
    assert spikes.min() < 0 and watch.state()["0"].firing_rate == 0.75
    traced = nn.Sequential(neuron.OTTTLIFNode())
    with monitor(traced, dead=0.0, saturated=1.0) as watch:
        spikes, _ = traced(torch.tensor([[0.0, 5.0]]))
    assert watch.state()["0"].firing_rate == spikes.mean() == 0.5


def test_monitor_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"dead=0\.5, saturated=0\.1"):
        monitor(make_net(), dead=0.5, saturated=0.1)
    with pytest.raises(ValueError, match=r"no neuron of .*SimpleBaseNode to watch"):
        monitor(nn.Linear(1, 1))
