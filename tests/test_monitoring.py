"""Firing rates, learned parameters, and the warnings of dead and saturated layers."""

import copy
import math
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from sj_taid import ALIFNode, monitor, swap_neurons, to_lif
from sj_taid._internal import compat
from sj_taid.monitoring import _REMEDIES, LayerState


def test_monitor_counts_over_calls():
    net = nn.Sequential(
        ALIFNode(init_tau=4.0, v_threshold=0.5, channels=2, decay_input=False),
        *(neuron.LIFNode(tau=3.0), neuron.ParametricLIFNode(init_tau=2.0), neuron.IFNode()),
    )
    functional.set_step_mode(net, "m")
    watch = monitor(net)
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
    assert str(watch).splitlines()[1].split()[:4] == ["0", f"{expected:.4g}", "4", "0.7"]
    watch.clear()
    assert watch.state()["0"].firing_rate is None
    net[3](torch.ones(1, 1, 2))  # two spikes of two, and none of six
    net[1](torch.zeros(1, 3, 2))
    assert watch.firing_rate() == 0.25


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"v_reset": None, "init_tau": 1.1}, [0, 2, 3]),
        ({"init_tau": None, "normalize": True}, [0, 0.5, 0.75]),
    ],
)
def test_monitor_counts_a_count_as_so_many_spikes(options, given):
    net = nn.Sequential(ALIFNode(levels=4, **options))
    with monitor(net) as watch:
        assert net(torch.tensor([[0.0, 2.4, 3.3]])).tolist() == [given]
    assert watch.layers()["0"].firing_rate == pytest.approx(5 / 3)


def fallen(to, **options):
    """A neuron whose threshold has fallen."""
    node = ALIFNode(**options)
    node.v_threshold.data.copy_(torch.tensor(to))
    return node


AT_RESET = "threshold at or below the reset voltage"
AT_BOUND = "threshold at its lower bound"
NODES = {
    "dead": (ALIFNode(), [0.0, 0.0], ["dead"]),
    "busy": (ALIFNode(), [3.0, 3.0], ["saturated"]),
    "all": (ALIFNode(levels=4, v_reset=None), [9.0, 9.0], ["saturated"]),
    "one of them": (ALIFNode(levels=4, v_reset=None), [9.0, 0.0], []),
    "nan": (neuron.LIFNode(), [math.nan, 3.0], ["voltage not finite"]),
    "one of two": (fallen([1.0, 0.0], channels=2), [0.0, 3.0], [AT_RESET]),
    "soft": (fallen(-0.46, v_reset=None), [-3.0, 3.0], [AT_RESET]),
    "above its reset": (ALIFNode(v_reset=-0.5, v_threshold=-0.4), [-3.0, 3.0], []),
    "at the bound": (fallen([0.1, 3.0], min_v_threshold=0.1, channels=2), [1.0, 1.0], [AT_BOUND]),
    "below it": (fallen(-1.0, min_v_threshold=0.1), [0.0, 0.0], ["dead", AT_BOUND]),
    "free": (ALIFNode(v_threshold=0.05), [0.0, 3.0], []),
    "never ran": (ALIFNode(), None, []),
}


def test_monitor_notes_what_is_wrong_with_a_layer():
    net = nn.ModuleDict({name: node for name, (node, *_) in NODES.items()})
    with monitor(net) as watch:
        for node, x, _ in NODES.values():
            _ = x and node(torch.tensor([x]))
    lines = str(watch).splitlines()[1:]
    for (name, (*_, notes)), line in zip(NODES.items(), lines, strict=True):
        assert line.startswith(name) and line.endswith(", ".join(notes) or line[-1]), line
    with pytest.warns(UserWarning) as caught:
        states = watch.state()
    assert math.isnan(states["nan"].firing_rate) and states["never ran"].firing_rate is None
    texts = [str(warning.message) for warning in caught]
    for note in ("dead", "saturated", "voltage not finite", AT_RESET, AT_BOUND):
        names = [name for name, (*_, notes) in NODES.items() if note in notes]
        (text,) = [t for t in texts if t.startswith(f"layers {', '.join(names)}: {note}. ")]
        assert text.endswith(_REMEDIES[note])
    assert {warning.filename for warning in caught} == {__file__} and len(texts) == 5
    net["busy"](torch.zeros(1, 2))  # after the block
    assert watch.layers()["busy"].firing_rate == 1.0


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
    with monitor(ternary) as watch:
        spikes = ternary(torch.tensor([[[2.0, -2.0, 0.0, -2.0]]]))
    assert spikes.min() < 0 and watch.state()["0"].firing_rate == 0.75
    traced = nn.Sequential(neuron.OTTTLIFNode())
    with monitor(traced) as watch:
        spikes, _ = traced(torch.tensor([[0.0, 5.0]]))
    assert watch.state()["0"].firing_rate == spikes.mean() == 0.5
