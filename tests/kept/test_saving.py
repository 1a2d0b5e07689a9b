"""What is saved for backward is freed in time, and what a norm or a neuron reads is never stale."""

import copy
import gc
import weakref
from contextlib import nullcontext
from operator import attrgetter

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F

from sj_taid._internal import graph
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.kept import saving
from tests.nets.alike import accelerated, assert_same, robust, weighed

OPTIONS = {"step_mode": "m", "surrogate_function": surrogate.ATan()}


def make(*modules):
    """An accelerated net of modules."""
    return accelerated(nn.ModuleList(modules))


#: operations that save what they give
GIVEN = {
    "sigmoid": torch.sigmoid,
    "a sum": lambda s: (s + s).sqrt(),
    "a convolution": lambda s: F.conv2d(s, torch.ones(3, 3, 1, 1)).sigmoid(),
}


@pytest.mark.parametrize("read", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("norm", [False, True])
def test_a_graph_without_backward_is_freed(read, norm):
    bn, node = make(layer.BatchNorm2d(3, step_mode="m"), neuron.LIFNode(**OPTIONS))
    x = torch.rand(4, 2, 3, 5, 6, requires_grad=True) * 3
    memory = weakref.ref(x.untyped_storage())
    y = read(node(bn(x) if norm else x).flatten(0, 1))
    del x, y
    node.reset()
    gc.collect()
    assert memory() is None


def interrupted(function):
    def call_and_interrupt(*args):
        function(*args)
        raise KeyboardInterrupt

    return call_and_interrupt


@pytest.mark.parametrize(
    "read",
    [
        lambda node, s: F.conv2d(s.flatten(0, 1), torch.ones(2, 3, 1, 1)),
        lambda node, s: node(s),
    ],
)
@pytest.mark.parametrize("after", ["partial", "push_hooks"])
def test_an_interrupt_leaves_the_hooks_that_were_open(read, after, monkeypatch):
    first, second = make(neuron.LIFNode(**OPTIONS), neuron.LIFNode(**OPTIONS))
    spikes = first(torch.rand(4, 2, 3, 5, 6, requires_grad=True) * 3)
    home = saving if after == "partial" else graph
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        before = graph.saving_hooks()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(home, after, interrupted(getattr(home, after)))
            read(second, spikes)
        assert graph.saving_hooks() == before
    assert graph.saving_hooks() is None


#: hooks of others: what they save has the version of the tensor, or is a copy of version 0
OTHERS = {
    "none": nullcontext,
    "identity": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy),
}


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize(
    ("outer", "inner"),
    [("none", "identity"), ("save_on_cpu", "none"), ("identity", "copies"), ("copies", "identity")],
)
def test_others_hooks_open_after_a_sum_whose_term_has_changed_in_place(outer, inner, changes):
    conv, head = (layer.Conv2d(3, 3, 3, padding=1, step_mode="m") for _ in range(2))
    norm = layer.BatchNorm2d(3, step_mode="m")
    plain = nn.ModuleList([conv, norm, neuron.LIFNode(**OPTIONS), head])
    x = torch.randn(4, 2, 3, 5, 6)

    def run(net):
        conv, norm, node, head = net
        shortcut = conv(x).mul_(1.5)
        sums = norm(conv(x)) + shortcut, node(conv(x)) + shortcut
        if changes:  # as torch allows, since no addition has saved it
            shortcut.add_(1)
        with OTHERS[outer](), OTHERS[inner]():
            loss = sum(head(s).square().mean() for s in sums)
        loss.backward()
        return [p.grad for p in net.parameters()]

    assert_same(plain, run)


def test_evaluation_and_training_in_one_graph():
    def run(net, x):
        norm, node = net
        losses = []
        for training in (False, False, True, False):
            norm.train(training)
            losses.append(weighed(node(norm(x))))
            node.reset()
        return sum(losses)

    def draw():
        # Not moved, since torch's own backward in evaluation reads them as they are then.
        norm = layer.BatchNorm2d(3, momentum=0.0, step_mode="m")
        net = nn.ModuleList([norm, neuron.LIFNode(**OPTIONS)])
        return net, torch.randn(4, 2, 3, 5, 6)

    plain, x = robust(draw, passes=run)

    def gradients(net):
        leaf = x.clone().requires_grad_()
        run(net, leaf).backward()
        return [leaf.grad, *(p.grad for p in net.parameters())]

    assert_same(plain, gradients)


#: attributes as people set them: numbers of other kinds, and None for a flag
NUMBERS = [
    ("v_threshold", np.array(0.7)),
    ("v_threshold", torch.tensor([0.7])),
    ("v_reset", torch.tensor(-0.25)),
    ("tau", np.array(1.5)),
    ("detach_reset", None),
    ("decay_input", 0),
    ("surrogate_function.alpha", torch.tensor(3.0)),
]


@pytest.mark.filterwarnings("ignore:.* is not fused:RuntimeWarning")
@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_of_any_kind_are_read_as_they_are_now(name, value):
    if name == "v_threshold" and isinstance(value, np.ndarray) and not FUNCTIONAL_STATES:
        pytest.skip("0.0.0.0.14's neuron takes no array")
    x = torch.randn(4, 2, 3, 5, 6) * 2
    *path, last = name.split(".")

    def run(net):
        owner, found, own = attrgetter(".".join(["0", *path]))(net), [], copy.deepcopy(value)
        for number in (getattr(owner, last), own, own):
            setattr(owner, last, number)
            leaf = x.clone().requires_grad_()
            spikes = net(leaf)
            spikes.sum().backward()
            net[0].reset()
            found += [spikes.detach() + 0, leaf.grad]
            if isinstance(number, torch.Tensor):
                number.mul_(1.5)
        return found

    plain = copy.deepcopy(nn.Sequential(neuron.LIFNode(**OPTIONS)))
    for _ in range(2):  # the second net has the number before it is accelerated
        assert_same(plain, run, rtol=1e-5, atol=1e-6)
