"""One node on both lines of SpikingJelly, as the users of each expect it."""

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
def test_untested_version_gets_a_warning_that_names_both_lines(version):
    with pytest.warns(UserWarning, match=rf"0\.0\.0\.0\.14 and 2\.x, but {version}"):
        _compat.warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.0.0.0.14", "2.0.0", "2.1.3", _compat.SPIKINGJELLY_VERSION])
def test_tested_version_gets_none(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.warn_if_untested(version)


def test_is_a_base_node_and_memory_module_of_the_host():
    node = ALIFNode()
    assert isinstance(node, neuron.BaseNode)
    assert dict(node.named_memories())["v"] == 0.0
    assert node.supported_backends == backends.names()
    node.backend = "torch"
    assert node.backend == "torch"


@only_14
def test_set_backend():
    net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    functional.set_backend(net, "torch")
    assert net[1].backend == "torch"
    functional.set_backend(net, "auto", instance=ALIFNode)
    assert net[1].backend == "auto"
    functional.set_backend(net, "lava")  # logs that it is not supported, and keeps the old one
    assert net[1].backend == "auto"


@only_14
def test_an_override_of_a_hook_that_is_not_called_is_refused():
    with pytest.raises(TypeError, match="Other overrides neuronal_fire"):

        class Other(ALIFNode):
            def neuronal_fire(self):
                return super().neuronal_fire() * 0.0
