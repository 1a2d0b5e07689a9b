"""What a call costs: Python frames and operators of torch, which a busy machine does not change."""

import sys
import weakref

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sj_taid
from sj_taid._internal.graph import record_saved
from sj_taid.kept.kept import leave
from sj_taid.ops.step.plan import Plans
from tests.nets.alike import accelerated

pytest.importorskip("numba", reason="needs numba: pip install numba")

OPTIONS = {"step_mode": "m", "surrogate_function": surrogate.ATan(), "detach_reset": True}


def frames(function):
    """How many Python functions a call enters, and how many of them are this package's."""
    entered = []

    def see(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code.co_filename)

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(entered), sum("sj_taid" in file for file in entered)


def operators(function):
    """How many of torch's operators a call runs that stand within no other."""
    with torch.autograd.profiler.profile() as profiler:
        function()
    outer = [e for e in profiler.function_events if e.name.startswith("aten::")]
    return sum(not (e.cpu_parent and e.cpu_parent.name.startswith("aten::")) for e in outer)


def counts(net):
    """Frames, those of this package, and operators, of a forward and of its backward."""
    x, grad = (torch.rand(4, 2, 8, 4, 4) for _ in range(2))
    x.requires_grad_()
    outputs = []

    def forward():
        outputs.append(net(x))

    def backward():
        torch.autograd.backward([outputs.pop().as_subclass(torch.Tensor)], [grad])

    found = {}
    for count in (frames, frames, operators):  # the first time decides
        functional.reset_net(net)
        found[count] = count(forward), count(backward)
    (forward_frames, forward_ours), (_, backward_ours) = found[frames]
    return forward_frames, forward_ours, backward_ours, *found[operators]


def make(node, norm):
    norms = [layer.BatchNorm2d(8, step_mode="m")] if norm else []
    return accelerated(nn.Sequential(*norms, node))


@pytest.mark.parametrize("kind", [neuron.LIFNode, neuron.ParametricLIFNode, sj_taid.ALIFNode])
@pytest.mark.parametrize(
    ("norm", "most"), [(True, (110, 50, 20, 12, 10)), (False, (70, 28, 20, 8, 8))]
)
def test_a_call_is_decided_in_advance(norm, most, kind):
    node = kind(**OPTIONS)
    # A parameter's gradient is a tensor, and added to the one before.
    *most, limit = most
    most = *most, limit + 2 * len([*node.parameters()])
    found = counts(make(node, norm))
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), found


def test_plans_of_many_shapes_are_forgotten():
    net = make(neuron.LIFNode(**OPTIONS), True)
    for steps in range(1, Plans.MOST + 4):
        net(torch.rand(steps, 2, 8, 2, 2, requires_grad=True))
        functional.reset_net(net)
    assert [len(Plans.of(module)) for module in net] == [Plans.MOST] * 2


def test_without_gradients_nothing_is_kept():
    net, x = make(neuron.LIFNode(**OPTIONS), True), torch.rand(4, 2, 8, 4, 4)
    with torch.no_grad():
        assert type(net[0](x)) is type(net[1](x)) is torch.Tensor


@pytest.mark.parametrize("kind", ["max", "avg", "adaptive_max", "adaptive_avg"])
def test_a_pool_saves_the_shape_of_a_norms_output_alone(kind):
    pool = getattr(nn.functional, f"{kind}_pool2d")
    plain, net = (make(neuron.LIFNode(**OPTIONS), True) for _ in range(2))
    sj_taid.unaccelerate(plain)
    x = torch.rand(4, 2, 8, 8, 8, requires_grad=True)

    def save(norm):
        y, saved = record_saved(lambda: pool(norm(x).flatten(0, 1), 2), [x])
        y.sum().backward()
        return saved

    assert save(net[0]) < save(plain[0]) - 0.9 * x.nbytes


def add_in_place(y, h):
    y += h
    return y


