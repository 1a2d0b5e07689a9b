"""``packed_spikes``: the same gradients to the bit, and what is saved for them."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid import ALIFNode
from sj_taid._compat import FUNCTIONAL_STATES
from sj_taid._graph import record_saved
from sj_taid.ops import bits
from tests.helpers import assert_equal

ATAN = surrogate.ATan()


def make_net(node=ALIFNode):
    neurons = [node(surrogate_function=ATAN, v_threshold=0.2) for _ in range(3)]
    net = nn.Sequential(
        *(layer.Conv2d(2, 4, 3, padding=1), neurons[0]),
        *(layer.Conv2d(4, 3, 3, padding=1), neurons[1], layer.MaxPool2d(2)),
        *(layer.Conv2d(3, 3, 3, padding=1), neurons[2], layer.AvgPool2d(3)),
        *(layer.Flatten(), layer.Linear(3, 5)),
    )
    functional.set_step_mode(net, "m")
    return net


def linear_net(node):
    net = nn.Sequential(nn.Linear(4, 3), node, nn.Linear(3, 2), ALIFNode(v_threshold=0.1))
    functional.set_step_mode(net, "m")
    return net


def images(steps=5):
    return torch.rand(steps, 2, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 3


def vectors():
    return 5 * torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0))


def backward(output):
    weights = torch.linspace(-1, 1, output.numel())
    (output.float() * weights.view(output.shape)).sum().backward()


def gradients(net, x_seq, run=None):
    functional.reset_net(net)
    net.zero_grad()
    backward((run or net)(x_seq))
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_packing_changes_nothing(net, x_seq, run=None):
    expected = gradients(net, x_seq, run)
    assert any(g.any() for g in expected.values())
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, x_seq, run), expected)
    assert_equal(gradients(net, x_seq, run), expected)


def packing(net, on):
    return sj_taid.packed_spikes(net) if on else nullcontext()


def saved_tensors(net, x_seq):
    functional.reset_net(net)
    return record_saved(net, lambda: net(x_seq))[1]


def saved_bytes(net, x_seq):
    return sum(t.untyped_storage().nbytes() for t in saved_tensors(net, x_seq))


def packed_shapes(net, x_seq):
    return [tuple(t.shape) for t in saved_tensors(net, x_seq) if t.dtype == torch.uint8]


@pytest.mark.parametrize("steps", [1, 5, 8, 9, 17])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_and_back(steps, channels_last):
    spikes = (torch.rand(steps, 2, 3, 4, 5) < 0.5).float()
    if channels_last:
        spikes = spikes.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        spikes = spikes.unflatten(0, (steps, 2))
    packed = bits.pack(spikes)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-steps // 8), 2 * 3 * 4 * 5)
    again = torch.empty_like(spikes)
    bits.unpack_into(packed, again)
    assert torch.equal(again, spikes)


@pytest.mark.parametrize("node", [ALIFNode, neuron.LIFNode])
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_packing_gives_equal_gradients(node, mode, channels_last):
    net = make_net(node)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    functional.set_step_mode(net, mode)

    def run(x_seq):
        return net(x_seq) if mode == "m" else torch.stack([net(x) for x in x_seq])

    assert_packing_changes_nothing(net, images(), run)


def test_packing_saves_a_bit_per_spike():
    net = make_net()
    # The convolutions that read a neuron or what max pooling made of one, and the pooling.
    spikes, pooled, indices = 8 * 2 * (36 * 4 + 9 * 3), 8 * 2 * (36 + 9) * 3, 8 * 2 * 9 * 3
    before = saved_bytes(net, images(8))
    with sj_taid.packed_spikes(net) as packed:
        saved = 4 * spikes - spikes // 8 + 4 * pooled + (8 - 2) * indices
        assert saved_bytes(net, images(8)) == before - saved
        assert repr(packed) == "PackedSpikes(3 neurons' spikes for 6 layers)"
    assert saved_bytes(net, images(8)) == before


class Halved(ALIFNode):
    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq) * 0.5


class HalvedInPlace(ALIFNode):
    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq).mul_(0.5)


def half(module, inputs, output):
    return output * 0.5


def half_of_neurons(module, inputs, output):
    return output * 0.5 if isinstance(module, neuron.BaseNode) else None


def hooked(module):
    module.register_forward_hook(half)
    return module


def halved(forward):
    return lambda *args: forward(*args) * 0.5


def patched(node):
    node.forward = halved(node.forward)
    return node


def spikes_of(x):
    """A custom surrogate that spikes."""
    return surrogate.Sigmoid()(x)


def smooth(x):
    return (4 * x).sigmoid()


def lif(surrogate_function=ATAN, kind="LIFNode"):
    return getattr(neuron, kind)(surrogate_function=surrogate_function)


NOT_SPIKES = {
    "subclass": Halved,
    "in place": HalvedInPlace,
    "patched ALIF": lambda: patched(ALIFNode()),
    "patched LIF": lambda: patched(lif()),
    "spiking=False": lambda: lif(surrogate.Sigmoid(spiking=False)),
    "hooked surrogate": lambda: lif(hooked(surrogate.ATan())),
    "custom surrogate": lambda: lif(smooth),
    "custom surrogate of ALIF": lambda: ALIFNode(surrogate_function=smooth, backend="torch"),
    "MultiLevelSpikeCount": lambda: lif(surrogate.MultiLevelSpikeCount(3)),
    "TernaryIFNode": lambda: lif(kind="TernaryIFNode"),
    "TernaryLIFNode": lambda: lif(kind="TernaryLIFNode"),
}


@pytest.mark.parametrize("kind", NOT_SPIKES)
def test_packing_leaves_outputs_that_are_not_zeros_and_ones(kind):
    if any(kind.startswith(name) for name in ("Multi", "Ternary")) and not FUNCTIONAL_STATES:
        pytest.skip("this SpikingJelly does not have it")
    net = linear_net(NOT_SPIKES[kind]())
    gradients(net, vectors())  # TorchScript, of SpikingJelly 0.0.0.0.14, rounds the first otherwise
    assert_packing_changes_nothing(net, vectors())


CHANGES = {
    "hook": lambda node: node.register_forward_hook(half),
    "prepended hook": lambda node: node.register_forward_hook(half, prepend=True),
    "global hook": lambda node: register_module_forward_hook(half_of_neurons),
    "patched forward": lambda node: mock.patch.object(node, "forward", halved(node.forward)),
}


@pytest.mark.parametrize("node", [ALIFNode, lif])
@pytest.mark.parametrize("change", CHANGES)
def test_packing_leaves_outputs_changed_within_the_call(node, change):
    net = linear_net(node())
    found = []
    for on in (True, False):
        with packing(net, on), CHANGES[change](net[1]):
            found.append(gradients(net, vectors()))
    assert_equal(*found)


@pytest.mark.parametrize(("dilation", "count"), [(1, 1), (3, 0)])
def test_packing_leaves_pooled_padding(dilation, count):
    """The dilated window lies in the padding of the two pixels, whose greatest value is -inf."""
    pool = nn.MaxPool1d(2, padding=1, dilation=dilation)
    net = nn.Sequential(nn.Linear(4, 2), ALIFNode(), pool, nn.Linear(1 + count, 1))
    with sj_taid.packed_spikes(net):
        assert len(packed_shapes(net, vectors())) == count


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["MaxPool", "AvgPool"])
def test_packing_saves_the_shape_of_what_pooling_reads(kind, axes):
    pool, size = getattr(nn, f"{kind}{axes}d")(2), 6**axes
    net = nn.Sequential(nn.Linear(4, size), nn.Unflatten(2, (6,) * axes), pool, nn.Flatten())
    net += nn.Sequential(nn.Linear(3**axes * 6, 2), ALIFNode())
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        assert_packing_changes_nothing(net, vectors())
        with sj_taid.packed_spikes(net):
            assert all(t.numel() < 4 * 6 * size for t in saved_tensors(net, vectors()))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("node", [partial(ALIFNode, backend="torch"), neuron.LIFNode])
@pytest.mark.parametrize(("function", "count"), [(smooth, 0), (spikes_of, 1)])
def test_packing_looks_at_the_output_of_a_custom_surrogate(node, function, count):
    net = linear_net(node(surrogate_function=function))
    with sj_taid.packed_spikes(net):
        assert len(packed_shapes(net, vectors())) == count


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("node", [ALIFNode, neuron.LIFNode])
def test_packing_does_not_wait_for_the_device(node):
    net = make_net(node)
    with sj_taid.packed_spikes(net), Reads() as reads:
        gradients(net, images())
    assert reads.count == 0


class Permuted(nn.Module):
    """A parametrization that saves int64 indices, as weight sharing and hashing do."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("index", torch.randperm(n))

    def forward(self, weight):
        return weight.flatten()[self.index].view_as(weight)


