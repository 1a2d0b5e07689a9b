"""Whoever reads a norm's output gets what a plain norm gives, in forward and backward."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sj_taid._internal import graph
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.kept import saving
from tests.nets.alike import EVALUATION, accelerated, assert_alike, assert_same, results, robust
from tests.nets.random_nets import TOUCHES


@torch.library.custom_op("sj_taid_tests::half", mutates_args=())
def half(y: torch.Tensor) -> torch.Tensor:
    return y / 2


def read_by_a_custom_operator(step, y):
    step.seen.append(half(y.detach()))
    return y


def peeked_without_gradients(step, y):
    with torch.inference_mode():
        step.seen.append((y * 2).sum() + sum(image.mean() for image in y))
        step.seen.append(y.detach().view(-1).unsqueeze(0).double().sum() + y.mT.contiguous().std())
        step.seen.append((y + y.detach()).std() + y.detach().clone().add_(1).mean())
    return y


def checkpointed(reentrant):
    return lambda step, y: checkpoint(lambda z: z * z.sigmoid(), y, use_reentrant=reentrant)


def shown(step, y):
    step.seen.append(
        torch.tensor([float(torch.tensor(y.tolist()).sum()), float("grad" in repr(y))])
    )
    step.seen.append(torch.tensor([float(f"{y[0, 0, 0, 0, 0]:.1f}")]))
    return y


def summed_with_what_changes(step, y):
    noise, sums = torch.empty_like(y.detach()), []
    for value in (0.25, 0.5):
        sums.append(y + noise.fill_(value))
    return sums[0].square() + sums[1].square()


#: besides ``TOUCHES``: all that reads a norm's output, ``[T, N, C, H, W]``
READERS = TOUCHES | {
    "nothing": lambda step, y: y,
    "custom operator": read_by_a_custom_operator,
    "inference mode": peeked_without_gradients,
    "checkpoint": checkpointed(reentrant=False),
    "checkpoint in a checkpoint": lambda step, y: checkpoint(
        READERS["checkpoint"], step, y, use_reentrant=False
    ),
    "reentrant checkpoint": checkpointed(reentrant=True),
    "printed": shown,
    "foreach": lambda step, y: sum(torch._foreach_mul([y, y], 2)),
    "gradient inside": lambda step, y: (
        y + torch.autograd.grad(y.square().sum(), y, retain_graph=True)[0].detach()
        if y.requires_grad
        else y
    ),
    "counts in a row": lambda step, y: torch.cat([y + y, y])[: len(y)].square(),
    "counts pooled": lambda step, y: (
        nn.functional.max_pool2d((y + y + y).flatten(0, 1), 3, 1, 1).view(y.shape).square()
    ),
    "many summands": lambda step, y: sum([y] * 7).square(),
    "sum with what changes": summed_with_what_changes,
    "legacy constructor": lambda step, y: y + torch.Tensor(y.detach()),
    "data replaced": lambda step, y: (setattr(y, "data", 0.5 * y.detach()), y)[1],
    "returned": lambda step, y: (step.more.append(y), y)[1],
}


class Net(nn.Module):
    """A convolution, a norm, a neuron and a layer; what reads the norm's output, or the spikes."""

    def __init__(self, reader, place):
        super().__init__()
        self.conv, self.norm = layer.Conv2d(3, 4, 3, padding=1), layer.BatchNorm2d(4)
        options = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.5}
        self.lif, self.head = neuron.LIFNode(**options), layer.Conv2d(4, 2, 3)
        functional.set_step_mode(self, "m")
        self.reader, self.place, self.more = READERS[reader], place, []
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x):
        self.more = []
        y = self.norm(self.conv(x))
        if self.place == "norm, then neuron":
            y = self.reader(self, y)
        spikes = self.lif(y)
        if self.place == "norm behind the neuron":
            y = self.reader(self, y)
        elif self.place == "spikes":
            spikes = self.reader(self, spikes)
        out = self.head(spikes)
        if self.place == "spikes behind a layer":
            spikes = self.reader(self, spikes)
        more, self.more = self.more, []
        return out, y.mean(0), spikes.mean(0), *more


