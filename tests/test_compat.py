"""One node on both versions of SpikingJelly, as the users of each expect it."""

import logging
from weakref import WeakKeyDictionary

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from sj_taid import ALIFNode, swap_neurons
from sj_taid._internal import compat
from sj_taid.ops import backends

only_14 = pytest.mark.skipif(
    compat.FUNCTIONAL_STATES, reason="2.x has no backends and no neuronal_charge hooks"
)


def test_node_is_a_base_node_of_spikingjelly():
    node = ALIFNode()
    assert isinstance(node, neuron.BaseNode) and dict(node.named_memories())["v"] == 0.0
    assert node.supported_backends == backends.names()


def subclass(*kinds, **attributes):
    own = type("Own", kinds, {})
    for name, value in attributes.items():  # clock_driven refuses some in a class statement
        setattr(own, name, value)
    return own()


@pytest.mark.parametrize("kind", compat.PLAIN_NEURONS)
def test_a_subclass_that_fills_in_defaults_is_a_plain_neuron(kind):
    own = subclass(kind, supported_backends=("torch",), extra_repr=repr, helper=repr)
    fills_in = subclass(neuron.LIFNode, __init__=lambda self: neuron.LIFNode.__init__(self, 3.0))
    for node in (kind(), own, subclass(type(own)), fills_in):
        assert compat.why_not_plain(node) is None


class Doubled(nn.Module):
    def forward(self, x):
        return super().forward(2.0 * x)


@pytest.mark.parametrize(
    "node",
    [
        *(subclass(neuron.LIFNode, **{n: repr}) for n in ("__call__", "reset", *compat.HOOKS)),
        subclass(neuron.LIFNode, tau=property(lambda self: 3.0, lambda self, tau: None)),
        subclass(Doubled, neuron.LIFNode),
    ],
)
def test_a_subclass_that_computes_something_else_is_none(node):
    assert "a subclass of LIFNode that overrides methods" in compat.why_not_plain(node)


def test_private_names_of_spikingjelly_are_there():
    """``reset_net`` and pickles would go wrong in silence without them."""
    node = neuron.LIFNode(v_reset=-0.25)
    assert compat.states_of(node).keys() >= {"v"} and compat.reset_value(node, "v") == -0.25
    compat.states_of(node)["v"] = 0.5
    assert node.v == 0.5
    if compat.FUNCTIONAL_STATES:
        assert isinstance(functional.net_config._RESET_MODULE_CACHE, WeakKeyDictionary)
        assert node._neuron_precision is None and not compat.has_precision_policy(node)
        node._neuron_precision = (torch.float16, "fp32", "fp32")
        assert compat.has_precision_policy(node)


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 has no such cache")
def test_a_renamed_cache_is_said_after_a_swap(monkeypatch):
    monkeypatch.delattr(functional.net_config, "_RESET_MODULE_CACHE")
    net = nn.Sequential(neuron.LIFNode())
    with pytest.warns(UserWarning, match=r"functional\.reset_net\(net\) ran before the swap"):
        swap_neurons(net)
    assert isinstance(net[0], ALIFNode)


def test_a_missing_triton_is_not_said_while_we_run_a_net(caplog, monkeypatch):
    logger = logging.getLogger("torch._library.triton")
    caplog.set_level(logging.WARNING, logger.name)  # whatever ran before
    monkeypatch.setattr(logger, "propagate", False)  # to what torch or pytest adds
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with compat.quiet_triton():
        logger.warning("Triton not available, find_triton_kernels = []")
        logger.warning("another")
    logger.warning("Triton not available, find_triton_kernels = []")
    assert [record.getMessage()[:6] for record in caplog.records] == ["anothe", "Triton"]


@only_14
def test_set_backend_reaches_the_node():
    net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    functional.set_backend(net, "torch")
    assert net[1].backend == "torch"
    functional.set_backend(net, "lava")  # logs that it is not supported, and keeps the old one
    assert net[1].backend == "torch"


@only_14
def test_node_refuses_to_override_a_hook_it_does_not_call():
    with pytest.raises(TypeError, match="Other overrides neuronal_fire"):

        class Other(ALIFNode):
            def neuronal_fire(self):
                return super().neuronal_fire() * 0.0