def test_packing_narrows_no_indices_but_max_poolings():
    net = nn.Sequential(nn.Linear(4, 300), ALIFNode(v_threshold=0.3), nn.Linear(300, 300))
    functional.set_step_mode(net, "m")
    parametrize.register_parametrization(net[2], "weight", Permuted(90_000))
    assert_packing_changes_nothing(net, vectors())


def in_bfloat16(net, x_seq):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x_seq).float()


@pytest.mark.parametrize("pools", [False, True])
def test_packing_under_autocast(pools):
    net = make_net()
    if pools:  # which autocast leaves as it is, before a folded sequence
        net = nn.Sequential(
            ALIFNode(v_threshold=0.2),
            layer.AvgPool2d(3, 1, padding=1),
            ALIFNode(v_threshold=0.1),
            layer.SeqToANNContainer(nn.Conv2d(2, 3, 3)),
        )
        functional.set_step_mode(net, "m")
    assert_packing_changes_nothing(net, images(), partial(in_bfloat16, net))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed_in", [("forward",), ("backward",), ("forward", "backward")])
def test_packing_with_gradient_checkpointing(reentrant, packed_in):
    net, x_seq = make_net(), images().requires_grad_()

    def block(x_seq):
        functional.reset_net(net)
        return net(x_seq)

    def run(*packed_in):
        net.zero_grad()
        with packing(net, "forward" in packed_in):
            output = checkpoint(block, x_seq, use_reentrant=reentrant)
        with packing(net, "backward" in packed_in):
            backward(output)
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    assert_equal(run(*packed_in), run())


