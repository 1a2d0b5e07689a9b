"""``fuse_norm``: equal outputs, gradients and checkpoints, and errors once the pair is apart."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sj_taid
from sj_taid import ALIFNode
from sj_taid._compat import FUNCTIONAL_STATES
from tests.helpers import TOLERANCE, trained_norm

TDBN = pytest.param(
    layer.ThresholdDependentBatchNorm2d,
    marks=pytest.mark.skipif(
        not FUNCTIONAL_STATES, reason="0.0.0.0.14's raises NotImplementedError in its own forward"
    ),
)


def alif(**options):
    return ALIFNode(step_mode="m", surrogate_function=surrogate.ATan(), **options)


def norm():
    return trained_norm(step_mode="m")


def pair():
    return nn.Sequential(norm(), alif())


def fused(net):
    """A copy of the net with its norms fused."""
    other = copy.deepcopy(net)
    assert sj_taid.fuse_norm(other).changed
    return other


def images(steps=3, batch=2, channels=4, size=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(steps, batch, channels, size, size, generator=g)


def gradients(net, x_seq, run=None):
    """The output, and the gradient of every parameter and of the input, by name."""
    x_seq = x_seq.clone().requires_grad_()
    torch.manual_seed(0)  # for dropout
    net.zero_grad()
    output = (run or net)(x_seq)
    g = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=g))
    functional.reset_net(net)
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    return {"output": output.detach(), "x_seq": x_seq.grad, **found}


def state_of(net):
    return {name: tensor.float() for name, tensor in net.state_dict().items()}


def assert_close(got, expected):
    assert list(got) == list(expected)
    for name, want in expected.items():
        bound = TOLERANCE[torch.float32]["value"] * max(1.0, float(want.abs().max()))
        assert (got[name] - want).abs().max() <= bound, name


def test_fuse_norm_at_the_end_of_a_container():
    folded = layer.SeqToANNContainer(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    net = nn.Sequential(nn.Sequential(folded), nn.Sequential(alif()))
    expected = gradients(copy.deepcopy(net), images())
    (row,) = sj_taid.fuse_norm(net).rows
    assert (row.layer, row.done) == ("0.0.1", "fused into 1.0")
    assert_close(gradients(net, images()), expected)
    assert sj_taid.fuse_norm(net).kept[0].note == "fused already"


@pytest.mark.parametrize("kind", [TDBN, layer.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_fused_norm_updates_running_statistics(kind, training, momentum):
    arguments = (1.0, 0.7, 4) if kind is layer.ThresholdDependentBatchNorm2d else (4,)
    net = nn.Sequential(kind(*arguments, momentum=momentum), alif())
    functional.set_step_mode(net, "m")
    other = fused(net.train(training))
    for x_seq in (images(), 3 * images() + 1):
        assert_close(gradients(other, x_seq), gradients(net, x_seq))
    assert_close(state_of(other), state_of(net))
    assert other[0].num_batches_tracked == 2 * training


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_fused_norm_without_parameters_or_statistics(options):
    net = nn.Sequential(layer.BatchNorm2d(4, step_mode="m", **options), alif()).eval()
    assert_close(gradients(fused(net), images()), gradients(net, images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_fused_norm_in_half_precision_on_the_torch_backend(training, dtype):
    net = pair().to(dtype).train(training)
    net[1].backend = "torch"
    exact = copy.deepcopy(net).float()
    sj_taid.fuse_norm(net)
    x_seq = images().to(dtype)
    spikes, expected = net(x_seq), exact(x_seq.float())
    assert spikes.dtype == dtype and torch.equal(spikes.float(), expected)
    for output in (spikes, expected):
        output.float().square().sum().backward()
    for name, parameter in exact.named_parameters():
        gradient = net.get_parameter(name).grad
        assert torch.allclose(gradient, parameter.grad.to(gradient.dtype), rtol=1e-2), name
    for name, statistics in exact[0].named_buffers():
        assert torch.equal(net[0].get_buffer(name), statistics.to(net[0].get_buffer(name).dtype))


def test_fused_norm_step_by_step():
    net = pair().eval()
    other = fused(net)
    for each in (net, other):
        functional.set_step_mode(each, "s")
    for x in images():
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("training", [True, False])
def test_fused_norm_on_an_empty_batch_keeps_its_statistics(training):
    net = pair().train(training)
    other, x_seq = fused(net), torch.rand(3, 0, 4, 5, 5)
    expected = gradients(net, x_seq) | net.state_dict()
    for name, value in (gradients(other, x_seq) | other.state_dict()).items():
        assert torch.equal(value, expected[name]), name


class Apart(nn.Module):
    """Calls its norm in another mode than its neuron."""

    def __init__(self, mode):
        super().__init__()
        self.conv, self.bn, self.sn, self.mode = layer.Conv2d(4, 4, 3), norm(), alif(), mode
        self.conv.step_mode = "m"

    def forward(self, x_seq):
        training = self.bn.training
        if self.mode == "eval":
            self.bn.eval()
        x_seq = self.conv(x_seq)
        with torch.set_grad_enabled(self.mode != "no grad"):
            y_seq = self.bn(x_seq)
        self.bn.train(training)
        return self.sn(y_seq)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["no grad", "eval"])
def test_fused_norm_has_the_modes_of_its_call(mode, training):
    net = Apart(mode).train(training)
    found = {}
    for name, each in (("apart", net), ("fused", fused(net))):
        torch.manual_seed(0)
        spikes = each(images(size=9))
        spikes.square().sum().backward()
        learned = {k: p.grad for k, p in each.named_parameters() if p.grad is not None}
        assert ("bn.weight" in learned) == (mode == "eval")
        found[name] = {"spikes": spikes.detach(), **state_of(each), **learned}
    assert_close(found["fused"], found["apart"])


class ByName(nn.Module):
    """Names the input of its norms, which torch and SpikingJelly do differently."""

    def __init__(self):
        super().__init__()
        self.bn1, self.sn1, self.bn2, self.sn2 = norm(), alif(), nn.BatchNorm2d(4), alif()

    def forward(self, x_seq):
        y_seq = self.sn1(self.bn1(x=x_seq))
        return self.sn2(self.bn2(input=y_seq.flatten(0, 1)).unflatten(0, (3, 2)))


def test_fused_norm_called_by_name():
    net = ByName()
    assert_close(gradients(fused(net), images()), gradients(net, images()))


def test_fused_norm_on_bad_shapes():
    net = fused(pair())
    with pytest.raises(ValueError, match="expected 4D input"):
        net(torch.rand(3, 4, 4, 4))
    with pytest.raises(ValueError, match="more than one value per channel"):
        net(torch.rand(1, 1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"norm's weight has 4 channels"):
        net(torch.rand(1, 2, 3, 1, 1))


def test_unfuse_norm_and_copies():
    net = pair()
    expected = gradients(copy.deepcopy(net), images())
    sj_taid.fuse_norm(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[1].norm is other[0]
        assert_close(gradients(other, images()), expected)
    sj_taid.unfuse_norm(net)
    assert net[1].norm is None
    assert_close(gradients(net, images()), expected)


def test_to_lif_applies_the_norm_by_itself_again():
    net = pair().eval()
    expected = net(images())
    functional.reset_net(net)
    sj_taid.fuse_norm(net)
    plain = sj_taid.to_lif(net)
    assert type(plain[1]) is neuron.LIFNode and torch.equal(plain(images()), expected)
    assert net[1].norm is net[0]


@pytest.mark.parametrize("training", [True, False])
def test_fused_norm_compiles_without_graph_breaks(training):
    torch._dynamo.reset()
    folded = layer.SeqToANNContainer(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net = fused(nn.Sequential(norm(), alif(), folded, alif()).train(training))
    other = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(gradients(net, images(), compiled), gradients(other, images()))
    assert_close(state_of(net), state_of(other))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_fused_norm_with_gradient_checkpointing(whole, reentrant):
    net = pair()
    expected = gradients(net, images())
    sj_taid.fuse_norm(net)

    def block(x):
        functional.reset_net(net)
        return net(x) if whole else net[1](x)

    def run(x_seq):
        return checkpoint(block, x_seq if whole else net[0](x_seq), use_reentrant=reentrant)

    assert_close(gradients(net, images(), run), expected)


def test_fused_norm_recomputed_without_its_neuron():
    net = fused(pair())
    x_seq = images().requires_grad_()
    with pytest.raises(RuntimeError, match="checkpoint both together"):
        net[1](checkpoint(net[0], x_seq, use_reentrant=True))


def test_fused_norm_under_a_flop_counter():
    net = nn.Sequential(layer.Conv2d(4, 4, 1, step_mode="m"), norm(), alif())
    with FlopCounterMode(display=False) as counter:
        net(images())
    other = fused(net)
    functional.reset_net(other)
    with FlopCounterMode(display=False) as fused_counter:
        other(images())
    assert fused_counter.get_total_flops() == counter.get_total_flops() > 0


def reads_error():
    return pytest.raises(RuntimeError, match=r"reads what a batch norm passed on.*unfuse_norm")


def straight_error():
    return pytest.raises(RuntimeError, match=r"expected its input straight.*unfuse_norm")


def test_fused_norm_with_its_neuron_replaced():
    net = fused(pair())
    held, alone = net[1], copy.deepcopy(net[0])
    for other in (nn.ReLU(), nn.Conv2d(4, 4, 1), neuron.LIFNode(step_mode="m"), alif()):
        net[1] = other
        with reads_error():
            net(images())
    for passed_on in (net[0](images()), alone(images()), net[:1](images())):
        with reads_error():
            passed_on.mean()
        assert passed_on.flatten(0, 1).shape == (6, 4, 5, 5) and "tensor(" in repr(passed_on)
    assert held.norm is net[0]
    sj_taid.unfuse_norm(net)
    assert len(sj_taid.fuse_norm(net).changed) == 1 and net(images()).shape == images().shape


def test_fused_norm_in_a_slice():
    net = fused(nn.Sequential(norm(), alif(), nn.ReLU()))
    for cut in (nn.Sequential(net[0], net[2]), torch.compile(nn.Sequential(net[0], net[2]))):
        with pytest.raises(Exception, match="reads what a batch norm passed on"):
            cut(images())


def test_fused_norm_replaced():
    net = fused(pair())
    net[0] = norm()  # as convert_sync_batchnorm does, too
    with straight_error():
        net(images())
    sj_taid.unfuse_norm(net)
    assert len(sj_taid.fuse_norm(net).changed) == 1 and net(images()).shape == images().shape


@pytest.mark.parametrize("by_chance", [False, True])
def test_fused_norm_left_out_by_a_branch(by_chance):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.sn, self.normalises = norm(), alif(), True

        def forward(self, x_seq):
            normalises = torch.rand(()) < 0.5 if by_chance else self.normalises
            return self.sn(self.bn(x_seq) if normalises else x_seq)

    net = Net()
    torch.manual_seed(0)  # whose first number, 0.4963, applies the norm
    assert sj_taid.fuse_norm(net).changed
    net.normalises = False
    with straight_error():
        for _ in range(64):
            functional.reset_net(net)
            net(images())
    net.normalises = True
    sj_taid.unfuse_norm(net)
    assert net(images()).shape == images().shape


def test_apply_norm_is_one_to_one():
    first, second, node, other = norm(), norm(), alif(), alif()
    node.apply_norm(first)
    node.apply_norm(second)
    assert not torch.equal(first(images()), images()) and node.norm is second
    with pytest.raises(ValueError, match="applies that norm already"):
        other.apply_norm(second)
