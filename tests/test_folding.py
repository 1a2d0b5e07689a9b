"""``to_lif(net, fold_threshold=True)``: V_th = 1 with equal outputs, and why where it is not."""

import copy
import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn
from torch.nn import functional as F

import sj_taid
from sj_taid import ALIFNode, to_lif
from tests.helpers import build_swapped, trained_norm


def alif(values, **options):
    """One threshold, or a list of one for each channel."""
    channels = len(values) if isinstance(values, list) else None
    node = ALIFNode(channels=channels, **options)
    node.v_threshold.data.copy_(torch.tensor(values))
    return node


def make_net(values, v_reset, **options):
    """Behind a norm, a convolution with and a linear layer without a bias."""
    each = [[value, 2 * value, value, 4 * value] for value in values]
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, bias=False),
        trained_norm(),
        alif(values[0] if v_reset else each[0], v_reset=v_reset, **options),
        layer.Conv2d(4, 4, 3),
        alif(values[1] if v_reset else each[1], v_reset=v_reset, **options),
        layer.Flatten(),
        layer.Linear(4 * 4 * 4, 8, bias=False),
        alif(values[2], v_reset=v_reset, **options),
    )
    with torch.no_grad():
        net[6].weight.mul_(8.0)
    return net


def images(steps=6):
    return torch.rand(steps, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def run(net, x_seq):
    return net(x_seq) if net[0].step_mode == "m" else torch.stack([net(x) for x in x_seq])


def thresholds(net):
    return [m.v_threshold for m in net.modules() if isinstance(m, neuron.BaseNode)]


def fold_silently(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return to_lif(net, fold_threshold=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.0625])
def test_fold_is_equal_to_the_bit_for_powers_of_two(v_reset, mode, training):
    net = make_net([0.25, 0.125, 0.0625], v_reset).train(training)
    functional.set_step_mode(net, mode)
    x_seq = 8 * images()
    with torch.no_grad():
        run(net, x_seq[:2])  # goes on in the middle of a sequence
    before = copy.deepcopy(net.state_dict())
    folded = fold_silently(net)
    assert thresholds(folded) == [1.0, 1.0, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    expected = run(net, x_seq[2:])
    assert 0.0 < expected.mean() < 1.0
    assert torch.equal(run(folded, x_seq[2:]), expected)
    for each in (net, folded):  # also from rest
        functional.reset_net(each)
    assert torch.equal(run(folded, x_seq), run(net, x_seq))


def test_fold_is_equal_to_rounding_otherwise():
    net = make_net([0.17, 0.113, 0.057], 0.0)
    functional.set_step_mode(net, "m")
    folded = fold_silently(net)
    layers = ((net[:3], folded[:3]), (net[3:5], folded[3:5]))
    x_seq = images(16)
    for there, here in layers:
        expected = there(x_seq)
        assert 0.02 < expected.mean() < 0.98
        assert (here(x_seq) != expected).float().mean() < 1e-3
        x_seq = expected


def test_fold_takes_fused_norms():
    net = nn.Sequential(layer.Conv2d(2, 4, 3), trained_norm(), alif([0.5, 0.25, 0.5, 1.0])).eval()
    functional.set_step_mode(net, "m")
    apart = fold_silently(net)
    assert sj_taid.fuse_norm(net).changed
    joined = fold_silently(net)
    assert net[2].norm is net[1]
    assert torch.equal(joined[1].weight, apart[1].weight)
    torch.testing.assert_close(joined[1].bias, net[1].bias / net[2].v_threshold)
    assert torch.equal(joined(images()), apart(images()))


def test_fold_takes_spikingjellys_neurons():
    net = nn.Sequential(nn.Linear(4, 4), neuron.ParametricLIFNode(v_threshold=0.25))
    net.append(nn.Linear(4, 4)).append(neuron.IFNode(v_threshold=0.125))
    x = torch.rand(16, 4)
    expected = net(x)
    functional.reset_net(net)
    folded = fold_silently(net)
    assert thresholds(folded) == [1.0, 1.0] and type(folded[1]) is neuron.ParametricLIFNode
    assert expected.any() and torch.equal(folded(x), expected)


def test_fold_keeps_thresholds_behind_residual_sums():
    net = build_swapped(spiking_resnet.spiking_resnet18, v_threshold=0.25)
    with pytest.warns(UserWarning) as caught:
        folded = to_lif(net, fold_threshold=True)
    (warning,) = caught
    lines = [line.split(maxsplit=1) for line in str(warning.message).splitlines()[2:]]
    kept = {path for path, m in net.named_modules() if path.endswith("sn2")}
    assert {path: why.split(",")[0] for path, why in lines} == dict.fromkeys(kept, "a function")
    assert "layer2.0.sn2  a function, add, makes its input" in str(warning.message)
    for path, node in folded.named_modules():
        if isinstance(node, neuron.BaseNode):
            assert (node.v_threshold == 1.0) == (path not in kept), path
    x_seq = torch.rand(2, 2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x_seq)
        assert torch.equal(folded(x_seq), expected) and expected.unique().numel() > 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.sn = nn.Linear(4, 4), ALIFNode(v_threshold=0.5)


class Read(Block):
    def forward(self, x):
        y = self.fc(x)
        return self.sn(y) + y


class Scaling(Block):
    def forward(self, x):
        return self.sn(self.fc(x / float(x.mean())))


class TwoPlaces(Block):
    def forward(self, x):
        return self.sn(self.fc(self.sn(self.fc(x))))


class Readout(Block):
    def __init__(self, name="v"):
        super().__init__()
        self.name = name

    def forward(self, x):
        self.sn(self.fc(x))
        return getattr(self.sn, self.name)


class UntracedReadout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = behind(nn.Linear(4, 4))

    def forward(self, x_seq):
        for x in x_seq:
            self.layers(x)
        return self.layers[-1].v


class Tied(nn.Module):
    """Decodes by the transposed weight of the layer, which ``read`` gives."""

    def __init__(self, read):
        super().__init__()
        self.block, self.read = behind(nn.Linear(4, 4)), read

    def forward(self, x):
        return F.linear(self.block(x), self.read(self.block[0]))


class UntracedHelper(UntracedReadout):
    def forward(self, x_seq):
        for x in x_seq:
            self.layers(x)
        return self.read()

    def read(self):
        return next(layer.v for layer in self.layers[1:])


def wrapped(net):
    kind = type(net)
    net.forward = lambda x: kind.forward(net, x)
    return net


class Own(nn.Linear):
    def __init_subclass__(cls, *, kind):
        """No class is made of it without a kind."""


class OwnNode(ALIFNode):
    pass


def add_hook(which, kind):
    net = nn.Sequential(nn.Linear(4, 4), ALIFNode(v_threshold=0.5))
    getattr(net[which], kind)(lambda *_: None)
    return net


def tie_weights():
    net = nn.Sequential(nn.Linear(4, 4), ALIFNode(v_threshold=0.5), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def behind(*modules, **options):
    return nn.Sequential(*modules, ALIFNode(**{"v_threshold": 0.5, **options}))


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (behind(), "nothing that can be traced makes its input"),
        (behind(nn.Linear(4, 4), nn.ReLU()), "a ReLU makes its input"),
        (Read(), "a Linear makes its input; a function, add, reads its output"),
        (Scaling(), "the forward of Scaling cannot be traced"),
        (TwoPlaces(), "ALIFNode is called in 2 places"),
        (behind(Own(4, 4)), "what the Own before it computes is not known"),
        (add_hook(0, "register_forward_hook"), "the Linear before it has hooks"),
        (add_hook(1, "register_forward_pre_hook"), "it has forward hooks"),
        (add_hook(1, "register_forward_hook"), "it has forward hooks"),
        (Tied(lambda layer: layer.weight), "a forward reads weight of the Linear before it"),
        (Tied(lambda layer: layer.weight.t()), "a forward reads weight of the Linear before it"),
        (Tied(lambda layer: layer.bias.expand(4, 4)), "a forward reads bias of the Linear before"),
        (Tied(lambda layer: next(layer.parameters())), "a forward reads parameters of the Linear"),
        (Readout("memories"), "a forward reads memories of it"),
        (Readout("named_memories"), "a forward reads named_memories of it"),
        (UntracedHelper(), "a forward reads v of it"),
        (wrapped(UntracedReadout()), "a forward reads v of it"),
        (behind(layer.BatchNorm2d(4, affine=False)), "the BatchNorm2d before it has no weight"),
        (tie_weights(), "the Linear before it shares its parameters with another module"),
        (behind(nn.Linear(4, 4), v_threshold=-0.5), "only a positive and finite threshold scales"),
        (behind(nn.Linear(4, 4), v_threshold=torch.inf), "only a positive and finite threshold"),
        (nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(v_threshold=torch.inf)), "and finite"),
        (Readout(), "a forward reads v of it"),
        (nn.Sequential(Readout("v_threshold")), "a forward reads v_threshold of it"),
        (UntracedReadout(), "a forward reads v of it"),
        (nn.Sequential(nn.Linear(4, 4), alif([0.5, 0.25, 0.5, 1.0], v_reset=-1.0)), "several"),
        (nn.Sequential(nn.Linear(4, 3), alif([0.5, 0.25])), "has 3 channels, not 2"),
        (nn.Sequential(nn.Linear(4, 4), OwnNode(v_threshold=0.5)), "what a OwnNode computes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fold_says_why_a_threshold_stays(net, why):
    before = copy.deepcopy(net)
    with pytest.warns(UserWarning) as caught:
        kept = to_lif(net, fold_threshold=True, strict=False)
    assert why in str(caught[0].message), str(caught[0].message)
    expected = to_lif_silently(before)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    for got, want in zip(thresholds(kept), thresholds(expected), strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


def to_lif_silently(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_lif(net, strict=False)