def test_packing_within_other_hooks():
    net = make_net()

    def run(x_seq):
        with save_on_cpu():
            return net(x_seq)

    assert_packing_changes_nothing(net, images(), run)


@pytest.mark.parametrize("forbidden", ["torch.func", "hooks"])
def test_packing_where_hooks_are_forbidden(forbidden):
    net = nn.Sequential(layer.AvgPool2d(2), ALIFNode(surrogate_function=ATAN))
    functional.set_step_mode(net, "m")

    def loss(x_seq):
        functional.reset_net(net)
        return net(x_seq).square().sum()

    x_seq = images().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x_seq), x_seq)
    with sj_taid.packed_spikes(net):
        if forbidden == "torch.func":
            got = torch.func.grad(loss)(x_seq)
        else:
            with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
                (got,) = torch.autograd.grad(loss(x_seq), x_seq)
    assert expected.any() and torch.equal(got, expected)


def test_packing_step_by_step_and_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.first, self.second = ALIFNode(), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(input=self.first(self.node(x)))

    net = Net()
    assert_packing_changes_nothing(net, 3 * torch.ones(5, 4))
    with sj_taid.packed_spikes(net):
        assert packed_shapes(net, 3 * torch.ones(5, 4)) == [(1, 20)]


class Interrupting(nn.Linear):
    event = None

    def forward(self, x):
        if not callable(self.event):
            raise self.event
        self.event()
        return super().forward(x)


@pytest.mark.parametrize("event", [RuntimeError("stop"), KeyboardInterrupt("stop"), None])
def test_packing_leaves_no_hooks_behind(event):
    net = linear_net(ALIFNode())
    net[2] = Interrupting(3, 2)
    packed = sj_taid.packed_spikes(net)
    net[2].event = event or packed.remove
    with pytest.raises(type(event), match="stop") if event else nullcontext():
        net(vectors())
    packed.remove()
    table = torch.zeros(80_000, requires_grad=True)
    table[torch.tensor([70_000])].sum().backward()
    assert table.grad.nonzero().item() == 70_000
    assert not any("forward" in vars(module) for module in net.modules())


def test_packing_in_copies_and_pickles():
    net = make_net()
    expected, count = gradients(net, images()), saved_bytes(net, images())
    with sj_taid.packed_spikes(net):
        others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for other in others:
        assert_equal(gradients(other, images()), expected)
        assert saved_bytes(other, images()) < count


def test_packing_twice_ends_with_the_last():
    net = make_net()
    before = saved_bytes(net, images())
    first = sj_taid.packed_spikes(net)
    packed = saved_bytes(net, images())
    with sj_taid.packed_spikes(net):
        first.remove()
        first.remove()
        assert saved_bytes(net, images()) == packed
    assert saved_bytes(net, images()) == before


def test_packing_needs_neurons_and_layers():
    for net in (nn.Sequential(ALIFNode()), nn.Sequential(nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="packing needs some of both"):
            sj_taid.packed_spikes(net)


@pytest.mark.parametrize("node", [ALIFNode, lif])
def test_packing_leaves_a_later_compilation_alone(node):
    torch._dynamo.reset()
    net = linear_net(node())
    with sj_taid.packed_spikes(net):
        gradients(net, vectors())
        expected = gradients(net, vectors())
        compiled = torch.compile(net, fullgraph=node is ALIFNode, backend="aot_eager")
        assert_equal(gradients(net, vectors(), compiled), expected)


def test_packing_with_fused_norms():
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), ALIFNode(surrogate_function=ATAN),
        layer.Conv2d(4, 4, 3), layer.BatchNorm2d(4), ALIFNode(surrogate_function=ATAN),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    assert len(sj_taid.fuse_norm(net).changed) == 2
    assert_packing_changes_nothing(net, images())
