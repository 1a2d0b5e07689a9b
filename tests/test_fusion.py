"""``fuse_norm``: what is joined and what is not, equal outputs, gradients and checkpoints."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import nn
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid import ALIFNode
from sj_taid._compat import FUNCTIONAL_STATES
from tests.helpers import TOLERANCE, swapped, trained_norm

ZOO = {
    "spiking_vgg11_bn": (spiking_vgg.spiking_vgg11_bn, {}, 8, 8),
    "spiking_resnet18": (spiking_resnet.spiking_resnet18, {}, 9, 20),
    "sew_resnet18": (sew_resnet.sew_resnet18, {"cnf": "ADD"}, 20, 20),
}


def alif(**options):
    return ALIFNode(step_mode="m", surrogate_function=surrogate.ATan(), **options)


def norm(**options):
    return trained_norm(step_mode="m", **options)


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


def assert_like(got, expected, scale=1.0):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        bound = scale * TOLERANCE[torch.float32]["value"] * max(1.0, float(want.abs().max()))
        assert (got[name] - want).abs().max() <= bound, name


@pytest.mark.parametrize("name", ZOO)
def test_nets_of_the_zoo_keep_outputs_gradients_statistics_and_keys(name):
    make, options, joined, norms = ZOO[name]
    torch.manual_seed(0)
    net = swapped(make, v_threshold=0.1, **options)
    fused = copy.deepcopy(net)
    report = sj_taid.fuse_norm(fused)
    assert (len(report.fused), len(report.rows)) == (joined, norms)
    x_seq = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_like(gradients(fused, x_seq), gradients(net, x_seq))
    there, here = net.state_dict(), fused.state_dict()
    assert list(there) == list(here)
    assert_like(*({k: v.float() for k, v in state.items()} for state in (here, there)))
    assert fused.load_state_dict(there) and net.load_state_dict(here)
    assert_like(*({"eval": m.eval()(x_seq).detach()} for m in (fused, net)))


class Block(nn.Module):
    """Registered in another order than it runs, as only a trace can tell."""

    def __init__(self):
        super().__init__()
        self.sn2, self.sn1 = alif(v_threshold=0.4), alif()
        self.bn2, self.bn1 = norm(), norm()

    def forward(self, x_seq, skip=None):
        out = self.sn1(self.bn1(x_seq))
        if skip is not None:
            out = out + skip
        return self.sn2(self.bn2(out))


def test_the_order_of_calls_counts_and_not_of_registration():
    net = Block()
    expected = gradients(copy.deepcopy(net), images())
    report = sj_taid.fuse_norm(net)
    assert {(row.norm, row.neuron) for row in report.fused} == {("bn1", "sn1"), ("bn2", "sn2")}
    assert_like(gradients(net, images()), expected)
    assert net.sn1.norm is net.bn1


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.sn = norm(), alif()

    def forward(self, x_seq):
        if x_seq.sum() > 0:  # decided by data, which symbols have not
            x_seq = -x_seq
        return self.sn(self.bn(x_seq))


class Shared(Branching):
    def forward(self, x_seq):
        return self.sn(self.bn(self.sn(self.bn(x_seq))))


class Summed(Branching):
    def forward(self, x_seq):
        y_seq = self.bn(x_seq)
        return self.sn(y_seq) + y_seq


class Odd(layer.BatchNorm2d):
    def forward(self, x_seq):
        return 2 * super().forward(x_seq)


class Leaking(Branching):
    def forward(self, x_seq):
        self.y_seq = self.bn(x_seq)
        return self.sn(self.y_seq)


class Optional(Branching):
    def forward(self, x_seq, features=False):
        y_seq = self.bn(x_seq)
        spike_seq = self.sn(y_seq)
        return (spike_seq, y_seq) if features else spike_seq


class InEvalOnly(Branching):
    def forward(self, x_seq):
        y_seq = self.bn(x_seq)
        spike_seq = self.sn(y_seq)
        return spike_seq if self.training else spike_seq + y_seq


class Switched(Branching):
    normalise = True

    def forward(self, x_seq):
        return self.sn(self.bn(x_seq) if self.normalise else x_seq)


class Chance(Branching):
    def forward(self, x_seq):
        return self.sn(self.bn(x_seq) if torch.rand(()) < 0.5 else x_seq)


def test_a_norm_that_a_later_pass_leaves_out_is_an_error():
    net = Switched()
    assert sj_taid.fuse_norm(net).fused
    expected = net(images())
    functional.reset_net(net)
    net.normalise = False
    with pytest.raises(RuntimeError, match=r"straight from the batch norm.*unfuse_norm"):
        net(images())
    net.normalise = True
    assert torch.equal(net(images()), expected)
    functional.reset_net(net)
    sj_taid.unfuse_norm(net)
    net.normalise = False
    assert torch.equal(net(images()), alif()(images()))


def test_a_norm_that_is_applied_by_chance_is_an_error_and_tracing_draws_nothing():
    net, rows = Chance(), ()
    for seed in range(64):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        rows = rows or sj_taid.fuse_norm(net).fused
        assert torch.equal(torch.get_rng_state(), state)
    assert rows
    with pytest.raises(RuntimeError, match="a forward branched on a flag or on chance"):
        for _ in range(64):
            functional.reset_net(net)
            net(images())


class Appending(Branching):
    """Keeps what its norm gives in containers."""

    def __init__(self):
        super().__init__()
        self.features, self.seen, self.last = [], {"nothing": 0, "deep": [[]]}, ()
        self.itself = []
        self.itself.append(self.itself)

    def forward(self, x_seq):
        y_seq = self.bn(x_seq)
        self.features.append(y_seq)
        self.seen["y_seq"] = y_seq
        self.seen["deep"][0].append(y_seq)
        self.last = (y_seq,)
        return self.sn(y_seq)


def test_what_a_forward_keeps_is_as_before():
    net = Appending()
    features, seen = net.features, net.seen
    report = sj_taid.fuse_norm(net)
    assert not report.fused and "keeps what it computes as features, seen, last" in str(report)
    assert (net.features, net.seen, net.last) == ([], {"nothing": 0, "deep": [[]]}, ())
    assert net.features is features and net.seen is seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_net_in_half_precision_on_the_torch_backend(training, dtype):
    net = nn.Sequential(norm(), alif()).to(dtype).train(training)
    net[1].backend = "torch"
    exact = copy.deepcopy(net).float()
    sj_taid.fuse_norm(net)
    x_seq = images().to(dtype)
    spikes = net(x_seq)
    functional.reset_net(exact)
    expected = exact(x_seq.float())
    assert spikes.dtype == dtype and torch.equal(spikes.float(), expected)
    for made in (spikes, expected):
        made.float().square().sum().backward()
    for name, parameter in exact.named_parameters():
        gradient = net.get_parameter(name).grad
        assert torch.allclose(gradient, parameter.grad.to(gradient.dtype), rtol=1e-2), name
    for name, statistics in exact[0].named_buffers():
        assert torch.equal(net[0].get_buffer(name), statistics.to(net[0].get_buffer(name).dtype))


class Outer(nn.Module):
    """Reads what a block's norm gives, past the block."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(norm(), alif())

    def forward(self, x_seq):
        return self.block(x_seq) + self.block[0](x_seq)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        bn = norm()
        self.held = nn.ModuleList([bn])
        self.seq = nn.Sequential(bn, alif())

    def forward(self, x_seq):
        return self.seq(x_seq) + self.held[0](x_seq)