#: where the reader stands, and whether in training
PLACES = {"norm, then neuron": True, "norm behind the neuron": False}
PLACES |= {"spikes": True, "spikes behind a layer": True}
#: what may come too late, and be refused, once the neuron has read
LATE = ("in place", "assign", "tensor hook", "retain", "inside", "data")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reader(reader, place):
    net, x = robust(lambda: (Net(reader, place).train(PLACES[place]), torch.randn(3, 2, 3, 4, 5)))
    fast = accelerated(copy.deepcopy(net))
    options = {"context": torch.enable_grad if PLACES[place] else EVALUATION}
    late = "behind" in place and any(word in reader for word in LATE)
    try:
        expected = results(copy.deepcopy(net), x, **options)
    except RuntimeError:
        assert late
        return
    exact = results(copy.deepcopy(net).double(), x.double(), **options)
    try:
        got = results(fast, x, **options)
    except RuntimeError as error:
        # A change, a hook or a gradient of it may be refused once the neuron has read.
        assert late and len(str(error)) < 400, error
        return
    assert_alike(got, expected, exact)


@pytest.mark.parametrize("reentrant", [True, False])
def test_sum_frees_the_input_of_a_checkpointed_norm(reentrant):
    net, memories = accelerated(Net("nothing", "norm, then neuron")), []

    def block(x):
        x = net.conv(x)
        memories.append(StorageWeakRef(x.untyped_storage()))
        return net.norm(x)

    x, shortcut = torch.randn(3, 2, 3, 4, 5, requires_grad=True), torch.randn(3, 2, 4, 4, 5)
    loss = (shortcut + checkpoint(block, x, use_reentrant=reentrant)).square().sum()
    assert memories[0].expired()
    loss.backward()
    assert len(memories) == 2 and x.grad.abs().sum() > 0


def test_sum_with_an_inference_tensor():
    plain, x = robust(lambda: (Net("nothing", "norm, then neuron"), torch.randn(3, 2, 3, 4, 5)))
    with torch.inference_mode():
        teacher = torch.rand(3, 2, 4, 4, 5)

    def run(net):
        net.head(net.lif(net.norm(net.conv(x))) + teacher).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert_same(plain, run)


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14's JIT fails in a checkpoint")
@pytest.mark.parametrize("around", ["save_on_cpu", "checkpoint", "nothing"])
def test_checkpoint_that_starts_between_norm_and_neuron(around):
    plain, x = robust(lambda: (Net("nothing", "spikes"), torch.randn(3, 2, 3, 4, 5)))

    def spike(net, y):
        functional.reset_net(net)
        return net.lif(y)

    def forward(net, x):
        return net.head(checkpoint(spike, net, net.norm(net.conv(x)), use_reentrant=False))

    def run(net):
        with torch.autograd.graph.save_on_cpu() if around == "save_on_cpu" else nullcontext():
            if around == "checkpoint":
                out = checkpoint(forward, net, x, use_reentrant=False)
            else:
                out = forward(net, x)
        out.square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert_same(plain, run)


def test_deepcopy_of_many():
    net = accelerated(Net("nothing", "spikes"))
    outputs = [net.norm(net.conv(torch.randn(3, 2, 3, 4, 5))) for _ in range(20)]
    made = [tensor.detach() for y in outputs for tensor in (y, net.lif(y))]
    for copied, original in zip(copy.deepcopy(made), made, strict=True):
        assert torch.equal(copied, original)


