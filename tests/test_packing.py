"""``packed_spikes``: the same gradients to the bit, and what is kept for them."""

import copy
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid import ALIFNode, packing
from sj_taid.ops import bits

ATAN = surrogate.ATan()


def make_net(node=ALIFNode, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        node(surrogate_function=ATAN, v_threshold=0.2, **options),
        layer.Conv2d(4, 3, 3, padding=1),
        node(surrogate_function=ATAN, v_threshold=0.2, **options),
        layer.MaxPool2d(2),
        layer.Conv2d(3, 3, 3, padding=1),
        node(surrogate_function=ATAN, v_threshold=0.2, **options),
        layer.AvgPool2d(3),
        layer.Flatten(),
        layer.Linear(3, 5),
    )
    functional.set_step_mode(net, "m")
    return net


def images(steps=5):
    return torch.rand(steps, 2, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 3


def gradients(net, x_seq, run=None):
    functional.reset_net(net)
    net.zero_grad()
    (run or net)(x_seq).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def in_bfloat16(net, x_seq):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x_seq).float()


def assert_equal(got, expected):
    assert got.keys() == expected.keys() and any(g.abs().max() > 0 for g in expected.values())
    for name, want in expected.items():
        assert torch.equal(got[name], want), name


def kept_bytes(net, x_seq):
    """Bytes of the storages that autograd keeps, without the parameters'."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def note_packed(tensor):
        kept = pack(tensor)
        note(kept if isinstance(kept, torch.Tensor) else kept.bits)
        return kept

    functional.reset_net(net)
    pack = packing._pack
    with (
        mock.patch.object(packing, "_pack", note_packed),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = net(x_seq)
    del output  # alive until here, so that no storage was freed and counted twice
    return sum(size for address, size in storages.items() if address not in parameters)


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
def test_gradients_are_equal_to_the_bit(node, mode, channels_last):
    net = make_net(node)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    functional.set_step_mode(net, mode)

    def run(x_seq):
        return net(x_seq) if mode == "m" else torch.stack([net(x) for x in x_seq])

    expected = gradients(net, images(), run)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, images(), run), expected)
    assert_equal(gradients(net, images(), run), expected)


def test_it_says_what_is_packed():
    net = nn.Sequential(nn.Linear(2, 3), ALIFNode(), nn.Linear(3, 1))
    with sj_taid.packed_spikes(net) as packed:
        assert repr(packed) == "PackedSpikes(1 neurons' spikes for 2 layers)"


def test_spikes_take_a_bit_each():
    net = make_net()
    # The convolutions and the pooling that read a neuron, and what max pooling made of one.
    spikes, places = 8 * 2 * (36 * (4 + 3) + 9 * (3 + 3)), 8 * 2 * 9 * 3
    before = kept_bytes(net, images(8))
    with sj_taid.packed_spikes(net):
        saved = 4 * spikes - spikes // 8 + (8 - 2) * places
        assert kept_bytes(net, images(8)) == before - saved


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("steps", [1, 8, 19])
def test_a_fused_forward_writes_the_bits_itself(backend, steps):
    if backend == "numba":
        pytest.importorskip("numba", reason="needs numba: pip install numba")
    x_seq = torch.randn(steps, 3, 700, requires_grad=True)
    bits.request()
    spike_seq, _, _ = sj_taid.functional.alif_multi_step(
        x_seq, 0.0, torch.tensor(0.0), torch.tensor(0.3), backend=backend
    )
    written = bits.taken()
    assert (written is None) == (backend == "torch") and bits.taken() is None
    if written is not None:
        assert torch.equal(written, bits.pack(spike_seq.detach()))


def test_only_unchanged_outputs_are_packed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_net()

        def forward(self, x_seq):
            spikes = self.inner[1](self.inner[0](x_seq))
            spikes = spikes.mul_(0.5)  # changed in place: no longer zeros and ones
            return self.inner[2](spikes).mean() + self.inner[2](spikes + 1).mean()

    net = Net()
    expected = gradients(net, images())
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, images()), expected)


def test_autocast_casts_bits_too():
    net = make_net()

    run = partial(in_bfloat16, net)
    expected = gradients(net, images(), run)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, images(), run), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    net = make_net()
    x_seq = images().requires_grad_()

    def block(x_seq):
        functional.reset_net(net)
        return net(x_seq)

    def run(x_seq):
        return checkpoint(block, x_seq, use_reentrant=reentrant)

    expected = gradients(net, x_seq, run)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, x_seq, run), expected)


class Halved(ALIFNode):
    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq) * 0.5


def smooth(**options):
    return neuron.LIFNode(**options | {"surrogate_function": surrogate.Sigmoid(spiking=False)})


@pytest.mark.parametrize(
    "node",
    [
        *(getattr(neuron, n) for n in ("TernaryIFNode", "TernaryLIFNode") if hasattr(neuron, n)),
        smooth,
        Halved,
    ],
)
def test_outputs_that_are_no_zeros_and_ones_are_kept(node):
    hooked = ALIFNode()
    hooked.register_forward_hook(lambda *call: call[2] * 0.5)
    first = node(surrogate_function=ATAN)
    net = nn.Sequential(nn.Linear(4, 3), first, nn.Linear(3, 3), hooked, nn.Linear(3, 2))
    functional.set_step_mode(net, "m")
    x_seq = 5 * torch.randn(4, 6, 4)
    gradients(net, x_seq)  # TorchScript, of SpikingJelly 0.0.0.0.14, rounds the first otherwise
    expected = gradients(net, x_seq)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, x_seq), expected)


class Own(torch.nn.Module):
    """A surrogate of a user's: zeros and ones, or not."""

    spiking = True

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        return (x - self.threshold).sigmoid() if self.threshold else surrogate.Sigmoid()(x)


