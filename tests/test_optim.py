"""Parameter groups."""

import pytest
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from sj_taid import ALIFNode, parameter_groups


def test_parameter_groups_hold_every_learned_parameter_once():
    shared = ALIFNode()
    net = nn.Sequential(
        nn.Linear(2, 2),
        shared,
        nn.BatchNorm1d(2),
        shared,
        ALIFNode(learn_tau=False, channels=2),
        neuron.ParametricLIFNode(),
    )
    assert [group["lr"] for group in parameter_groups(net, lr=0.1)] == [0.1, 1.0]
    weights, neurons = parameter_groups(net, lr=0.1, lr_scale=0.5, weight_decay=0.2)
    assert weights["params"] == [*net[0].parameters(), *net[2].parameters()]
    assert neurons["params"] == [shared.w, shared.v_threshold, net[4].v_threshold, net[5].w]
    assert (weights["lr"], neurons["lr"], neurons["weight_decay"]) == (0.1, 0.05, 0.2)
    assert "weight_decay" not in weights


def test_parameter_groups_know_a_parametrized_threshold_and_layers_of_a_neuron():
    node = ALIFNode(v_threshold=0.5)
    register_parametrization(node, "v_threshold", nn.Softplus())
    node.recurrent = nn.Linear(2, 2)
    weights, neurons = parameter_groups(node, lr=0.1)
    assert weights["params"] == [*node.recurrent.parameters()]
    assert {*neurons["params"]} == {node.w, node.parametrizations.v_threshold.original}


def test_parameter_groups_leave_out_empty_ones():
    assert [g["name"] for g in parameter_groups(nn.Linear(1, 1), lr=1)] == ["weights"]
    assert parameter_groups(ALIFNode(learn_tau=False, learn_threshold=False), lr=1.0) == []


@pytest.mark.parametrize(("name", "value"), [("lr", "a"), ("lr_scale", -1.0)])
def test_parameter_groups_refuse_all_but_numbers_from_0(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number >= 0, but it is "):
        parameter_groups(ALIFNode(), **{"lr": 1.0, name: value})