def with_hook_on_the_neuron():
    net = nn.Sequential(norm(), alif())
    net[1].register_forward_pre_hook(lambda node, inputs: (inputs[0] * 0.1,))
    return net


def with_hook():
    net = nn.Sequential(norm(), alif())
    net[0].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Branching(), "the forward of Branching cannot be traced"),
        (Shared(), "called in 2 places"),
        (Summed(), "2 places read its output"),
        (nn.Sequential(Odd(4, step_mode="m"), alif()), "Odd is not known to compute"),
        (nn.Sequential(norm(), neuron.LIFNode(step_mode="m")), "its reader is a LIFNode"),
        (nn.Sequential(norm(), nn.ReLU(), alif()), "its reader is a ReLU"),
        (nn.Sequential(norm()), "its output leaves the module that calls it"),
        (nn.Sequential(layer.BatchNorm2d(4), ALIFNode()), "does not run on [T, N, C, *]"),
        (with_hook(), "it has hooks"),
        (with_hook_on_the_neuron(), "has a hook on its input"),
        (Leaking(), "it keeps what it computes as y_seq"),
        (Optional(), "the forward of Optional cannot be traced"),
        (InEvalOnly(), "2 places read its output"),
        (Outer(), "reads its output"),
        (Twice(), "reads its output"),
        # Alone it would take the batch of [T, N, C] for the channels.
        (nn.Sequential(nn.BatchNorm1d(4), alif()), "does not run on [T, N, C, *]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_joined_is_left_and_says_why(net, why):
    attributes = set(vars(net))
    report = sj_taid.fuse_norm(net)
    assert set(vars(net)) == attributes
    assert not report.fused and why in report.kept[0].note and why in str(report)


def test_a_norm_at_the_end_of_a_container_is_found():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    inner = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Sequential(layer.SeqToANNContainer(conv, inner)), nn.Sequential(alif()))
    expected = gradients(copy.deepcopy(net), images())
    (row,) = sj_taid.fuse_norm(net).rows
    assert (row.norm, row.neuron) == ("0.0.1", "1.0")
    assert_like(gradients(net, images()), expected)
    assert sj_taid.fuse_norm(net).kept[0].note == "fused already"


