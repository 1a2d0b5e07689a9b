"""Spikes and sums are saved by their packings for as long as these are what lies in memory."""

import copy
import ctypes

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

import sj_taid
from tests.nets.alike import assert_same, robust


class Net(nn.Module):
    """Two neurons behind a layer and a norm, something done to their spikes or sums, a layer."""

    def __init__(self, write, place):
        super().__init__()
        options = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.4, "step_mode": "m"}
        self.conv, self.norm = layer.Conv2d(3, 4, 3, step_mode="m"), layer.BatchNorm2d(4)
        self.norm.step_mode = "m"
        self.lif, self.plif = neuron.LIFNode(**options), neuron.ParametricLIFNode(**options)
        self.head = layer.Conv2d(4, 2, 3, step_mode="m")
        self.write, self.place = write, PLACES[place]

    def forward(self, x):
        values = self.place(self, self.norm(h := self.conv(x)), h)
        self.write(values)
        return self.head(values)


#: what is written to
PLACES = {
    "spikes": lambda net, y, h: net.lif(y),
    "counts": lambda net, y, h: net.lif(y) + net.plif(y),
    "a sum": lambda net, y, h: y + h,
    "a sum in place": lambda net, y, h: net.lif(y).add_(h),
    "a norm's output": lambda net, y, h: y,
}


class Writes(torch.autograd.Function):
    """Writes to its argument and does not say so."""

    @staticmethod
    def forward(ctx, s):
        s.data.fill_(0.3)
        return s.view_as(s)

    @staticmethod
    def backward(ctx, grad):
        return grad


#: ways to memory, of which autograd does not know that they write
WAYS = {
    "numpy": lambda s: s.numpy().fill(0.3),
    "numpy of a cast to itself": lambda s: s.float().numpy().fill(0.3),
    "numpy in a loop": lambda s: [step.numpy().fill(0.3) for step in s],
    "parts that are no views": lambda s: s.unsafe_chunk(2)[0].fill_(0.3),
    "whole numbers": lambda s: s.view(torch.int32).numpy().fill(0x3E99999A),
    "data": lambda s: s.data.mul_(0.3),
    "the storage": lambda s: s.untyped_storage().fill_(62),
    "its address": lambda s: ctypes.memset(s.data_ptr(), 62, 100),
    "real numbers": lambda s: s.real.numpy().fill(0.3),
    "from_dlpack": lambda s: torch.from_dlpack(s).fill_(0.3),
    "set_ to the storage": lambda s: torch.empty(0).set_(s.untyped_storage(), 2, (5,)).fill_(0.3),
    "a shallow copy": lambda s: copy.copy(s).fill_(0.3),
    "element by element": lambda s: s.apply_(lambda value: 0.3),
    "a view with other signs": lambda s: torch._neg_view(s).data.fill_(-0.3),
    "a function that hides it": Writes.apply,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_unseen_is_what_backward_reads(way, place):
    write = WAYS[way]
    plain, x = robust(
        lambda: (Net(lambda values: write(values.detach()), place), torch.randn(4, 2, 3, 8, 8))
    )

    def run(net):
        out = net(x)
        out.square().mean().backward()
        return out.detach(), net.head.weight.grad

    assert_same(plain, run)


#: what reads memory, and leaves it as it is
READS = {
    "a layer": lambda net, s: net.head(s),
    "a neuron": lambda net, s: net.lif(s),
    "a norm": lambda net, s: net.norm(s),
    "attention": lambda net, s: (s @ s.mT) @ s,
    "a sum": lambda net, s: s + s.detach(),
    "print": lambda net, s: f"{s} {s.shape} {s[0, 0, 0, 0, 0].item():.1f}",
    "a mask": lambda net, s: (s > 0).float() + s[s > 0].sum(),
    "a copy": lambda net, s: (s.clone(), copy.deepcopy(s.detach()), torch.tensor(s.tolist())),
    "views": lambda net, s: (s[1:], s.mT.unsqueeze(0), s.chunk(2), torch.stack([*s])),
    "backward": lambda net, s: net.head(s).sum().backward(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_leaves_the_packing(read, place):
    net = Net(lambda values: None, place)
    sj_taid.accelerate(net)
    values = net.place(net, net.norm(h := net.conv(torch.randn(4, 2, 3, 8, 8))), h)
    for node in (net.lif, net.plif):
        node.reset()
    assert values.recipe() is not None
    read(net, values)
    assert values.recipe() is not None
    with torch.no_grad():
        values.mul_(1)
    assert values.recipe() is None


#: what reads values [4, 2, 4, 6, 6] next to an operand of a shape, and saves that
OPERANDS = {
    "a convolution": (lambda s, w: nn.functional.conv2d(s.flatten(0, 1), w), (2, 4, 3, 3)),
    "a product": (torch.mul, (4, 1, 1)),
    "attention": (lambda s, w: (s @ w) @ s.mT, (6, 6)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("read", "shape"), OPERANDS.values(), ids=OPERANDS)
def test_an_operand_that_changes_before_backward_is_refused(read, shape, place):
    found, w = [], torch.randn(shape, requires_grad=True)
    operand = w * 1.0  # of the graph, or a parameter: torch refuses both
    net = Net(lambda values: found.extend([read(values, w), read(values, operand)]), place)
    sj_taid.accelerate(net)
    net(torch.randn(4, 2, 3, 8, 8))
    for y in found:
        y.sum().backward(retain_graph=True)
    with torch.no_grad():
        w.mul_(2)
        operand.mul_(2)
    for y in found:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
