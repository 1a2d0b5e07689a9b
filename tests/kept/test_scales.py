"""Spikes and counts times a constant, and linear layers of spikes in another memory order."""

from functools import partial

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn import functional as F

import sj_taid
from sj_taid._internal.graph import record_saved
from tests.nets.alike import accelerated

SCALES = {
    "times": lambda x: x * 0.125,
    "times a third": lambda x: x * 0.3,
    "in place": lambda x: x.mul_(0.3),
    "over": lambda x: x / 3,
    "infinite": lambda x: x * float("inf"),
    "of a part": lambda x: x[1:] * 0.3,
    "of a transposed": lambda x: x.transpose(1, 2) * 0.3,
    "then a whole number": lambda x: x * 0.5 + 1,
    "rounded": lambda x: torch.div(x, 3, rounding_mode="floor"),
}
#: whose products are not saved as whole numbers
UNKNOWN = ("of a part", "of a transposed", "then a whole number", "rounded")


def spikes_of(dtype, node=neuron.LIFNode, most=1, width=8, **options):
    """The same spikes with a graph, plain and accelerated."""
    net = accelerated(nn.Sequential(node(step_mode="m", **options)))
    spikes = net(torch.rand(8, 3, 4, width).mul(3).to(dtype).requires_grad_())
    assert 0 < spikes.mean() < spikes.max() == most
    return spikes.detach().as_subclass(torch.Tensor).clone().requires_grad_() * 1, spikes


counts_of = partial(
    spikes_of, node=sj_taid.ALIFNode, most=4, levels=4, v_threshold=0.4, v_reset=None
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [spikes_of, counts_of], ids=["spikes", "counts"])
@pytest.mark.parametrize("name", SCALES)
def test_multiples_are_saved_as_whole_numbers(name, make, dtype):
    found = []
    for x in make(dtype):
        scaled = SCALES[name](x)
        leaf = torch.linspace(-1, 1, scaled.shape[-1] * 5).view(5, -1).to(dtype).requires_grad_()
        y, saved = record_saved(lambda scaled=scaled, leaf=leaf: F.linear(scaled, leaf), [leaf])
        grad = torch.autograd.grad(y.sum(), leaf)[0]
        found.append((y + 0, grad, scaled.stride(), scaled.nbytes / saved))
    (y, grad, strides, _), (fast, fast_grad, fast_strides, gain) = found
    assert strides == fast_strides
    torch.testing.assert_close(fast, y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fast_grad, grad, rtol=0, atol=0, equal_nan=True)
    most = dtype.itemsize * (8 if make is spikes_of else 2)
    assert gain == (1 if name in UNKNOWN else most)


#: what gives spikes of spikes
GIVE = {
    "the complement": lambda s: 1 - s,
    "a product": lambda s: s * s,
    "a row": lambda s: torch.cat([s, s], 1),
    "a pool": lambda s: F.max_pool2d(s, (1, 2)),
}


@pytest.mark.parametrize("give", GIVE.values(), ids=GIVE)
def test_what_gives_spikes_of_spikes_is_saved_as_bits(give):
    given = give(spikes_of(torch.float32)[1])
    leaf = torch.ones(5, given.shape[-1], requires_grad=True)
    y, saved = record_saved(lambda: F.linear(given, leaf), [leaf])
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert saved == given.nbytes / 32 and torch.equal(grad[0], given.detach().sum((0, 1, 2)))


@pytest.mark.parametrize(("width", "share"), [(8, 8), (14, 8), (15, 1), (64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_spikes_in_narrow_heads_are_saved_in_four_bits(dtype, width, share):
    """SpikeSCR's QKFormer has heads 8 wide; a sum of up to 14 products fits four bits."""
    found = []
    for spikes in spikes_of(dtype, width=width):
        scores = spikes @ spikes.transpose(-1, -2)
        leaf = torch.linspace(-1, 1, 5 * scores.shape[-1]).view(5, -1).to(dtype).requires_grad_()
        y, saved = record_saved(lambda scores=scores, leaf=leaf: F.linear(scores, leaf), [leaf])
        grads = torch.autograd.grad(y.sum(), [leaf, spikes])
        found.append([y + 0, *grads, scores.nbytes / saved])
    *plain, _ = found[0]
    *fast, gain = found[1]
    assert all(map(torch.equal, fast, plain))
    assert gain == (share * dtype.itemsize / 4 if share > 1 else 1)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", [(0, 1), (2, 3)])
def test_a_linear_layer_of_transposed_spikes_saves_bits(axes, dtype, bias, autocast):
    found = []
    for x in spikes_of(dtype):
        x = x.transpose(*axes)
        linear = nn.Linear(x.shape[-1], 5, bias=bias, dtype=dtype)
        values = torch.linspace(0.3, 1.3, linear.weight.numel()).view(5, -1)
        linear.weight = nn.Parameter(values.to(dtype))
        if bias:
            nn.init.constant_(linear.bias, 0.723)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, saved = record_saved(lambda x=x, linear=linear: linear(x), [*linear.parameters()])
        grads = torch.autograd.grad(y.float().square().sum(), [x, *linear.parameters()])
        found.append([y + 0, *grads])
    assert all(map(torch.equal, *found))
    assert autocast or saved <= x.nbytes / dtype.itemsize / 8


@pytest.mark.parametrize("levels", [4, 6])
def test_divided_counts_in_another_memory_order_are_saved_in_four_bits(levels):
    """As tokens behind a linear layer and a transposed norm, with time in the batch."""
    node = sj_taid.ALIFNode(levels=levels, init_tau=None, normalize=True, step_mode="m")
    net = nn.ModuleList([nn.Linear(16, 32), nn.BatchNorm1d(32), node, nn.Conv1d(32, 8, 1)])

    def run(tokens):
        y = node(net[1](net[0](tokens).transpose(-1, -2)))
        return net[3](y), y + 0

    tokens = torch.randn(4, 64, 16, requires_grad=True)
    there = [tokens, *net.parameters()]
    (expected, counts), plain = record_saved(lambda: run(tokens), there)
    accelerated(net)
    (got, ours), saved = record_saved(lambda: run(tokens), there)
    assert torch.equal(ours, counts) and torch.equal(got, expected) and saved < 0.6 * plain
    weight = net[3].weight
    grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_spikes_under_autocast_are_saved_as_bits():
    _, spikes = spikes_of(torch.float32)
    weight = torch.ones(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, saved = record_saved(lambda: F.linear(spikes, weight), [weight])
    assert saved <= spikes.nbytes / 32 + weight.nbytes / 2


def test_a_dilated_pool_may_see_padding_alone():
    found = []
    for x in spikes_of(torch.float32):
        weight = torch.ones(1, requires_grad=True)
        y = F.max_pool2d(x, 2, 1, 1, dilation=(5, 9)) * weight
        # Not through the pool, where torch's gradient of padding is written outside of memory.
        found += torch.autograd.grad(y.sum(), weight)
    assert found[0].isinf().all() and torch.equal(*found)