SUMS = {
    "x + view of norm": lambda y, h: h.transpose(-1, -2) + y.transpose(-1, -2),
    "norm += x": add_in_place,
    "norm + a clone": lambda y, h: h + y.clone(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS)
def test_a_sum_in_front_of_a_neuron_saves_its_terms(add, training, dtype):
    # Whose voltages are float32 without acceleration too, so that bfloat16's spikes are equal.
    plain, net = (make(sj_taid.ALIFNode(**OPTIONS), True) for _ in range(2))
    sj_taid.unaccelerate(plain)
    for norm in (plain[0], net[0]):
        norm.train(training)
    x = torch.randn(4, 2, 8, 8, 8, dtype=dtype, requires_grad=True)

    def run(norm, node):
        functional.reset_net(node)
        h = x * 1.5
        spikes, saved = record_saved(lambda: node(add(norm(h), h)), [x])
        loss, of = (spikes * torch.linspace(0, 1, 8)).sum(), [x, *norm.parameters()]
        for _ in range(2):
            grads = torch.autograd.grad(loss, of, retain_graph=True)
        return saved, spikes, *grads

    (theirs, *right), (ours, *found) = run(*plain), run(*net)
    assert ours < theirs - 0.9 * x.nbytes
    for value, other in zip(right, found, strict=True):
        scale = value.abs().max().item()
        assert torch.allclose(value, other, atol=torch.finfo(dtype).eps * 16 * scale)
    assert all(map(torch.equal, net.buffers(), plain.buffers()))


@pytest.mark.parametrize(("terms", "logs"), [(1, False), (1, True), (2, False), (4, False)])
def test_a_sum_is_never_saved_in_more_bytes_than_it_has(terms, logs):
    (node,) = make(neuron.LIFNode(**OPTIONS), False)
    x, head, *layers = 2 * torch.rand(8, 4, 64), *(nn.Linear(64, 64) for _ in range(1 + terms))

    def forward():
        h = spikes = node(x)
        for branch in layers:
            h = h + branch(spikes)
        return head(h), h.detach().mean() if logs else None

    there = nn.ModuleList([head, *layers]).parameters()
    assert record_saved(forward, [x, *there])[1] == x.nbytes + x.nbytes // 32


def late_statistics(norm, h):
    norm.train()
    norm(3 + 4 * h.detach().requires_grad_())
    norm.eval()


def late_parameters(norm, h):
    norm.weight.data.mul_(3)
    norm.bias.data.add_(1)


@pytest.mark.parametrize("change", [late_statistics, late_parameters])
@pytest.mark.parametrize("training", [True, False])
def test_a_term_is_computed_again_from_the_numbers_of_its_call(change, training):
    """The neuron's gradient is that before the change, at every call."""
    norm, node = make(neuron.LIFNode(**OPTIONS), True)
    norm.train(training)
    for _ in range(2):
        h = torch.rand(4, 2, 8, 4, 4, requires_grad=True) * 1.0
        shortcut = (h * 2).detach().requires_grad_() * 1.0
        spikes = node(norm(h) + shortcut)
        node.reset()
        loss = (spikes * torch.linspace(0, 1, 4)).sum()
        (expected,) = torch.autograd.grad(loss, shortcut, retain_graph=True)
        change(norm, h)
        (found,) = torch.autograd.grad(loss, shortcut)
        assert torch.equal(found, expected)


def test_a_term_whose_input_changes_before_backward_raises_an_error():
    norm, node = make(neuron.LIFNode(**OPTIONS), True)
    for _ in range(2):
        h = torch.rand(4, 2, 8, 2, 2, requires_grad=True) * 1.0
        spikes = node(norm(h) + h * 2)
        node.reset()
        h.detach().add_(1)
        with pytest.raises(RuntimeError, match=r"write h = h \+ o instead of h \+= o"):
            spikes.sum().backward()


def test_a_norm_of_what_is_not_dense_keeps_its_copy_alone():
    norm, node = make(neuron.LIFNode(**OPTIONS), True)
    for _ in range(2):
        h = torch.rand(2, 4, 8, 2, 2, requires_grad=True) * 1.0
        spikes = node(norm(h.transpose(0, 1)) + torch.rand(4, 2, 8, 2, 2, requires_grad=True) * 2)
        node.reset()
        memory = weakref.ref(h.untyped_storage())
        h.detach().add_(1)  # the plain norm has saved a copy, too
        del h
        assert memory() is None
        spikes.sum().backward()


def test_what_is_detached_keeps_no_input():
    norm, node = make(neuron.LIFNode(**OPTIONS), True)
    h = torch.rand(4, 2, 8, 2, 2, requires_grad=True) * 1.0
    y = norm(h)
    moved = y.transpose(0, 1).contiguous(), y.flatten(0, 1).clone(memory_format=torch.channels_last)
    kept = [t.detach() for t in (y, y.clone(), *moved, y + h, y + y, (y + y)[1:])]
    kept += [t.detach() for t in (node(y), node(y + h))]
    with torch.no_grad():
        kept += [y.clone(), (y + h).clone()]
    memory = weakref.ref(h.untyped_storage())
    node.reset()
    del h, y, moved
    assert memory() is None and all((t + 0).isfinite().all() for t in kept)


def test_spikes_that_a_layer_has_read_are_freed():
    (node,) = make(neuron.LIFNode(**OPTIONS), False)
    spikes = node(torch.rand(4, 2, 8, requires_grad=True) * 3)
    memory = weakref.ref(leave(spikes).untyped_storage())
    read = nn.functional.linear(spikes, torch.ones(2, 8, requires_grad=True))
    del spikes
    assert memory() is None
    read.sum().backward()
