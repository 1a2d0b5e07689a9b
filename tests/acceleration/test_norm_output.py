"""A norm's output, whatever is done to it before it is read."""

import copy
import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sj_taid
from sj_taid.acceleration.kept import Kept
from tests.acceleration.alike import robust

LAST = {"memory_format": torch.channels_last}


def transposed(x, *axes):
    return x.transpose(*axes).contiguous().transpose(*axes)


#: inputs of a norm in every memory order, of images [8, 6, 5, 7]
LAYOUTS = {
    "rows": lambda x: x[..., 0, 0],
    "columns": lambda x: transposed(x[..., 0, 0], 0, 1),
    "tokens": lambda x: x.flatten(2).contiguous(),
    "transposed tokens": lambda x: transposed(x.flatten(2), 1, 2),
    "some transposed tokens": lambda x: transposed(torch.cat([x, x], 1).flatten(2), 1, 2)[:, 3:9],
    "windows": lambda x: x.flatten(2).unfold(2, 4, 2)[:, :, 0:3],
    "images": lambda x: x,
    "channels last": lambda x: x.contiguous(**LAST),
    "batch innermost": lambda x: transposed(x, 0, 3),
    "repeated": lambda x: x[:1].expand(x.shape),
    "repeated, channels last": lambda x: x[:1].contiguous(**LAST).expand(x.shape),
    "some channels": lambda x: torch.cat([x, x], 1)[:, :6],
    "some channels last": lambda x: torch.cat([x, x], 1).contiguous(**LAST)[:, :6],
    "every third pixel, channels last": lambda x: x.contiguous(**LAST)[::2, :, :, ::3],
    "pixels": lambda x: x[..., :1, :1].contiguous(**LAST),
    "videos, channels last": lambda x: (
        x.unsqueeze(2).repeat(1, 1, 3, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    ),
}
SETTINGS = [*itertools.product((True, False), repeat=3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_torchs_bit_for_bit(layout, dtype):
    for training, affine, tracked in SETTINGS:
        x = LAYOUTS[layout](torch.randn(8, 6, 5, 7).mul(3).add(1).to(dtype))
        kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(x.dim(), nn.BatchNorm1d)
        norm = kind(6, affine=affine, track_running_stats=tracked).train(training)
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2.0)
        fast, found, penalties = copy.deepcopy(norm), [], []
        sj_taid.accelerate(nn.ModuleList([fast, neuron.LIFNode(step_mode="m")]))
        factors = torch.randn(x.shape).to(dtype).requires_grad_()
        for module in (norm, fast):
            leaf = x.detach().requires_grad_()
            inputs, y = [leaf, *module.parameters()], module(leaf.view_as(leaf))
            gradients = torch.autograd.grad(loss := y * factors, inputs, factors, retain_graph=True)
            unread = torch.autograd.grad(module(leaf.view_as(leaf)), inputs, factors)
            found.append([y * 1, *gradients, *unread, *module.buffers()])
            strides = [t.stride() for t in (y, *found[-1])]
            found[-1].append(torch.tensor([n for axes in strides for n in axes]))
            graph = torch.autograd.grad(loss.sum(), leaf, create_graph=True)[0].square().sum()
            penalties.append(torch.autograd.grad(graph, factors)[0])
        assert all(map(torch.equal, *found)), (training, affine, tracked)
        torch.testing.assert_close(*penalties, rtol=1e-2, atol=1e-2)


READERS = {
    "neuron": lambda y, node: node(y).sum(),
    "sum": lambda y, node: node(y + y.new_ones(y.shape)).sum(),
    "pool": lambda y, node: node(nn.functional.max_pool2d(y.flatten(0, 1), 2).unsqueeze(0)).sum(),
    "others": lambda y, node: y.square().sum() + y.sin().sum(),
    "neuron first": lambda y, node: node(y).sum() + y.square().sum(),
    "neuron last": lambda y, node: y.square().sum() + node(y).sum(),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_running_statistics_are_torchs_whoever_reads(read, momentum):
    plain = nn.Sequential(layer.BatchNorm2d(3, momentum=momentum), neuron.LIFNode())
    functional.set_step_mode(plain, "m")
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(fast)
    for x in torch.randn(8, 4, 2, 32, 32, 3, requires_grad=True).movedim(-1, 3):
        for net in (plain, fast):
            functional.reset_net(net)
            read(net[0](x), net[1]).backward()
        assert all(map(torch.equal, fast.buffers(), plain.buffers()))


def behind_a_view(change):
    def changed(y):
        view = y.view(4, 2, *y.shape[1:])
        change(view)
        return view

    return changed


def seen_by_others(y):
    before = y.view(-1)
    y.unsqueeze_(0)
    return y + before.view(y.shape)


#: what changes the shape of a norm's output [8, 4, 3, 4] in place
CHANGES = {
    "unsqueeze_": lambda y: y.unsqueeze_(1),
    "squeeze_": lambda y: y.unsqueeze_(1).squeeze_(),
    "transpose_": lambda y: y.transpose_(-1, -2),
    "transpose_ time": lambda y: y.transpose_(0, 1),
    "t_": lambda y: y.flatten(1).t_(),
    "of a view": behind_a_view(lambda y: y.unsqueeze_(2)),
    "of a detached one": lambda y: (y.detach().unsqueeze_(0), y)[1],
    "then a view": lambda y: y.unsqueeze_(0).flatten(0, 1),
    "after in place": lambda y: y.mul_(2).unsqueeze_(1),
    "in place, then a copy": lambda y: y.mul_(2).clone(),
    "a view in place, then copies": lambda y: (y.view(-1).mul_(0.7), y.mT.contiguous())[1],
    "views before": seen_by_others,
    "a view in place, then it": lambda y: (behind_a_view(lambda v: v.t_)(y), y * 2)[1],
}


def draw(change=lambda y: y, setup=lambda norm, node: None):
    """A convolution, a norm and a neuron that reads the changed output, and their input."""

    def make():
        conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        setup(norm, node := neuron.LIFNode(step_mode="m"))
        return nn.ModuleList([conv, norm, node]), torch.randn(8, 3, 5, 6)

    return robust(make, passes=lambda net, x: net[2](change(net[1](net[0](x)))))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_shape_changes_in_place(change):
    plain, x = draw(change)
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        z = change(y := norm(conv(x)))
        spikes = node(z)
        weights = torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)
        (spikes * weights).sum().backward()
        facts = [(t.shape, t.stride(), t._version, t._is_view()) for t in (y, z)]
        found.append((facts, spikes + 0, [p.grad for p in (conv.weight, *norm.parameters())]))
    (facts, spikes, gradients), (expected_facts, expected, expected_gradients) = reversed(found)
    assert facts == expected_facts and torch.equal(spikes, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


#: what a hook that logs may do with a norm's output [8, 4, 3, 4] or with spikes in inference mode
PEEKS = {
    "detach": lambda y: y.detach().mean(),
    "detach, then in place": lambda y: y.detach().clone().mul_(2).sum(),
    "views": lambda y: y.view(-1).unsqueeze(0).transpose(0, 1).flatten().sum(),
    "composed views": lambda y: y.reshape(8, -1).swapaxes(0, 1).unflatten(0, (4, 12)).sum(1),
    "shape in place": lambda y: y.detach().unsqueeze_(0).swapaxes_(1, 2).squeeze_().std(),
    "slices": lambda y: sum(part[::2].mean() for part in y.chunk(2)),
    "a loop": lambda y: torch.stack([image.max() for image in y]),
    "data": lambda y: y.data.sum(),
    "in place": lambda y: y.detach().add_(1).sum(),
    "numpy": lambda y: torch.as_tensor(float(y.detach().numpy().sum())),
    "a list": lambda y: torch.tensor(y.tolist()).sum(),
    "cast": lambda y: y.to(torch.float64).sum(),
    "contiguous": lambda y: y.transpose(0, 1).contiguous().view(-1)[3],
    "copied": lambda y: copy.deepcopy(y.detach()).sum(),
    "shown": lambda y: torch.tensor(float(len(f"{y.detach()}"))),
    "a norm of it": lambda y: nn.functional.batch_norm(y, None, None, training=True).std(),
    "a sum with it": lambda y: (y + y.detach()).std() + torch.linalg.norm(y),
}


@pytest.mark.parametrize("peek", PEEKS.values(), ids=PEEKS)
def test_hooks_read_in_inference_mode(peek):
    net, x = draw()
    plain = nn.Sequential(*net)
    fast, found, kinds = copy.deepcopy(plain), [], set()
    sj_taid.accelerate(fast)

    @torch.inference_mode()
    def log(module, inputs, output):
        kinds.add(type(output))
        found[-1].append(peek(output).clone())

    for net in (plain, fast):
        found.append([])
        for module in net[1:]:
            module.register_forward_hook(log)
        net(x).sum().backward()
        found[-1] += [net[1].weight.grad, net[2].v.detach()]
    assert kinds == {torch.Tensor, Kept}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def thrice(gradients):
    return tuple(None if g is None else 3 * g for g in gradients)


#: what takes or changes the gradient of a view of a norm's output
TAKERS = {
    "hook": lambda view: view.register_hook(lambda g: 3 * g),
    "node's hook": lambda view: view.grad_fn.register_hook(lambda into, out: thrice(into)),
    "node's prehook": lambda view: view.grad_fn.register_prehook(thrice),
    "its edge's node": lambda view: torch.autograd.graph.get_gradient_edge(
        view
    ).node.register_prehook(thrice),
}
VIEWS = {
    "itself": lambda y: y,
    "flat": lambda y: y.flatten(2),
    "transposed": lambda y: y.view(4, 2, *y.shape[1:]).transpose(-1, -2),
    "a clone's": lambda y: y.contiguous(memory_format=torch.channels_last).unsqueeze(1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_hooks_on_a_view_are_called_or_refused(take, view):
    plain, x = draw(view)
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        take(y := view(norm(conv(x))))
        (node(y) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append([p.grad for p in (conv.weight, *norm.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    conv, norm, node = fast
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


def frozen(x, norm):
    norm.requires_grad_(False)


def frozen_in_part(x, norm):
    norm.bias.requires_grad_(False)


def thawed(x, norm):
    norm.weight.requires_grad_()


@pytest.mark.parametrize("change", [frozen, frozen_in_part, thawed])
def test_gradients_are_those_of_the_norms_call(change):
    plain, x = draw()
    plain[1].weight.requires_grad_(change is not thawed)
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        y = norm(h := conv(x))
        change(h, norm)
        (node(y) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append({name: p.grad for name, p in nn.ModuleList([conv, norm]).named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lacks", ["weight", "bias"])
def test_norm_with_a_weight_or_a_bias_alone(lacks, training, frozen):
    """Which torch makes by ``bias=False`` from 2.13 on."""

    def setup(norm, node):
        norm.register_parameter(lacks, None)
        norm.train(training).requires_grad_(not frozen)

    plain, x = draw(setup=setup)
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        spikes = node(norm(conv(x)))
        (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum().backward()
        found.append({name: p.grad for name, p in nn.ModuleList([conv, norm]).named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


#: the orders of the axes of a norm's input [T, N, C, H, W] in memory
ORDERS = {
    "contiguous": (0, 1, 2, 3, 4),
    "channels last": (0, 1, 3, 4, 2),
    "columns first": (0, 1, 2, 4, 3),
    "batch outermost": (1, 0, 2, 3, 4),
}
KINDS = {
    **{kind.__name__: kind for kind in (neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)},
    "ALIFNode": sj_taid.ALIFNode,
    "ALIFNode per channel": partial(sj_taid.ALIFNode, channels=3),
}


@pytest.mark.parametrize("axes", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_neuron_fuses_in_every_memory_order(kind, axes):
    def make():
        node = kind(step_mode="m", surrogate_function=surrogate.ATan())
        x = torch.randn(4, 2, 3, 5, 6).permute(axes).contiguous()
        x = x.permute(*map(axes.index, range(5)))
        return nn.Sequential(layer.BatchNorm2d(3, step_mode="m"), node), x

    plain, x = robust(make)
    fast, found = copy.deepcopy(plain), []
    report = sj_taid.accelerate(fast, x.requires_grad_())
    for net in (plain, fast):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        spikes = net(leaf)
        (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum().backward()
        found.append((spikes.detach() + 0, spikes.stride(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-5)
    assert report.rows[0].done == "fused into 1", str(report)


#: views of the norm's output of so many images [M, 4, 3, 4] in which a step has some channels alone
PARTS_OF_CHANNELS = {
    "channels for time": (1, lambda y: y.view(1, 2, 2, 3, 4).transpose(0, 1)),
    "channels for time, flat": (1, lambda y: y.flatten(2).view(2, 2, 12)),
    "squeezed": (1, lambda y: y.squeeze(0)),
    "rows for time": (1, lambda y: y.permute(2, 0, 1, 3)),
    "half a batch": (3, lambda y: y.view(2, 6, 3, 4)),
    "halves of channels": (8, lambda y: y.view(16, 2, 3, 4)),
}


@pytest.mark.parametrize("name", PARTS_OF_CHANNELS)
def test_steps_that_have_some_channels_alone_are_computed_apart(name):
    images, view = PARTS_OF_CHANNELS[name]

    def make():
        conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        x = torch.randn(images, 3, 5, 6) * 2
        return nn.ModuleList([conv, norm, neuron.LIFNode(step_mode="m")]), x

    plain, x = robust(make, passes=lambda net, x: net[2](view(net[1](net[0](x)))))
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        spikes = node(y := view(norm(conv(x))))
        (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum().backward()
        found.append([spikes + 0, node.v, conv.weight.grad, norm.weight.grad, norm.bias.grad])
    assert not any(y._source.readers.values())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def resized(y):
    other = torch.empty(4, 2, *y.shape[1:])
    return y.view_as(other), other


#: ways to name the shape of a view other than by numbers in place
NAMED = {
    "permute": lambda y: y.view(4, 2, 4, 3, 4).permute(dims=[0, 1, 2, 4, 3]),
    "view": lambda y: y.view(size=[4, 2, 4, 3, 4]),
    "reshape": lambda y: torch.reshape(y, shape=[4, 2, 4, 3, 4]),
    "movedim": lambda y: torch.movedim(y.view(4, 2, 4, 3, 4), source=[3], destination=[4]),
    "view_as": lambda y: resized(y)[0],
}


@pytest.mark.parametrize("view", NAMED.values(), ids=NAMED)
def test_views_by_names_and_by_other_tensors(view):
    plain, x = draw(view)
    fast, found = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        spikes = node(view(norm(conv(x))))
        spikes.sum().backward()
        found.append([spikes + 0, conv.weight.grad, norm.weight.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_view_like_another_tensor_keeps_it_not_alive():
    _, norm, node = fast = nn.ModuleList(
        [nn.Identity(), nn.BatchNorm2d(4), neuron.LIFNode(step_mode="m")]
    )
    sj_taid.accelerate(fast)
    view, other = resized(norm(torch.randn(8, 4, 3, 4, requires_grad=True)))
    node(view)
    memory = weakref.ref(other)
    del other
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(4, 2, *y.shape[1:]).clone()])
def test_an_output_that_is_detached_in_place_gives_no_gradient(view):
    net = nn.ModuleList([nn.BatchNorm2d(4), neuron.LIFNode(step_mode="m")])
    sj_taid.accelerate(net)
    norm, node = net
    y = view(norm(torch.randn(8, 4, 3, 4, requires_grad=True)))
    y.detach_()
    assert not node(y).requires_grad


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_a_legacy_hook_of_the_neuron_sees_its_gradients():
    plain, x = draw()
    fast, seen = copy.deepcopy(plain), []
    sj_taid.accelerate(fast)
    for conv, norm, node in (plain, fast):
        node.register_backward_hook(lambda _, __, grads: seen.append(grads[0].clone()))
        node(norm(conv(x))).sum().backward()
    torch.testing.assert_close(*seen)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_norm_of_another_dtype_warns_of_nothing(dtype):
    net = nn.ModuleList([nn.BatchNorm2d(4), neuron.LIFNode(step_mode="m")])
    sj_taid.accelerate(net)
    x = torch.randn(8, 4, 3, 4, requires_grad=True).to(dtype)
    expected = copy.deepcopy(net[0]).to(dtype)(x.detach())
    assert torch.equal(net[0].to(dtype)(x).detach(), expected)