@pytest.mark.parametrize("node", [partial(ALIFNode, backend="torch"), neuron.LIFNode])
@pytest.mark.parametrize(
    ("own", "bits"), [(Own(0.5), False), (lambda x: (4 * x).sigmoid(), False), (Own(0.0), True)]
)
def test_of_a_surrogate_of_ones_own_zeros_and_ones_are_packed(node, own, bits, monkeypatch):
    found = []
    monkeypatch.setattr(packing, "_register", lambda spikes, *_: found.append(spikes))
    net = nn.Sequential(nn.Linear(4, 3), node(surrogate_function=own), nn.Linear(3, 2))
    functional.set_step_mode(net, "m")
    with sj_taid.packed_spikes(net):
        net(5 * torch.randn(4, 6, 4))
    assert bool(found) == bits
    monkeypatch.undo()
    functional.reset_net(net)
    x_seq = 5 * torch.randn(4, 6, 4)
    expected = gradients(net, x_seq)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, x_seq), expected)


def test_autocast_leaves_pooling_as_it_is_and_casts_folded_sequences():
    net = nn.Sequential(
        ALIFNode(v_threshold=0.2),
        layer.AvgPool2d(3, 1, padding=1),
        ALIFNode(v_threshold=0.1),
        layer.SeqToANNContainer(nn.Conv2d(2, 3, 3)),
    )
    functional.set_step_mode(net, "m")

    run = partial(in_bfloat16, net)
    expected = gradients(net, images(), run)
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, images(), run), expected)


def test_step_by_step_and_by_keyword(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.first, self.second = ALIFNode(), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(input=self.first(self.node(x)))

    net = Net()
    expected = gradients(net, 3 * torch.ones(5, 4))
    packed = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda tensor: packed.append(pack(tensor)) or packed[-1])
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, 3 * torch.ones(5, 4)), expected)
    assert [kept.bits.shape for kept in packed if isinstance(kept, packing._Packed)] == [(1, 20)]


def test_an_error_in_a_layer_leaves_no_hooks_behind():
    net = make_net()
    with sj_taid.packed_spikes(net), pytest.raises(RuntimeError, match="channels"):
        net[2](net[1](torch.ones(5, 2, 7, 6, 6)))
    expected = gradients(net, images())
    assert_equal(gradients(net, images()), expected)
    assert kept_bytes(net, images()) == kept_bytes(make_net(), images())


def test_a_net_that_packs_can_be_copied_and_pickled():
    net = make_net()
    expected = gradients(net, images())
    packing = sj_taid.packed_spikes(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_equal(gradients(other, images()), expected)
    packing.remove()


def test_a_net_without_neurons_or_layers_is_refused():
    for net in (nn.Sequential(ALIFNode()), nn.Sequential(nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="packing needs some of both"):
            sj_taid.packed_spikes(net)


def test_with_fused_norms():
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), ALIFNode(surrogate_function=ATAN),
        layer.Conv2d(4, 4, 3), layer.BatchNorm2d(4), ALIFNode(surrogate_function=ATAN),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    assert len(sj_taid.fuse_norm(net).joined) == 2
    expected = gradients(net, images())
    with sj_taid.packed_spikes(net):
        assert_equal(gradients(net, images()), expected)
