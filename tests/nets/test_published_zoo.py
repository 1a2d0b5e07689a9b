"""Nets in the idioms of published ones train as before, in fewer bytes."""

import copy

import published_nets
import pytest
import torch
from spikingjelly.activation_based import functional

from tests.nets.alike import EVALUATION, accelerated, assert_alike, results, robust

WAYS = {
    "training": (True, {"between": functional.reset_net}),
    "evaluation": (False, {"between": functional.detach_net, "context": EVALUATION}),
}


#: those whose evaluation is not their training with other statistics
DIFFER = ("MetaSpikeformer", "SpikingResformer", "SpikingVQVAE")


@pytest.mark.parametrize(
    ("name", "way"),
    [(n, way) for n in published_nets.NETS for way in WAYS if way == "training" or n in DIFFER],
)
def test_published_net_trains_alike(name, way):
    training, options = WAYS[way]
    net = published_nets.build(name, width=4).train(training)
    net, x = robust(lambda: (net, torch.rand(4, 2, 3, 8, 8)), **options)
    nets = copy.deepcopy(net), accelerated(copy.deepcopy(net))
    expected, got = (results(n, x, **options) for n in nets)
    assert_alike(got, expected, results(net.double(), x.double(), **options))