TDBN = pytest.param(
    layer.ThresholdDependentBatchNorm2d,
    marks=pytest.mark.skipif(
        not FUNCTIONAL_STATES, reason="0.0.0.0.14's raises NotImplementedError in its own forward"
    ),
)


@pytest.mark.parametrize("kind", [TDBN, layer.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_are_torchs(kind, training, momentum):
    arguments = (1.0, 0.7, 4) if kind is layer.ThresholdDependentBatchNorm2d else (4,)
    net = nn.Sequential(kind(*arguments, momentum=momentum), alif())
    functional.set_step_mode(net, "m")
    net.train(training)
    fused = copy.deepcopy(net)
    assert sj_taid.fuse_norm(fused).fused
    for x_seq in (images(), 3 * images() + 1):
        assert_like(gradients(fused, x_seq), gradients(net, x_seq))
    assert_like(*({k: v.float() for k, v in m.state_dict().items()} for m in (fused, net)))
    assert fused[0].num_batches_tracked == 2 * training


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_norms_without_parameters_or_statistics(options):
    net = nn.Sequential(layer.BatchNorm2d(4, step_mode="m", **options), alif()).eval()
    fused = copy.deepcopy(net)
    assert sj_taid.fuse_norm(fused).fused
    assert_like(gradients(fused, images()), gradients(net, images()))


def test_step_by_step_after_a_join():
    net = nn.Sequential(norm(), alif()).eval()
    fused = copy.deepcopy(net)
    sj_taid.fuse_norm(fused)
    for each in (net, fused):
        functional.set_step_mode(each, "s")
    for x in images():
        assert torch.equal(net(x), fused(x))


def test_copies_pickles_and_splitting():
    net = nn.Sequential(norm(), alif())
    expected = gradients(copy.deepcopy(net), images())
    sj_taid.fuse_norm(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[1].norm is other[0]
        assert_like(gradients(other, images()), expected)
    sj_taid.unfuse_norm(net)
    assert net[1].norm is None
    assert_like(gradients(net, images()), expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training):
    torch._dynamo.reset()
    folded = layer.SeqToANNContainer(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net = nn.Sequential(norm(), alif(), folded, alif())
    sj_taid.fuse_norm(net.train(training))
    other = copy.deepcopy(net)
    expected = gradients(other, images())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, images())
    assert_like({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)
    assert_like(*({k: v.float() for k, v in m.state_dict().items()} for m in (net, other)))


def test_to_lif_applies_the_norm_by_itself_again():
    net = nn.Sequential(norm(), alif()).eval()
    expected = net(images())
    functional.reset_net(net)
    sj_taid.fuse_norm(net)
    plain = sj_taid.to_lif(net)
    assert type(plain[1]) is neuron.LIFNode and torch.equal(plain(images()), expected)
    assert net[1].norm is net[0]


def test_a_norm_that_is_replaced_is_missed():
    net = nn.Sequential(norm(), alif())
    sj_taid.fuse_norm(net)
    net[0] = norm()  # as convert_sync_batchnorm does, too
    with pytest.raises(RuntimeError, match=r"the norm was replaced.*unfuse_norm"):
        net(images())
    sj_taid.unfuse_norm(net)
    assert len(sj_taid.fuse_norm(net).fused) == 1 and net(images()).shape == images().shape


def reads_error():
    return pytest.raises(RuntimeError, match=r"reads what a batch norm passed on.*unfuse_norm")


def test_fuse_norm_with_the_neuron_replaced():
    net = nn.Sequential(norm(), alif())
    sj_taid.fuse_norm(net)
    held, alone = net[1], copy.deepcopy(net[0])
    for other in (nn.ReLU(), nn.Conv2d(4, 4, 1), neuron.LIFNode(step_mode="m"), alif()):
        net[1] = other
        with reads_error():
            net(images())
    for passed_on in (net[0](images()), alone(images()), net[:1](images())):
        with reads_error():
            passed_on.mean()
        assert passed_on.flatten(0, 1).shape == (6, 4, 5, 5) and len(repr(passed_on)) > 9
    assert held.norm is net[0]
    sj_taid.unfuse_norm(net)
    assert len(sj_taid.fuse_norm(net).fused) == 1 and net(images()).shape == images().shape


def test_fuse_norm_with_the_net_cut():
    net = nn.Sequential(norm(), alif(), nn.ReLU())
    sj_taid.fuse_norm(net)
    for cut in (nn.Sequential(net[0], net[2]), torch.compile(nn.Sequential(net[0], net[2]))):
        with pytest.raises(Exception, match="reads what a batch norm passed on"):
            cut(images())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_fuse_norm_with_gradient_checkpointing(whole, reentrant):
    net = nn.Sequential(norm(), alif())
    expected = gradients(net, images())
    sj_taid.fuse_norm(net)

    def block(x):
        functional.reset_net(net)
        return net(x) if whole else net[1](x)

    def run(x_seq):
        x_seq = x_seq if whole else net[0](x_seq)
        return checkpoint(block, x_seq, use_reentrant=reentrant)

    net.zero_grad()
    assert_like(gradients(net, images(), run), expected)


def test_one_norm_has_one_neuron_and_one_neuron_one_norm():
    first, second, node, other = norm(), norm(), alif(), alif()
    node.apply_norm(first)
    node.apply_norm(second)
    assert not torch.equal(first(images()), images()) and node.norm is second
    with pytest.raises(ValueError, match="applies that norm already"):
        other.apply_norm(second)


def test_an_empty_batch_runs_and_leaves_the_statistics():
    net = nn.Sequential(norm(), alif())
    before = net[0].running_mean.clone()
    sj_taid.fuse_norm(net)
    assert net(torch.rand(3, 0, 4, 5, 5)).shape == (3, 0, 4, 5, 5)
    assert torch.equal(net[0].running_mean, before)


def test_one_value_a_channel_has_no_statistics():
    net = nn.Sequential(norm(), alif())
    sj_taid.fuse_norm(net)
    with pytest.raises(ValueError, match="more than one value per channel"):
        net(torch.rand(1, 1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"norm's weight has shape \[4\]"):
        net(torch.rand(1, 2, 3, 1, 1))
