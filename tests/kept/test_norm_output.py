"""A norm's output, whatever is done to it before a neuron reads it."""

import copy
import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

import sj_taid
from tests.nets.alike import accelerated, assert_same, robust, weighed

LAST = {"memory_format": torch.channels_last}


def transposed(x, *axes):
    return x.transpose(*axes).contiguous().transpose(*axes)


#: inputs of a norm in every memory order, of images [8, 6, 5, 7]
LAYOUTS = {
    "columns": lambda x: transposed(x[..., 0, 0], 0, 1),
    "transposed tokens": lambda x: transposed(x.flatten(2), 1, 2),
    "windows": lambda x: x.flatten(2).unfold(2, 4, 2)[:, :, 0:3],
    "images": lambda x: x,
    "channels last": lambda x: x.contiguous(**LAST),
    "batch innermost": lambda x: transposed(x, 0, 3),
    "repeated, channels last": lambda x: x[:1].contiguous(**LAST).expand(x.shape),
    "some channels last": lambda x: torch.cat([x, x], 1).contiguous(**LAST)[:, :6],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_torchs_bit_for_bit(layout, dtype):
    for training, affine, tracked in itertools.product((True, False), repeat=3):
        x = LAYOUTS[layout](torch.randn(8, 6, 5, 7).mul(3).add(1).to(dtype))
        kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
        norm = kind(6, affine=affine, track_running_stats=tracked).train(training)
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2.0)
        fast, found, penalties = copy.deepcopy(norm), [], []
        accelerated(nn.ModuleList([fast, neuron.LIFNode(step_mode="m")]))
        factors = torch.randn(x.shape).to(dtype).requires_grad_()
        for module in (norm, fast):
            leaf = x.detach().requires_grad_()
            inputs, y = [leaf, *module.parameters()], module(leaf.view_as(leaf))
            gradients = torch.autograd.grad(loss := y * factors, inputs, factors, retain_graph=True)
            found.append([y * 1, *gradients, *module.buffers()])
            strides = [t.stride() for t in (y, *found[-1])]
            found[-1].append(torch.tensor([n for axes in strides for n in axes]))
            graph = torch.autograd.grad(loss.sum(), leaf, create_graph=True)[0].square().sum()
            penalties.append(torch.autograd.grad(graph, factors)[0])
        assert all(map(torch.equal, *found)), (training, affine, tracked)
        torch.testing.assert_close(*penalties, rtol=1e-2, atol=1e-2)


def draw(between=lambda y: y, setup=lambda norm: None, images=8):
    """A convolution, a norm and a neuron that reads what lies ``between``, and their input."""

    def make():
        conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        setup(norm)
        node = neuron.LIFNode(step_mode="m")
        return nn.ModuleList([conv, norm, node]), torch.randn(images, 3, 5, 6) * 2

    return robust(make, passes=lambda net, x: net[2](between(net[1](net[0](x)))))


def train(net, x, between=lambda y: y):
    """What a step gives: spikes, voltage and gradients."""
    conv, norm, node = net
    spikes = node(between(norm(conv(x))))
    weighed(spikes).backward()
    return [
        spikes + 0,
        node.v.detach(),
        *(p.grad for p in nn.ModuleList([conv, norm]).parameters()),
    ]


def changed_in_place(y):
    view = y.view(4, 2, *y.shape[1:])
    view.unsqueeze_(2)
    return view


def seen_by_others(y):
    before = y.view(-1)
    y.unsqueeze_(0)
    return y + before.view(y.shape)


