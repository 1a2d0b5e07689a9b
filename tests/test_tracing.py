"""Who reads the output of a norm, and why a norm has no neuron to be fused with."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sj_taid
from sj_taid import ALIFNode
from sj_taid.fusion import is_norm
from sj_taid.tracing import trace
from tests.helpers import trained_norm


def norm():
    return trained_norm(step_mode="m")


def alif():
    return ALIFNode(step_mode="m")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.sn = norm(), alif()


class Guarded(Block):
    """Decides by its input, to refuse it or not, and always pairs the two."""

    def forward(self, x_seq):
        if x_seq.dim() not in (3, 5):
            raise ValueError(f"expected [T, N, C, *], got {x_seq.dim()} axes")
        steps, *_ = x_seq.shape[0], x_seq.ndim
        if x_seq.sum() > 0:
            return self.sn(self.bn(x_seq))
        assert steps > 0
        return self.sn(self.bn(-x_seq))


class Scaling(Block):
    def forward(self, x_seq):
        return self.sn(self.bn(x_seq / float(x_seq.mean())))  # which symbols have not


class Refusing(Block):
    def forward(self, x_seq):
        raise ValueError("not this input")


class Iterating(Block):
    def forward(self, x_seq):
        return torch.stack([self.sn(self.bn(x)) for x in x_seq])


class Asking(Block):
    def forward(self, x_seq):
        while not x_seq.sum() > 0:
            x_seq = 2 * x_seq
        return self.sn(self.bn(x_seq))


class Counting(Block):
    def forward(self, x_seq):
        for bound in range(6):
            if x_seq.sum() > bound:
                x_seq = x_seq - 1
        return self.sn(self.bn(x_seq))


class SkippingInput(Block):
    def forward(self, x_seq):
        return self.sn(self.bn(x_seq) if x_seq.sum() > 0 else x_seq)


class Behind(nn.Module):
    """Its first neuron reads what the module before it gives."""

    def __init__(self):
        super().__init__()
        self.sn, self.fc = alif(), nn.Linear(3, 3)

    def forward(self, x_seq):
        return self.fc(self.sn(x_seq))


class Around(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x_seq):
        return self.body(x_seq)


class Folding(nn.Module):
    """Folds time by itself and by SpikingJelly's function."""

    def __init__(self):
        super().__init__()
        self.bn1, self.sn1, self.bn2, self.sn2 = (
            nn.BatchNorm2d(4),
            alif(),
            nn.BatchNorm2d(4),
            alif(),
        )

    def forward(self, x_seq):
        y_seq = self.sn1(self.bn1(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2]))
        return self.sn2(functional.seq_to_ann_forward(y_seq, [self.bn2]))


class FoldingByName(Folding):
    def forward(self, x_seq):
        y_seq = self.sn1(self.bn1(x_seq.flatten(0, 1)).unflatten(dim=0, sizes=x_seq.shape[:2]))
        return self.sn2(self.bn2(y_seq.flatten(0, 1)).unflatten(0, sizes=(3, -1)))


class CalledTwice(Block):
    def forward(self, x_seq):
        return self.sn(self.bn(self.sn(self.bn(x_seq))))


class Residual(Block):
    def forward(self, x_seq):
        y_seq = self.bn(x_seq)
        return self.sn(y_seq) + y_seq


class ResidualInEval(Block):
    def forward(self, x_seq):
        y_seq = self.bn(x_seq)
        spike_seq = self.sn(y_seq)
        return spike_seq if self.training else spike_seq + y_seq


class Optional(Block):
    def forward(self, x_seq, features=False):
        y_seq = self.bn(x_seq)
        spike_seq = self.sn(y_seq)
        return (spike_seq, y_seq) if features else spike_seq


class Storing(Block):
    """Stores what its norm gives, in containers too."""

    def __init__(self):
        super().__init__()
        self.features, self.seen, self.last = [], {"nothing": 0, "deep": [[]]}, ()
        self.itself = []
        self.itself.append(self.itself)

    def forward(self, x_seq):
        self.y_seq = self.bn(x_seq)
        self.features.append(self.y_seq)
        self.seen["y_seq"] = self.y_seq
        self.seen["deep"][0].append(self.y_seq)
        self.last = (self.y_seq,)
        return self.sn(self.y_seq)


class StoringBelow(Block):
    def forward(self, x_seq):
        self.sn.last = self.bn(x_seq)
        return self.sn(self.sn.last)


class Changing(Block):
    """Changes tensors in place, and its children."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.again, self.cache, self.total = self.calls, {"calls": self.calls}, torch.zeros(2)

    def forward(self, x_seq):
        self.calls += 1
        self.total += self.cache["calls"]
        self.sn.v.zero_()
        self.bn.momentum /= 2
        functional.reset_net(self.sn)
        return self.sn(self.bn(x_seq))


class Tokens(nn.Module):
    """Folds tokens into the batch, too."""

    def __init__(self, unflatten):
        super().__init__()
        self.bn, self.sn, self.unflatten = nn.BatchNorm1d(4), alif(), unflatten

    def forward(self, x_seq):
        return self.sn(self.unflatten(self.bn(x_seq.flatten(0, 2)), x_seq.shape))


class Outer(nn.Module):
    """Reads what a block's norm gives, past the block."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(norm(), alif())

    def forward(self, x_seq):
        return self.block(x_seq) + self.block[0](x_seq)


class HeldTwice(nn.Module):
    def __init__(self):
        super().__init__()
        bn = norm()
        self.held = nn.ModuleList([bn])
        self.block = nn.Sequential(bn, alif())

    def forward(self, x_seq):
        return self.block(x_seq) + self.held[0](x_seq)


