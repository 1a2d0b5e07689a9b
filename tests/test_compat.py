"""One node on both lines of SpikingJelly, as the users of each expect it."""

import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, _compat
from sj_taid.ops import backends
from tests.helpers import HALF

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("decay_input", [True, False])
def test_charge_fire_and_reset_make_a_step(decay_input, channels, v_reset, dtype):
    node = ALIFNode(
        1.7, decay_input, 0.6, v_reset, channels=channels, min_v_threshold=0.1, backend="torch"
    ).to(dtype)
    x_seq = torch.randn(4, 3, 5, 2, dtype=dtype) + 0.6
    expected = torch.stack([node(x) for x in x_seq])
    v = node.v
    node.reset()
    spikes = []
    for x in x_seq:
        node.neuronal_charge(x)
        spike = node.neuronal_fire()
        node.neuronal_reset(spike)
        spikes.append(spike.to(dtype))
    assert torch.equal(torch.stack(spikes), expected)
    assert torch.equal(node.v, v)


class Refractory(ALIFNode):
    """What 0.0.0.0.14's users do: change one of the hooks."""

    def neuronal_fire(self):
        return super().neuronal_fire() * 0.0


@only_14
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_overridden_hook_is_called(step_mode, dtype):
    node = Refractory(v_threshold=0.1, step_mode=step_mode, store_v_seq=True)
    x = torch.ones(4, 3, 2, dtype=dtype)
    spikes = node(x)
    assert spikes.sum() == 0 and spikes.dtype == dtype and spikes.shape == x.shape
    assert node.v.dtype == torch.float32
    assert (node.v > 0.1).all()
    if step_mode == "m":
        assert node.v_seq.shape == x.shape


@only_14
def test_hooks_pass_gradients_to_both_parameters():
    node = Refractory(surrogate_function=surrogate.ATan(), v_reset=None)
    node(torch.ones(3, 2))
    node.v.sum().backward()
    assert node.w.grad.isfinite() and node.w.grad != 0
    assert node.v_threshold.grad.isfinite()
