"""One node on both versions of SpikingJelly, as the users of each expect it."""

import warnings

import pytest
from spikingjelly.activation_based import functional, neuron
from torch import nn

from sj_taid import ALIFNode, _compat
from sj_taid.ops import backends

only_14 = pytest.mark.skipif(
    _compat.FUNCTIONAL_STATES, reason="2.x has no backends and no neuronal_charge hooks"
)


@pytest.mark.parametrize("version", ["0.0.0.0.15", "0.0.0.1", "1.0.0", "3.0.0"])
def test_warn_if_untested_names_both_versions(version):
    with pytest.warns(UserWarning, match=rf"0\.0\.0\.0\.14 and 2\.x, but {version}"):
        _compat.warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.0.0.0.14", "2.0.0", "2.1.3", _compat.SPIKINGJELLY_VERSION])
def test_warn_if_untested_is_silent_for_tested_versions(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.warn_if_untested(version)


def test_node_is_a_base_node_of_spikingjelly():
    node = ALIFNode()
    assert isinstance(node, neuron.BaseNode)
    assert dict(node.named_memories())["v"] == 0.0
    assert node.supported_backends == backends.names()
    node.backend = "torch"
    assert node.backend == "torch"


def subclass(kind, **attributes):
    return type("Own", (kind,), attributes)()


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        *((kind(), kind) for kind in _compat.PLAIN_NEURONS),
        (subclass(neuron.IFNode, __init__=lambda self: neuron.IFNode.__init__(self, 0.5)), "IF"),
        (
            subclass(neuron.LIFNode, supported_backends=("torch",), extra_repr=lambda self: ""),
            "LIF",
        ),
        (subclass(neuron.LIFNode, helper=lambda self: None), "LIF"),
        (subclass(subclass(neuron.LIFNode).__class__), "LIF"),
        *(
            (subclass(neuron.LIFNode, **{name: lambda self, x: x}), None)
            for name in (
                *("__call__", "forward", "multi_step_forward", "single_step_forward"),
                *("neuronal_charge", "neuronal_fire", "neuronal_reset", "reset"),
            )
        ),
        (subclass(neuron.LIFNode, tau=property(lambda self: 3.0, lambda self, tau: None)), None),
        (ALIFNode(), None),
        (nn.Linear(1, 1), None),
    ],
)
def test_plain_kind_takes_subclasses_that_only_fill_in_defaults(node, kind):
    kinds = {name: getattr(neuron, f"{name}Node") for name in ("IF", "LIF")}
    assert _compat.plain_kind(node) is kinds.get(kind, kind)


def test_plain_kind_refuses_a_mixin_that_comes_first():
    class Doubled(nn.Module):
        def forward(self, x):
            return super().forward(2.0 * x)

    assert _compat.plain_kind(type("Own", (Doubled, neuron.LIFNode), {})()) is None


@only_14
def test_set_backend_reaches_the_node():
    net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    functional.set_backend(net, "torch")
    assert net[1].backend == "torch"
    functional.set_backend(net, "auto", instance=ALIFNode)
    assert net[1].backend == "auto"
    functional.set_backend(net, "lava")  # logs that it is not supported, and keeps the old one
    assert net[1].backend == "auto"


@only_14
def test_node_refuses_to_override_a_hook_it_does_not_call():
    with pytest.raises(TypeError, match="Other overrides neuronal_fire"):

        class Other(ALIFNode):
            def neuronal_fire(self):
                return super().neuronal_fire() * 0.0
