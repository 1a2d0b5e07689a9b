"""States: errors of a forgotten reset, fresh_state, gradient checkpointing."""

import warnings
from inspect import signature

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid import ALIFNode, accelerate, calibrate, fresh_state, name_neurons, swap_neurons
from sj_taid._internal import compat
from sj_taid.calibration import fixed_thresholds


def make_net(**options):
    net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode(v_threshold=0.2))
    functional.set_step_mode(net, "m")
    swap_neurons(net, **options)
    return net


def test_state_that_cannot_be_carried_names_neuron_and_remedy():
    node = ALIFNode()
    node(torch.rand(2, 3))
    of_net = nn.ModuleDict({"hidden": node})
    for root, who in ((node, r"ALIFNode\(tau=2"), (of_net, "the neuron 'hidden'")):
        name_neurons(root)
        with pytest.raises(ValueError, match=rf" of {who}.*\[2, 3\].*\[4, 3\].*reset_net\(net\)"):
            node(torch.rand(4, 3))


def test_what_is_no_module_is_named():
    public = [getattr(sj_taid, name) for name in sj_taid.__all__ if name[0].islower()]
    functions = [function for function in public if "net" in signature(function).parameters]
    assert len(functions) == 11
    others = {calibrate: (torch.rand(2, 3),), sj_taid.parameter_groups: (0.1,)}
    for function in (*functions, fixed_thresholds):
        with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, but it is "):
            function(nn.ReLU, *others.get(function, ())).__enter__()  # of the contexts among them


@pytest.mark.parametrize("kind", [neuron.LIFNode, ALIFNode])
def test_single_steps_are_said_once_with_the_remedy(kind):
    net, remedy = nn.Sequential(kind(), nn.Linear(3, 3), kind()), r"set_step_mode\(net, 'm'\)"
    with pytest.warns(UserWarning, match=remedy) as caught:
        accelerate(net)
    assert len(caught) == 1 and caught[0].filename == __file__
    report = swap_neurons(net)
    assert str(report).count("functional.set_step_mode") == 1
    net[0].step_mode = "m"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(net)
    assert not swap_neurons(net).remark


def test_metrics_and_what_is_called_reset_and_is_no_function_stay():
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics")

    class Own(torchmetrics.SumMetric):
        pass

    net, x = make_net(), torch.rand(5, 2, 4)
    net.reset, net.forward = True, net[:2].forward
    net.own = Own()
    net.both = torchmetrics.MetricCollection([torchmetrics.SumMetric()])
    net.tracker = torchmetrics.MetricTracker(torchmetrics.SumMetric(), maximize=True)
    net.tracker.increment()
    metrics = net.own, net.both, net.tracker
    for _ in range(3):
        with fresh_state(net):
            net(x)
        for metric in metrics:
            metric.update(2.0)
    calibrate(net, x)
    assert [metric.compute() for metric in metrics] == [6.0, {"SumMetric": 6.0}, 6.0]
    assert net.reset is True and net[1].v == 0.0


@pytest.mark.parametrize("kind", [ALIFNode, neuron.LIFNode])
def test_fresh_state_resets_before_and_after(kind):
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


class Steps(nn.Module):
    """A net in step mode "s", stepped over a sequence; SpikingJelly cannot make it functional."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        functional.set_step_mode(net, "s")

    def forward(self, x_seq):
        return torch.stack([self.net(x) for x in x_seq])


def make_deep_net(wrap=nn.Sequential):
    shared = {"v_threshold": 0.2, "step_mode": "m"}
    return wrap(
        nn.Sequential(nn.Linear(4, 6), ALIFNode(**shared), nn.Linear(6, 3), ALIFNode(**shared))
    )


def gradients(net, forward, x):
    net.zero_grad()
    forward(x).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


every_net = pytest.mark.parametrize("wrap", [nn.Sequential, Steps])


@every_net
@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 has no memopt")
@pytest.mark.parametrize("chunks", [1, 2])
def test_memopt_gives_the_same_gradients(wrap, chunks):
    from spikingjelly.activation_based import memopt

    net, x = make_deep_net(wrap), torch.rand(4, 2, 4)
    expected = gradients(net, net, x)
    for _ in range(2):
        functional.reset_net(net)
        got = gradients(net, memopt.checkpoint_module(net, chunks=chunks), x)
        torch.testing.assert_close(got, expected)


@every_net
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_is_right_or_names_the_remedy(wrap, use_reentrant):
    net, x = make_deep_net(wrap), torch.rand(4, 2, 4, requires_grad=True)
    name_neurons(net)
    expected = gradients(net, net, x)

    def from_rest(x):
        functional.reset_net(net)
        return net(x)

    got = gradients(net, lambda x: checkpoint(from_rest, x, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(got, expected)
    functional.reset_net(net)
    with pytest.raises(
        RuntimeError, match=r"'.*1' is recomputed.*memopt\.checkpoint_module.*reset"
    ):
        gradients(net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant), x)
    functional.reset_net(net)

    def two(x):
        outputs = []
        for sequence in (x, x.flip(0)):
            outputs.append(checkpoint(net, sequence, use_reentrant=use_reentrant))
            functional.reset_net(net)
        return torch.cat(outputs)

    with pytest.raises(RuntimeError, match=r"is recomputed"):
        gradients(net, two, x)


@every_net
def test_forward_unpacks_nothing_that_was_saved(wrap):
    net, x = make_deep_net(wrap), torch.rand(4, 2, 4)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        loss = net(x).sum() + net(x).sum()
        assert not unpacked
        loss.backward()
    assert unpacked


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_state_of_an_inference_may_start_training(backend, mode):
    net, x = make_net(backend=backend), torch.rand(5, 2, 4)
    with mode():
        net(x)
    assert all(gradient.isfinite().all() for gradient in gradients(net, net, x))


def test_change_in_place_names_the_neuron():
    pytest.importorskip("numba", reason="needs numba: pip install numba")
    net = make_net(backend="numba")
    h = net[0](torch.rand(5, 2, 4))
    spikes = net[1](h)
    h += spikes
    with pytest.raises(RuntimeError, match=r"the neuron '1' reads its input.*changed in place"):
        h.sum().backward()