@pytest.mark.parametrize("split", [torch.unbind, lambda y: [y[t] for t in range(len(y))]])
def test_loop_over_many_steps_does_not_restore_all_for_each(split, monkeypatch):
    net, restored = accelerated(nn.Sequential(neuron.LIFNode(step_mode="m"))), []
    unpack = saving._unpack_counts
    monkeypatch.setattr(
        saving, "_unpack_counts", lambda *saved: restored.append(1) or unpack(*saved)
    )
    head = nn.Linear(8, 8)
    for steps, most in ((8, 8), (40, 0)):
        restored.clear()
        spikes = net(2 * torch.rand(steps, 2, 8))
        torch.stack([head(y) for y in split(spikes)]).sum().backward()
        functional.reset_net(net)
        assert len(restored) == most


def test_neuron_on_an_inference_tensor():
    with torch.inference_mode():
        x = torch.rand(4, 3, 5)

    def run(net):
        net(x).sum().backward()
        return net[0].w.grad

    assert_same(nn.Sequential(neuron.ParametricLIFNode(step_mode="m")), run)


def test_a_norm_whose_input_changes_is_read_by_its_values():
    """And backward refuses, as the plain net's does."""
    x = torch.randn(3, 2, 3, 4, 5)

    def run(net):
        h = net.conv(x)
        y = net.norm(h)
        h += 1
        spikes = net.lif(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            spikes.sum().backward()
        return spikes.detach() + 0

    assert_same(Net("nothing", "norm, then neuron"), run, rtol=0, atol=0)


def test_what_a_cuda_graph_made_is_not_kept_outside(monkeypatch):
    net, x = accelerated(Net("nothing", "norm, then neuron")), torch.randn(3, 2, 3, 4, 5)
    monkeypatch.setattr(graph, "is_capturing", lambda tensor: True)
    spikes = net.lif(net.norm(net.conv(x)))
    assert spikes.recipe()
    monkeypatch.undo()
    assert spikes.recipe() is None  # a replay may have changed them


@pytest.mark.parametrize("place", [0, 1])
def test_parameter_of_what_is_known(place):
    nodes = layer.BatchNorm2d(4, step_mode="m"), neuron.LIFNode(step_mode="m")
    net = accelerated(nn.Sequential(*nodes))
    x = torch.randn(2, 2, 4, 3, 3, requires_grad=True)
    net.values = nn.Parameter(net[: place + 1](x).detach())
    assert isinstance(copy.deepcopy(net).values, nn.Parameter)
    assert net.double().values.dtype == torch.float64


class Foreign(torch.Tensor):
    """Another's subclass."""


def test_other_subclasses_keep_their_class():
    net = accelerated(Net("nothing", "spikes"))
    y = net.norm(net.conv(torch.randn(3, 2, 3, 4, 5)))
    for known in (y, net.lif(y)):
        other = torch.ones(known.shape).as_subclass(Foreign)
        product = known * other
        assert type(product) is type(other * known) is Foreign
        assert torch.equal(product.as_subclass(torch.Tensor), known + 0)


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call:RuntimeWarning")
def test_neuron_whose_surrogate_gives_no_spikes():
    x = torch.randn(3, 2, 3, 4, 5)

    def run(net):
        net.lif.surrogate_function.set_spiking_mode(False)
        net(x)[0].sum().backward()
        return net.head.weight.grad

    assert_same(Net("nothing", "spikes"), run)


def test_spikes_and_norm_outputs_in_collectives(tmp_path):
    net, x = accelerated(Net("nothing", "spikes")), torch.randn(3, 2, 3, 4, 5)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        y = net.norm(net.conv(x)).detach()
        spikes = net.lif(y)
        expected = torch.cat([y, spikes])
        for tensor in (y, spikes):
            dist.all_reduce(tensor)
            assert tensor.recipe() is None
        assert torch.equal(torch.cat([y, spikes]), expected)
        got = [torch.empty(y.shape)]
        dist.all_gather(got, y)
        assert torch.equal(got[0], y)
    finally:
        dist.destroy_process_group()