#: what may lie between a norm of [8, 4, 3, 4] and a neuron
BETWEEN = {
    "transpose_ time": lambda y: y.transpose_(0, 1),
    "of a view": changed_in_place,
    "then a view": lambda y: y.unsqueeze_(0).flatten(0, 1),
    "in place, then a copy": lambda y: y.mul_(2).clone(),
    "a view in place, then copies": lambda y: (y.view(-1).mul_(0.7), y.mT.contiguous())[1],
    "views before": seen_by_others,
    "permute": lambda y: y.view(4, 2, 4, 3, 4).permute(dims=[0, 1, 2, 4, 3]),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_lies_between_a_norm_and_a_neuron(between):
    plain, x = draw(between)

    def run(net):
        facts = []

        def noted(y):
            z = between(y)
            facts.extend((t.shape, t.stride(), t._version, t._is_view()) for t in (y, z))
            return z

        return train(net, x, noted), facts

    assert_same(plain, run)


#: views of the norm's output of so many images [M, 4, 3, 4] in which a step has some channels alone
PARTS_OF_CHANNELS = {
    "channels for time": (1, lambda y: y.view(1, 2, 2, 3, 4).transpose(0, 1)),
    "squeezed": (1, lambda y: y.squeeze(0)),
    "half a batch": (3, lambda y: y.view(2, 6, 3, 4)),
    "halves of channels": (8, lambda y: y.view(16, 2, 3, 4)),
}


@pytest.mark.parametrize("name", PARTS_OF_CHANNELS)
def test_steps_that_have_some_channels_alone_are_computed_apart(name):
    images, view = PARTS_OF_CHANNELS[name]
    plain, x = draw(view, images=images)
    fast = assert_same(plain, lambda net: train(net, x, view))
    fast[2].reset()
    fast[2](y := view(fast[1](fast[0](x))))
    assert not any(y._source.readers.values())


#: what takes or changes the gradient of a view of a norm's output
TAKERS = {
    "hook": lambda view: view.register_hook(lambda g: 3 * g),
    "retain": lambda view: view.retain_grad(),
    "gradient": lambda view: torch.autograd.grad(view.sum(), view),
    "node's hook": lambda view: view.grad_fn.register_hook(
        lambda into, out: (3 * into[0], *into[1:])
    ),
}
VIEWS = {
    "itself": lambda y: y,
    "transposed": lambda y: y.view(4, 2, *y.shape[1:]).transpose(-1, -2),
    "a clone's": lambda y: y.contiguous(memory_format=torch.channels_last).unsqueeze(1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_hooks_on_a_view_are_called_or_refused(take, view):
    def taken(y):
        take(z := view(y))
        return z

    plain, x = draw(view)
    fast = assert_same(plain, lambda net: train(net, x, taken))
    conv, norm, node = fast
    node.reset()
    node(y := view(norm(conv(x))))
    assert y._source.readers == {"2": True}
    with pytest.raises(RuntimeError, match="no gradient will reach it"):
        take(y)
    node.reset()
    nodes = [(y := view(norm(conv(x)))).grad_fn]  # who has the node may register a hook later
    spikes, seen = node(y), []
    nodes[0].register_prehook(seen.append)
    spikes.sum().backward()
    assert len(seen) == 1


def replace(tensor):
    tensor.data = 3 * tensor.detach() + 1


#: what may change of a norm and its input before the neuron runs; ``thaw`` finds a frozen weight
CHANGES = {
    "freeze": lambda norm, h: norm.requires_grad_(False),
    "freeze the bias": lambda norm, h: norm.bias.requires_grad_(False),
    "thaw": lambda norm, h: norm.weight.requires_grad_(),
    "replace the input": lambda norm, h: replace(h),
    "replace the weight": lambda norm, h: replace(norm.weight),
    "replace the bias": lambda norm, h: replace(norm.bias),
}


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_are_those_of_the_norms_call(name):
    plain, x = draw(setup=lambda norm: norm.weight.requires_grad_(name != "thaw"))

    def run(net):
        conv, norm, node = net
        y = norm(h := conv(x))
        CHANGES[name](norm, h)
        spikes = node(y)
        weighed(spikes).backward()
        return [spikes.detach() + 0, *(p.grad for p in net.parameters())]

    assert_same(plain, run)


#: the orders of the axes of a norm's input [T, N, C, H, W] in memory
ORDERS = {
    "contiguous": (0, 1, 2, 3, 4),
    "channels last": (0, 1, 3, 4, 2),
    "columns first": (0, 1, 2, 4, 3),
    "batch outermost": (1, 0, 2, 3, 4),
}


@pytest.mark.parametrize("axes", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind", [neuron.LIFNode, partial(sj_taid.ALIFNode, channels=3)])
def test_neurons_fuse_in_every_memory_order(kind, axes):
    def make():
        node = kind(step_mode="m", surrogate_function=surrogate.ATan())
        x = torch.randn(4, 2, 3, 5, 6).permute(axes).contiguous()
        x = x.permute(*map(axes.index, range(5)))
        return nn.Sequential(layer.BatchNorm2d(3, step_mode="m"), node), x

    def run(net):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        spikes = net(leaf)
        weighed(spikes).backward()
        return spikes.detach() + 0, spikes.stride(), leaf.grad

    plain, x = robust(make)
    fast = assert_same(plain, run)
    sj_taid.unaccelerate(fast)
    report = sj_taid.accelerate(fast, x.requires_grad_())
    assert report.rows[0].done == "fused into 1", str(report)


@pytest.mark.parametrize("order", ["contiguous", "channels last", "channels last but for ones"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 2), (6, 3, 5, 1), (1, 3, 1, 4)])
def test_gradient_in_another_memory_order(shape, order):
    """Torch's batch norm reads some wrongly where an axis of size 1 may have any stride."""
    norm = nn.BatchNorm2d(shape[1])
    fast, _ = accelerated(nn.ModuleList([copy.deepcopy(norm), neuron.LIFNode(step_mode="m")]))
    axes = range(len(shape)) if order == "contiguous" else [0, *range(2, len(shape)), 1]
    if "ones" in order:
        axes = sorted(axes, key=lambda axis: shape[axis] == 1)
    x = torch.randn(shape).permute(*axes).contiguous()
    x = x.permute(*map([*axes].index, range(len(shape)))).requires_grad_()
    weights = torch.arange(x.numel()).float().cos().view(shape)
    plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    (exact,) = torch.autograd.grad((norm(plain) * weights).sum(), plain)
    for axes in itertools.permutations(range(x.dim())):
        y = fast(x).permute(axes).contiguous()
        (found,) = torch.autograd.grad((y * weights.permute(axes).contiguous()).sum(), x)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def accelerated_pair():
    """A norm of four channels and a neuron."""
    return accelerated(nn.ModuleList([nn.BatchNorm2d(4), neuron.LIFNode(step_mode="m")]))


def test_a_view_like_another_tensor_keeps_it_not_alive():
    norm, node = accelerated_pair()
    other = torch.empty(4, 2, 4, 3, 4)
    node(norm(torch.randn(8, 4, 3, 4, requires_grad=True)).view_as(other))
    memory = weakref.ref(other)
    del other
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(4, 2, *y.shape[1:]).clone()])
def test_an_output_that_is_detached_in_place_gives_no_gradient(view):
    norm, node = accelerated_pair()
    y = view(norm(torch.randn(8, 4, 3, 4, requires_grad=True)))
    y.detach_()
    assert not node(y).requires_grad


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("reader", [1, 2])
def test_a_legacy_hook_of_norm_or_neuron_sees_its_gradients(reader):
    plain, x = draw()

    def run(net):
        seen = []
        net[reader].register_backward_hook(lambda _, __, grads: seen.append(grads[0].clone()))
        train(net, x)
        return seen

    assert_same(plain, run)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_norm_of_another_dtype_warns_of_nothing(dtype):
    norm, _ = accelerated_pair()
    x = torch.randn(8, 4, 3, 4, requires_grad=True).to(dtype)
    expected = copy.deepcopy(norm).to(dtype)(x.detach())
    assert torch.equal(norm.to(dtype)(x).detach(), expected)


def test_a_neuron_may_be_called_like_a_function():
    net = nn.Sequential()
    net.add_module("norm", layer.BatchNorm2d(3, step_mode="m"))
    net.add_module("relu", neuron.LIFNode(step_mode="m"))
    sj_taid.accelerate(net)
    y = net.norm(torch.rand(4, 2, 3, 5, 6, requires_grad=True))
    net.relu(y)
    nn.functional.relu(y)
    with pytest.raises(RuntimeError, match="no gradient will reach it"):
        y.register_hook(lambda grad: grad)