class Chance(Block):
    def forward(self, x_seq):
        return self.sn(self.bn(x_seq) if torch.rand(()) < 0.5 else x_seq)


class Odd(layer.BatchNorm2d):
    def forward(self, x_seq):
        return 2 * super().forward(x_seq)


def add_hook(module):
    module.register_forward_hook(print)
    return module


def replaced(block):
    block.forward = lambda x_seq: block.sn(block.bn(x_seq) + x_seq)
    return block


def changed(change):
    net = nn.Sequential(norm(), alif())
    change(*net)
    return net


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Scaling(), "the forward of Scaling cannot be traced"),
        (Refusing(), "the forward of Refusing cannot be traced (ValueError: not this input)"),
        (
            Iterating(),
            "(TraceError: Proxy object cannot be iterated. This can be attempted when [...])",
        ),
        (Asking(), "it has more than 32 branches"),
        (Counting(), "there are more than 32 ways through it"),
        (SkippingInput(), "a ALIFNode reads its output, or another"),
        (CalledTwice(), "called in 2 places"),
        (Residual(), "a function, add, reads its output"),
        (ResidualInEval(), "a function, add, reads its output"),
        (Optional(), "a function, output, reads its output"),
        (Storing(), "it keeps what it computes as features"),
        (StoringBelow(), "it keeps what it computes as an attribute of sn"),
        (
            replaced(Residual()),
            "the forward of Residual cannot be traced (TypeError: its forward was replaced)",
        ),
        (Tokens(lambda x, shape: x.unflatten(0, shape[:3])), "a function, unflatten, reads"),
        (Tokens(lambda x, shape: x.unflatten(0, (2, 3, 4))), "a function, unflatten, reads"),
        (Outer(), "reads its output"),
        (HeldTwice(), "reads its output"),
        (nn.Sequential(norm()), "nothing that can be traced reads its output"),
        (nn.Sequential(Odd(4, step_mode="m"), alif()), "Odd is not known to compute"),
        (nn.Sequential(norm(), neuron.LIFNode(step_mode="m")), "its reader is a LIFNode"),
        (nn.Sequential(norm(), nn.ReLU(), alif()), "its reader is a ReLU"),
        (nn.Sequential(layer.BatchNorm2d(4), ALIFNode()), "does not run on [T, N, C, *]"),
        # Alone it would take the batch of [T, N, C] for the channels.
        (nn.Sequential(nn.BatchNorm1d(4), alif()), "does not run on [T, N, C, *]"),
        (nn.Sequential(add_hook(Around(norm())), alif()), "Around, which it passes, has hooks"),
        (changed(lambda bn, sn: bn.register_forward_hook(print)), "it has hooks"),
        (changed(lambda bn, sn: setattr(bn, "forward", abs)), "its forward was replaced"),
        (changed(lambda bn, sn: sn.register_forward_pre_hook(print)), "a hook on its input"),
        (changed(lambda bn, sn: sn.register_full_backward_hook(print)), "a hook on its input"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_fuse_norm_leaves_alone_and_says_why(net, why):
    attributes = set(vars(net))
    report = sj_taid.fuse_norm(net)
    assert set(vars(net)) == attributes
    assert not report.changed and why in report.kept[0].note and why in str(report)


def test_trace_follows_calls_and_not_registration():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn2, self.sn1, self.bn2, self.bn1 = alif(), alif(), norm(), norm()

        def forward(self, x_seq, skip=None):
            out = self.sn1(self.bn1(x_seq))
            if skip is not None:
                out = out + skip
            return self.sn2(self.bn2(out))

    net = Net()
    traced = trace(net, is_norm)
    assert traced.readers == {net.bn1: net.sn1, net.bn2: net.sn2}
    assert not traced.obstacles


@pytest.mark.parametrize(
    "net",
    [
        Guarded(),
        nn.Sequential(Around(Around(norm())), nn.Sequential(Behind())),
        nn.Sequential(nn.Sequential(layer.SeqToANNContainer(nn.BatchNorm2d(4))), Around(alif())),
        Folding(),
        FoldingByName(),
    ],
    ids=lambda net: type(net).__name__,
)
def test_fuse_norm_follows(net):
    expected, x_seq = copy.deepcopy(net), torch.randn(3, 2, 4, 3, 3)
    report = sj_taid.fuse_norm(net)
    assert report.changed and not report.kept
    got, want = net(x_seq), expected(x_seq)
    assert torch.equal(got, want) and want.unique().numel() > 1


def test_trace_leaves_what_a_forward_stores_as_it_was():
    net = Storing()
    features, seen = net.features, net.seen
    assert "as features, seen, last, y_seq" in next(iter(trace(net, is_norm).obstacles.values()))
    assert (net.features, net.seen, net.last) == ([], {"nothing": 0, "deep": [[]]}, ())
    assert net.features is features and net.seen is seen and not hasattr(net, "y_seq")


def test_trace_leaves_buffers_and_children_as_they_were():
    net = Changing()
    net.sn(torch.rand(2, 1, 4))
    calls, v, momentum = net.calls, net.sn.v.detach().clone(), net.bn.momentum
    assert v.any() and sj_taid.accelerate(net).rows[0].done.startswith("fused into")
    assert net.calls is net.again is net.cache["calls"] is calls
    assert not calls.any() and not net.total.any()
    assert torch.equal(net.sn.v, v) and net.bn.momentum == momentum


def test_trace_of_lazy_modules():
    net = nn.Sequential(nn.LazyBatchNorm2d(), *changed(lambda bn, sn: None))
    assert trace(net, lambda module: module is net[1]).readers == {net[1]: net[2]}


def test_trace_draws_no_random_numbers():
    net = Chance()
    state = torch.get_rng_state()
    trace(net, is_norm)
    assert torch.equal(torch.get_rng_state(), state)
