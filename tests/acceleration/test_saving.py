"""What is saved for backward is freed in time, and what a norm or a neuron reads is never stale."""

import copy
import gc
import weakref
from operator import attrgetter

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sj_taid
from sj_taid._internal import graph
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.acceleration import kept
from tests.acceleration.alike import robust

OPTIONS = {"step_mode": "m", "surrogate_function": surrogate.ATan()}


def make(*modules):
    """A net and its accelerated copy."""
    plain = nn.ModuleList(modules)
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(fast)
    return plain, fast


#: operations that save what they give
GIVEN = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "exp": torch.exp,
    "softmax": lambda s: s.softmax(-1),
    "normalize": lambda s: F.normalize(s, dim=-1),
    "std": lambda s: s.std((1, 2)),
    "a sum": lambda s: (s + s).sqrt(),
    "attention": lambda s: F.scaled_dot_product_attention(s, s, s),
    "a convolution": lambda s: F.conv2d(s, torch.ones(3, 3, 1, 1)).sigmoid(),
}


@pytest.mark.parametrize("read", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("norm", [False, True])
def test_a_graph_without_backward_is_freed(read, norm):
    _, (bn, node) = make(layer.BatchNorm2d(3, step_mode="m"), neuron.LIFNode(**OPTIONS))
    x = torch.rand(4, 2, 3, 5, 6, requires_grad=True) * 3
    memory = weakref.ref(x.untyped_storage())
    y = read(node(bn(x) if norm else x).flatten(0, 1))
    del x, y
    node.reset()
    gc.collect()
    assert memory() is None


def interrupted(push):
    def push_and_interrupt(*hooks):
        push(*hooks)
        raise KeyboardInterrupt

    return push_and_interrupt


@pytest.mark.parametrize(
    "read",
    [
        lambda node, s: F.conv2d(s.flatten(0, 1), torch.ones(2, 3, 1, 1)),
        lambda node, s: node(s),
        lambda node, s: F.max_pool2d(s.flatten(0, 1), 2),
    ],
)
def test_an_interrupt_leaves_no_hooks_open(read, monkeypatch):
    _, (first, second) = make(neuron.LIFNode(**OPTIONS), neuron.LIFNode(**OPTIONS))
    spikes = first(torch.rand(4, 2, 3, 5, 6, requires_grad=True) * 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept.graph, "push_hooks", interrupted(graph.push_hooks))
        read(second, spikes)
    assert graph.saving_hooks() is None


def without_counter(norm):
    norm.num_batches_tracked = None


def averaged(norm):
    """As ``load_state_dict(assign=True)`` of averaged weights leaves it."""
    norm.num_batches_tracked = torch.tensor(2.5)


#: what is done to a norm in training, before its calls and between a call and its reader
CHANGES = {
    "nothing": (lambda norm: None, lambda norm: None),
    "no counter": (without_counter, lambda norm: None),
    "a float counter": (averaged, lambda norm: None),
    "a counter of 32 bits": (
        lambda norm: setattr(norm, "num_batches_tracked", torch.tensor(7, dtype=torch.int32)),
        lambda norm: None,
    ),
    "a counter that comes later": (
        without_counter,
        lambda norm: setattr(norm, "num_batches_tracked", torch.tensor(3)),
    ),
    "loaded": (
        lambda norm: None,
        lambda norm: norm.load_state_dict(
            {name: torch.full_like(t, 9) for name, t in norm.state_dict().items()}
        ),
    ),
    "written": (lambda norm: None, lambda norm: norm.running_var.mul_(0.5)),
    "another eps": (
        lambda norm: setattr(norm, "eps", torch.tensor(1e-5)),
        lambda norm: norm.eps.fill_(10.0) if isinstance(norm.eps, torch.Tensor) else None,
    ),
}


@pytest.mark.parametrize("momentum", [0.1, None, "tensor"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_read_by_neuron", [True, False])
def test_running_statistics_are_torchs_whatever_is_written(change, momentum, is_read_by_neuron):
    before, between = CHANGES[change]
    found = []
    for norm, node in make(layer.BatchNorm2d(3, step_mode="m"), neuron.LIFNode(**OPTIONS)):
        norm.momentum = torch.tensor(0.1) if momentum == "tensor" else momentum
        before(norm)
        torch.manual_seed(0)
        for step in range(3):
            y = norm(torch.randn(4, 2, 3, 5, 6, requires_grad=True) * (1 + step))
            between(norm)
            (node(y) if is_read_by_neuron else y.square()).sum()  # torch refuses some backwards
            node.reset()
            if momentum == "tensor":
                norm.momentum.mul_(2)
        found.append([t.clone() for t in norm.buffers()])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_norms_that_share_statistics_move_them_as_they_are_called():
    found = []
    for first, second, node in make(
        *(layer.BatchNorm2d(3, step_mode="m") for _ in range(2)), neuron.LIFNode(**OPTIONS)
    ):
        second.running_mean, second.running_var = first.running_mean, first.running_var
        torch.manual_seed(0)
        one, other = (n(torch.randn(4, 2, 3, 5, 6, requires_grad=True)) for n in (first, second))
        node(other).sum().backward()
        node.reset()
        node(one).sum().backward()
        found.append([t.clone() for t in first.buffers()])
    assert all(map(torch.equal, *found))


def test_evaluation_and_training_in_one_graph():
    def run(net, x):
        norm, node = net
        losses = []
        for training in (False, False, True, False):
            norm.train(training)
            losses.append((node(norm(x)) * torch.linspace(-1, 1, 6)).sum())
            node.reset()
        return sum(losses)

    def draw():
        # Not moved, since torch's own backward in evaluation reads them as they are then.
        norm = layer.BatchNorm2d(3, momentum=0.0, step_mode="m")
        net = nn.ModuleList([norm, neuron.LIFNode(**OPTIONS)])
        return net, torch.randn(4, 2, 3, 5, 6)

    plain, x = robust(draw, passes=run)
    fast, grads = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for net in (plain, fast):
        leaf = x.clone().requires_grad_()
        run(net, leaf).backward()
        grads.append([leaf.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


#: attributes as people set them: numbers of other kinds, and None for a flag
NUMBERS = {
    "v_threshold": [np.array(0.7), np.float32(0.7), torch.tensor([0.7]), torch.tensor(0.7)],
    "v_reset": [np.array(-0.25), torch.tensor(-0.25)],
    "tau": [np.array(1.5), torch.tensor(1.5)],
    "detach_reset": [None, np.bool_(True)],
    "decay_input": [None, 0],
    "surrogate_function.alpha": [np.array(3.0), torch.tensor(3.0)],
}


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_numbers_of_any_kind_are_read_as_they_are_now(name, value):
    if name == "v_threshold" and isinstance(value, np.ndarray) and not FUNCTIONAL_STATES:
        pytest.skip("0.0.0.0.14's neuron takes no array")
    plain, (node,) = make(neuron.LIFNode(**OPTIONS))
    x = torch.randn(4, 2, 3, 5, 6) * 2
    *path, last = name.split(".")
    for number in (attrgetter(name)(node), value):
        found = []
        for one in (plain[0], node):
            setattr(attrgetter(path[0])(one) if path else one, last, number)
            leaf = x.clone().requires_grad_()
            spikes = one(leaf)
            spikes.sum().backward()
            one.reset()
            found.append((spikes + 0, leaf.grad))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])
