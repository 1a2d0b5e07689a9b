"""A forgotten reset: errors that name the neuron, and two ways never to forget."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, _graph, fresh_state, name_neurons, swap_neurons
from sj_taid.functional import alif_multi_step
from tests.helpers import grid


def make_net(**options):
    net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode(v_threshold=0.2))
    functional.set_step_mode(net, "m")
    swap_neurons(net, **options)
    return net


def test_changed_batch_size_names_the_neuron_and_the_remedy():
    net = make_net()
    net(torch.rand(5, 2, 4))
    with pytest.raises(ValueError, match=r"the neuron '1'.*\[2, 3\].*\[6, 3\].*reset_net\(net\)"):
        net(torch.rand(5, 6, 4))


def test_stale_graph_names_the_neuron_and_the_remedy():
    net = make_net()
    net(torch.rand(5, 2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the neuron '1'.*freed.*reset_net.*detach_net"):
        net(torch.rand(5, 2, 4))


def test_a_neuron_without_a_name_describes_itself():
    node = ALIFNode()
    node(torch.rand(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"ALIFNode\(\n  tau=2"):
        node(torch.rand(2, 3))
    name_neurons(nn.ModuleDict({"hidden": node}))
    with pytest.raises(RuntimeError, match="the neuron 'hidden'"):
        node(torch.rand(2, 3))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("case", grid(dtypes=(torch.float32, torch.bfloat16)), ids=str)
def test_freed_graph_is_seen_and_a_live_one_is_not(case, T):
    x_seq = torch.randn(T, 3, 5, dtype=case.dtype) + 1.0
    parameter = torch.full((), 0.3).requires_grad_()
    spikes, v, _ = alif_multi_step(x_seq, 0.0, parameter, parameter, **case.options())
    assert not _graph.graph_is_freed(v)
    spikes.sum().backward(retain_graph=True)
    assert not _graph.graph_is_freed(v)
    with torch.no_grad():
        assert not _graph.graph_is_freed(v)
    spikes.sum().backward()
    assert _graph.graph_is_freed(v)
    assert not _graph.graph_is_freed(v.detach())
    with pytest.raises(RuntimeError, match="second time"):
        v.sum().backward()


def test_what_is_not_a_mistake_passes():
    net = make_net()
    x = torch.rand(5, 2, 4)
    net(x).sum().backward(retain_graph=True)
    net(x).sum().backward()
    functional.detach_net(net)  # truncated BPTT
    net(x).sum().backward()
    with torch.no_grad():
        net(x)
    functional.reset_net(net)
    net(x)


@pytest.mark.parametrize("kind", [ALIFNode, neuron.LIFNode])
def test_fresh_state_starts_from_rest_and_leaves_nothing(kind):
    net = nn.Sequential(nn.Linear(4, 3), kind(surrogate_function=surrogate.ATan()))
    x = torch.rand(2, 4)
    with fresh_state(net) as same:
        assert same is net
        first = net(x)
        first.sum().backward()
    assert net[1].v == 0.0
    with fresh_state(net):
        assert torch.equal(net(x), first)
    with pytest.raises(KeyError), fresh_state(net):
        net(x)
        raise KeyError
    assert net[1].v == 0.0
    if kind is ALIFNode:
        assert net[1].name == "1"
