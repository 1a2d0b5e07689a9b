"""``accelerate``: equal outputs and gradients before, with and after; nothing else changes."""

import copy
import itertools
import pickle
import shutil
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sj_taid
from sj_taid import ALIFNode, accelerate, unaccelerate
from sj_taid._internal import graph
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.fused_neuron import Accelerated
from sj_taid.ops import backends
from sj_taid.ops.step import reference
from tests import zoo
from tests.nets.alike import assert_same, count_fused, robust

ATAN = surrogate.ATan()
KINDS = (neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)


def make_net(kinds=KINDS, **options):
    first, second, third = (
        kind(**{"surrogate_function": ATAN, "v_threshold": 0.2} | options) for kind in kinds
    )
    net = nn.Sequential(
        *(layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), first),
        *(layer.Conv2d(4, 4, 3, padding=1), second, layer.MaxPool2d(2)),
        *(layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4), third),
        *(layer.Flatten(), layer.Linear(36, 3)),
    )
    functional.set_step_mode(net, "m")
    return net


def images(steps=4, channels=2, size=6):
    return torch.rand(steps, 2, channels, size, size) * 3


def train(net, x_seq, steps=2, optimizer=None):
    """Outputs, gradients and buffers of some steps of SGD."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    results = []
    for _ in range(steps):
        functional.reset_net(net)
        optimizer.zero_grad()
        torch.manual_seed(0)  # for dropout
        output = net(x_seq)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        (output * weights).sum().backward()
        results += [output.detach(), *(p.grad.clone() for p in net.parameters())]
        results += [buffer.clone() for buffer in net.buffers()]
        optimizer.step()
    return results


def assert_close(got, expected):
    before = 0.0
    for have, want in zip(got, expected, strict=True):
        largest = float(want.detach().abs().max()) if want.numel() else 1.0
        # A bias before a norm has no gradient but rounding, of terms as large as its weight's.
        bound = max(5e-4 * max(1.0, largest), 5e-5 * before)
        torch.testing.assert_close(have, want, rtol=2e-3, atol=bound)
        before = largest


def attributes_of(net):
    return [(type(module), set(vars(module))) for module in net.modules()]


NETS = {
    "own": lambda: (make_net((KINDS[1], ALIFNode, KINDS[2])), images()),
    **{name: partial(zoo.build, name, neuron.LIFNode) for name in zoo.ZOO},
}
#: how many norms are fused in each, and how many there are
NORMS = {
    "own": (2, 2),
    "spiking_resnet": (5, 12),
    "spiking_bottleneck": (9, 17),
    "sew_resnet": (12, 12),
    "sew_bottleneck": (17, 17),
    "mnist_net": (2, 2),
    "cifar10_net": (6, 6),
    "spikformer": (7, 9),
    "maxformer": (7, 20),
    "maxformer_cifar": (5, 18),
    "qkformer": (18, 22),
    "spike_driven": (7, 11),
    "ms_resnet": (5, 13),
    "max_resnet": (2, 9),
    "masnn": (0, 5),
    "att_ms_resnet": (5, 13),
}


#: of each architecture one
FIRST = "own, sew_resnet, mnist_net, spikformer, qkformer, spike_driven, max_resnet, masnn"


@pytest.mark.parametrize(
    "name", [n if n in FIRST.split(", ") else pytest.param(n, marks=pytest.mark.slow) for n in NETS]
)
def test_accelerate_trains_alike_and_unaccelerate_gives_the_net_back(name):
    net, x_seq = robust(NETS[name], passes=train)
    plain = copy.deepcopy(net)
    state, parameters = copy.deepcopy(net.state_dict()), [*net.parameters()]
    before = attributes_of(net)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    expected = train(plain, x_seq)
    report = accelerate(net)
    assert any(row.done == "fused operator" for row in report.rows)
    assert all(have is want for have, want in zip(net.parameters(), parameters, strict=True))
    assert [*net.state_dict()] == [*state]
    assert all(map(torch.equal, net.state_dict().values(), state.values()))
    loaded = copy.deepcopy(net)
    assert_close(train(net, x_seq, optimizer=optimizer), expected)
    norms = sum("Norm" in row.kind for row in report.rows)
    assert (count_fused(copy.deepcopy(net), x_seq), norms) == NORMS[name]
    for have, want in zip(net.modules(), plain.modules(), strict=True):
        if isinstance(have, neuron.BaseNode):
            assert_close([have.v], [want.v])
    net.load_state_dict(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    unaccelerate(net)
    assert attributes_of(net) == before
    accelerate(loaded)  # twice changes nothing
    unaccelerate(loaded)
    assert attributes_of(loaded) == before
    for have, want in zip(train(loaded, x_seq), expected, strict=True):
        assert torch.equal(have, want)


class NamedOutput(nn.Sequential):
    def forward(self, x_seq):
        return {"logits": [super().forward(x_seq)], "nothing": None}


def test_accelerate_measures_on_a_copy():
    net, x_seq = NamedOutput(*make_net()), images().requires_grad_()
    net(x_seq.detach())["logits"][0].sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    buffers, v = [b.clone() for b in net.buffers()], net[2].v
    rng = torch.get_rng_state()
    report = accelerate(net, x_seq)
    assert torch.equal(torch.get_rng_state(), rng) and net[2].v is v and x_seq.grad is None
    assert all(map(torch.equal, grads, (p.grad for p in net.parameters())))
    assert all(map(torch.equal, buffers, net.buffers()))
    before, after = report.saved_bytes
    assert after < 0.5 * before and min(report.step_ms) > 0
    norms = [row.done for row in report.rows if "Norm" in row.kind]
    assert norms == ["fused into 2", "fused into 8"]
    again = accelerate(net, x_seq)
    assert again.saved_bytes == report.saved_bytes
    for lines in (str(report).splitlines(), str(again).splitlines()):
        assert lines[0] == "3 of 3 neurons on the fused operator, 2 of 2 norms fused"
        assert lines[1].startswith("saved for backward")


class Own(neuron.LIFNode):
    def forward(self, x):
        return super().forward(2.0 * x)


class Half(layer.BatchNorm2d):
    def super_forward(self, x):
        return 0.5 * super().super_forward(x)


LEFT = {
    "it overrides forward": Own(),
    "a function of its own": neuron.IFNode(),
    "it runs step by step: functional.set_step_mode": neuron.LIFNode(),
    "no fused operator for torch.float64": neuron.ParametricLIFNode(),
    "its backend is torch": ALIFNode(backend="torch"),
    "it is parametrized": neuron.ParametricLIFNode(),
    "Half is not known to compute torch's batch norm": Half(3),
    "its statistics are taken over all processes": nn.SyncBatchNorm(3),
    "it is parametrized: a norm": nn.BatchNorm2d(3),
}


def test_accelerate_leaves_what_it_cannot_run():
    net = nn.Sequential(*copy.deepcopy([*LEFT.values()]))
    functional.set_step_mode(net, "m")
    net[1].forward, net[2].step_mode = net[1].forward, "s"
    net[3].double()
    nn.utils.parametrize.register_parametrization(net[5], "w", nn.Identity())
    nn.utils.parametrize.register_parametrization(net[8], "weight", nn.Softplus())
    before = attributes_of(net)
    *rows, _ = accelerate(nn.Sequential(*net, neuron.LIFNode(step_mode="m"))).rows
    assert attributes_of(net) == before and not any(row.done for row in rows)
    for row, note in zip(rows, LEFT, strict=True):
        assert row.note.startswith(note.removesuffix(": a norm"))
    nn.utils.parametrize.remove_parametrizations(net[8], "weight")  # raises in a subclass


def test_what_an_accelerated_module_gets_has_names_of_its_own():
    subclasses = []

    class Listed(neuron.LIFNode):
        def __init_subclass__(cls):
            subclasses.append(cls)

    net = nn.Sequential(nn.BatchNorm3d(2), Listed(step_mode="m"))
    plain = copy.deepcopy(net)
    accelerate(net)
    assert not subclasses
    net(torch.randn(4, 2, 3, 8, 8, requires_grad=True)).sum().backward()
    for before, after in zip(plain, net, strict=True):
        assert isinstance(after, Accelerated)
        kind, kinds = type(before), type(after).__mro__
        added = {name for mixin in kinds[: kinds.index(kind)] for name in vars(mixin)}
        added |= vars(after).keys() - vars(before).keys()
        others = {name for name in added if not name.startswith("_taid_")}
        of_modules = {*dir(nn.BatchNorm2d), *dir(neuron.LIFNode), "__weakref__"}
        assert others <= of_modules | {"_fused_backend"}
        assert type(after).__doc__ == kind.__doc__


@pytest.mark.parametrize("x_seq", [torch.tensor([[2], [0], [3]]), torch.tensor([2.0, 0.0, 3.0])])
def test_accelerated_neuron_takes_what_the_plain_one_does(x_seq):
    net = nn.Sequential(neuron.LIFNode(step_mode="m"))
    expected = net(x_seq)
    functional.reset_net(net)
    accelerate(net)
    assert torch.equal(net(x_seq), expected)


def test_accelerated_net_on_meta():
    net = make_net().to("meta")
    accelerate(net)
    assert net(images().to("meta")).shape == make_net()(images()).shape


def test_a_backend_that_is_not_fused_reads_the_norms_values(monkeypatch):
    plain = backends.Backend(reference.multi_step, lambda x_seq: None)
    monkeypatch.setitem(backends.BACKENDS, "mine", lambda: plain)
    net, x_seq = robust(
        lambda: (make_net([partial(ALIFNode, backend="mine")] * 3), images()), passes=train
    )
    other = copy.deepcopy(net)
    accelerate(net)
    assert_close(train(net, x_seq), train(other, x_seq))
    assert count_fused(net, x_seq) == 0


def test_accelerate_raises_before_it_changes_the_net():
    with pytest.raises(ValueError, match="no neuron"):
        accelerate(nn.Linear(1, 1))
    net = make_net()
    before = attributes_of(net)
    with pytest.raises(RuntimeError, match="channels"):
        accelerate(net, torch.rand(4, 2, 3, 6, 6))
    with pytest.raises(TypeError, match="must be a tensor, or a tuple"):
        accelerate(net, example=[images()])
    assert attributes_of(net) == before


def test_accelerated_net_runs_step_by_step():
    net, x_seq = robust(lambda: (make_net().eval(), images()))
    accelerate(net)
    expected = net(x_seq)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert_close([torch.stack([net(x) for x in x_seq])], [expected])


def test_unaccelerate_refuses_what_was_parametrized_since():
    net, x_seq = make_net(), images()
    plain, before = copy.deepcopy(net), attributes_of(net)
    accelerate(net)
    names = (net[1], "weight"), (net[4], "w")
    for module, name in names:
        nn.utils.parametrize.register_parametrization(module, name, nn.Identity())
    changed = attributes_of(net)
    for undo in (unaccelerate, sj_taid.to_lif, partial(accelerate, example=x_seq)):
        with pytest.raises(ValueError, match=r"class of 1, 4 was.*remove_p"):
            undo(net)
    assert attributes_of(net) == changed
    for module, name in names:
        nn.utils.parametrize.remove_parametrizations(module, name)
    unaccelerate(net)
    assert attributes_of(net) == before and torch.equal(net(x_seq), plain(x_seq))


def test_accelerated_net_is_swapped_after_unaccelerate_only():
    net = make_net()
    accelerate(net)
    assert "unaccelerate(net)" in str(sj_taid.swap_neurons(net))
    assert b"sj_taid" not in pickle.dumps(sj_taid.to_lif(net))
    unaccelerate(net)
    assert [row.done for row in sj_taid.swap_neurons(net).rows] == 3 * ["ALIFNode"]


def test_accelerated_neurons_are_named_as_before():
    net = nn.ModuleDict({"a": neuron.LIFNode(step_mode="m"), "b": neuron.LIFNode(step_mode="m")})
    shown, x_seq = repr(net), torch.rand(4, 2, 3, requires_grad=True) + 0.0
    accelerate(net)
    assert repr(net).count("accelerated") == 2
    assert repr(net).replace(", accelerated", "") == shown
    output = net["b"](x_seq)
    x_seq += 1.0
    with pytest.raises(RuntimeError, match=r"the neuron 'b'.*unaccelerate\(net\)"):
        output.sum().backward()


def test_accelerated_voltage_of_another_batch():
    net, x_seq = make_net().eval(), images()
    accelerate(net)
    expected = net(x_seq[:, :1])
    functional.reset_net(net)
    net(x_seq)
    if FUNCTIONAL_STATES:  # as before: it starts again
        assert torch.equal(net(x_seq[:, :1]), expected)
    else:
        with pytest.raises(ValueError, match="reset"):
            net(x_seq[:, :1])


def test_accelerated_net_without_gradients():
    net, x_seq = robust(lambda: (make_net().eval().requires_grad_(False), images()))
    expected = net(x_seq)
    assert accelerate(net, x_seq).saved_bytes == (0, 0)
    modes = torch.enable_grad, torch.no_grad, torch.inference_mode
    for outer, inner in itertools.product(modes, repeat=2):
        functional.reset_net(net)
        with outer(), inner():
            assert_close([net(x_seq)], [expected])
    with torch.inference_mode():
        assert accelerate(make_net(), x_seq).saved_bytes[0] > 0


def compile_in_place(net):
    """Of a net of torch's own class torch compiles each layer's forward by itself."""
    net.compile(backend="aot_eager")
    return net


def compile_blocks(net):
    for block in net[2:]:
        block.compile(backend="aot_eager")
    return net


class Residual(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.shortcut = shortcut
        self.lif = neuron.LIFNode(surrogate_function=ATAN, v_threshold=0.4)
        self.conv, self.bn = layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4)

    def forward(self, x_seq):
        h = self.bn(self.conv(self.lif(x_seq)))
        return h + x_seq if self.shortcut else h


def make_residual_net(shortcut=True):
    net = nn.Sequential(
        *(layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4)),
        *([neuron.LIFNode(v_threshold=0.5)] if shortcut else []),
        *(Residual(shortcut) for _ in range(2)),
    )
    functional.set_step_mode(net, "m")
    return net


#: how an accelerated net is run, and which net; inductor gives convolutions another memory order
#: than the graph was traced with
WRAPPERS = [
    pytest.param(compile_in_place, make_residual_net, id="compiled in place"),
    pytest.param(
        compile_blocks, partial(make_residual_net, shortcut=False), id="a norm's output crosses"
    ),
    pytest.param(
        *(torch.compile, lambda: make_residual_net()[:4]),
        id="inductor",
        marks=pytest.mark.skipif(
            shutil.which("g++") is None, reason="inductor compiles for the CPU with g++"
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "make"), WRAPPERS)
def test_accelerated_net_inside(wrap, make, recwarn):
    torch._dynamo.reset()
    net, x_seq = robust(lambda: (make(), images()))
    expected = train(copy.deepcopy(net), x_seq, 1)
    accelerate(net)
    outputs_and_gradients = slice(1 + len([*net.parameters()]))  # recomputing counts norms twice
    got = train(wrap(net), x_seq.requires_grad_(), 1)
    assert_close(got[outputs_and_gradients], expected[outputs_and_gradients])
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]


def test_saved_bytes_are_those_of_training(monkeypatch):
    """Not those under hooks of others, which sums are not packed for."""
    saved = accelerate(make_residual_net(), images()).saved_bytes
    monkeypatch.setattr(graph, "are_others", lambda hooks: True)
    before, unpacked = accelerate(make_residual_net(), images()).saved_bytes
    assert saved[0] == before and saved[1] < 0.85 * unpacked


class Block(nn.Sequential):
    """What memopt recomputes."""


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14 has no memopt")
def test_accelerate_after_memopt():
    from spikingjelly.activation_based import memopt

    net, x_seq = robust(lambda: (make_net(), images()), passes=train)
    expected = train(copy.deepcopy(net), x_seq)
    net = nn.Sequential(*(Block(*net[i:j]) for i, j in ((0, 3), (3, 5), (5, 9), (9, 11))))
    memopt.optimize_memory(net, Block, lambda net: net(x_seq), level=1)
    accelerate(net)
    assert_close(train(net, x_seq), expected)
    assert count_fused(net, x_seq) == 2


@pytest.mark.parametrize("v_reset", [0.0, None])
def test_a_training_that_diverged_shows(v_reset):
    node = neuron.LIFNode(v_reset=v_reset, step_mode="m", surrogate_function=ATAN)
    plain = nn.Sequential(node)
    x = torch.full((6, 1, 7), 1.5)
    x[1, 0, :3] = x[2, 0, 3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])

    def run(net):
        leaf = x.clone().requires_grad_()
        spikes = net(leaf)
        spikes.sum().backward()
        return spikes.detach() + 0, net[0].v.detach(), leaf.grad[..., 6]

    assert_same(plain, run)
