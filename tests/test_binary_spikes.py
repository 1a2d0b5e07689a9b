"""Nets on zeros and ones: outputs, what each operation reads, and additions by the derivative."""

import copy
import csv
import math

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sj_taid import ALIFNode, accelerate, binary, fresh_state
from sj_taid.counts import split_counts

from . import zoo

INF, NAN = math.inf, math.nan
PRODUCTS = ("convolution", "matmul", "mm", "bmm", "addmm", "baddbmm")


class Call(nn.Module):
    """A function of inputs, and of a weight of this shape."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, *inputs):
        return self.function(*inputs, *self.parameters())


def multi_spike(x):
    """Counts up to 4, divided by 4, as published nets have it."""
    return x.clamp(0, 4).round() / 4


class Watch(TorchDispatchMode):
    """The values in what products of float64 read that is whole; additions count in float32."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in PRODUCTS:
            for t in (t for t in args[:3] if isinstance(t, torch.Tensor)):
                if t.dtype == torch.float64 and t.eq(t.round()).all():
                    self.read |= {*t.unique().tolist()}
        return func(*args, **(kwargs or {}))


def counts(*shape, most=4):
    return torch.randint(0, most + 1, shape).double()


OPERATIONS = {
    "conv2d": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 3, 4)),
    "conv2d, groups": (nn.Conv2d(4, 6, 2, groups=2, dilation=2), (2, 4, 3, 4)),
    "transposed": (nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2), (1, 4, 2, 3)),
    "linear": (nn.Linear(6, 5), (2, 3, 6)),
    "matmul, weight first": (Call(lambda x, w: w @ x, 5, 6), (2, 6, 3)),
    "einsum": (Call(lambda x, w: torch.einsum("tnc,dc->tnd", x, w), 5, 6), (2, 3, 6)),
    "addmm": (Call(lambda x, w: torch.addmm(w[:3], x, w, beta=2, alpha=3), 5, 5), (3, 5)),
    "baddbmm": (Call(lambda x, w: torch.baddbmm(w[0, 0], x, w, alpha=-1), 2, 6, 5), (2, 3, 6)),
    "beta 0": (Call(lambda x, w: torch.baddbmm(w * NAN, x, w, beta=0), 2, 4, 4), (2, 4, 4)),
}


@pytest.mark.parametrize("factor", [1, 0.3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, factor):
    net, shape = OPERATIONS[name]
    net, c = net.double(), counts(*shape)
    with Watch() as watch, binary(net) as report:
        got = net(c * factor)
    torch.testing.assert_close(got, net(c * factor), rtol=1e-12, atol=1e-12)
    dense = copy.deepcopy(net)
    for parameter in dense.parameters():
        nn.init.ones_(parameter)  # a weight of 0 is added, too
    jacobian = torch.autograd.functional.jacobian(dense, c)
    fan_out = jacobian.ne(0).flatten(0, jacobian.dim() - c.dim() - 1).sum(0)
    (row,) = report.rows
    assert (row.levels, row.ones, row.values) == ([4], c.sum(), 4 * c.numel())
    assert (row.additions, row.macs) == ((c * fan_out).sum(), 0)
    assert row.energy_nj == pytest.approx(0.9e-3 * row.additions)
    assert watch.read == {0.0, 1.0} and row.is_spiking and not got.requires_grad


def test_product_of_activations_is_taken_apart_by_both():
    a, b, real = counts(2, 3, 4), counts(2, 4, 5, most=2), torch.rand(2, 4, 5).double()
    for x, y, *expected in (
        (a / 4, b / 2, [4, 2], (a @ b).sum(), 0),
        (a / 4, real, [4, INF], 5 * a.sum(), 0),
        (real.mT, b, [INF, 2], 5 * b.sum(), 0),
        (real.mT, real, [INF, INF], 0, 2 * 5 * 4 * 5),
    ):
        with Watch() as watch, binary(net := Call(torch.matmul)) as report:
            got = net(x, y)
        torch.testing.assert_close(got, x @ y)
        (row,) = report.rows
        assert [row.levels, row.additions, row.macs] == expected
        assert watch.read <= {0.0, 1.0} and row.is_spiking == (INF not in row.levels)


UP_TO_15 = torch.arange(16.0).view(4, 4)
READS = {
    "zeros": (torch.zeros(3, 4), 1),
    "the most": (UP_TO_15, 15),
    "more": (UP_TO_15 + 1, INF),
    "fifteenths": (UP_TO_15 / 15, 15),
    "two and three halves": (torch.tensor([[1.0, 1.5, 0.0, 0.0]]), 3),
    "bfloat16": (UP_TO_15.bfloat16() * 0.3, 15),
    "bfloat16, sevenths": ((torch.tensor([[0.0, 5.0, 3.0, 2.0]]) / 7).bfloat16(), 5),
    "bfloat16, near": (torch.tensor([[0.3, 0.6, 0.91, 1.2]]).bfloat16(), INF),
    "bfloat16, near whole": (torch.tensor([[1.0, 2.0, 3.02, 4.0]]).bfloat16(), INF),
    "one number": (torch.tensor([[0.37]]), INF),
    "one count": (torch.tensor([[3.0]]), 3),
    "negative": (-torch.eye(4), INF),
    "nan": (torch.eye(4) * NAN, INF),
    "nothing": (torch.zeros(0, 4), INF),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name):
    x, levels = READS[name]
    net = nn.Linear(x.shape[1], 3).to(x.dtype)
    with binary(net) as report:
        got = net(x)
    (row,) = report.rows
    assert row.levels == [levels]
    if levels <= 15:
        bound = {torch.float32: 1e-6, torch.bfloat16: 3e-2}[x.dtype]
        torch.testing.assert_close(got, net(x), rtol=bound, atol=bound)
        assert (row.additions, row.macs) == (3 * row.ones, 0)
    else:  # torch's own call
        assert torch.equal(got.nan_to_num(), net(x).nan_to_num())
        assert (row.additions, row.macs) == (0, 3 * x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_real_numbers_are_no_counts(dtype):
    torch.manual_seed(0)
    taken = [split_counts((torch.rand(1, 5) + 0.1).to(dtype)).are_few for _ in range(300)]
    assert not any(taken)


class Own(nn.Module):
    """A function of an input and this module, which has a weight, a buffer and a mask."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("cache", torch.zeros(6, 6))
        self.register_buffer("mask", torch.ones(6, 6).tril())

    def forward(self, x):
        return self.function(x, self)


WRITTEN = {
    "copied": lambda k, x: k.copy_(x),
    "by rows": lambda k, x: [k[i].copy_(row) for i, row in enumerate(x)],
    "out": lambda k, x: torch.mul(x, 1.0, out=k),
    "foreach": lambda k, x: torch._foreach_copy_([k], [x]),
    "data": lambda k, x: k.data.copy_(x),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("inference", [False, True])
def test_buffer_that_an_activation_was_written_into_is_one(how, inference):
    """In each call, since another may have read it before."""
    net = Own(lambda x, net: (WRITTEN[how](net.cache, x), x @ net.cache.t())[1])
    x = counts(6, 6, most=1).float()
    with binary(net) as report, torch.inference_mode(inference):
        for _ in range(2):
            assert torch.equal(net(x), x @ x.t())
    (row,) = report.rows
    assert (row.additions, row.ones) == (2 * (x @ x.t()).sum(), 2 * 2 * x.sum())


FIXED = {
    "mask by hand": lambda x, net: x @ (net.weight * torch.tensor([1.0, 0, 1, 1, 0, 0])),
    "drawn into zeros": lambda x, net: x @ torch.zeros(6, 6).to(x).copy_(net.weight),
    "weights of weights": lambda x, net: x @ (net.weight + net.weight[:, :2] @ net.mask[:2]),
    "spectral norm": lambda x, net: F.linear(x, net.norm.weight),
    "a view of a cache that weights were written into": lambda x, net: (
        x @ net.cache.copy_(net.weight).t()
    ),
    "bool mask, in place": lambda x, net: x @ net.weight.clone().masked_fill_(net.mask == 0, 0),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_is_made_of_weights_is_weights(name):
    net, x = Own(FIXED[name]).eval(), counts(4, 6)
    net.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False))
    net = nn.Sequential(net.double().eval())
    want = net(x)
    with binary(net) as report:
        got = net(x)
    torch.testing.assert_close(got, want.detach())
    (row,) = report.rows
    assert (row.levels, row.additions, row.macs) == ([4], 6 * x.sum(), 0)


@pytest.mark.parametrize("make", [lambda: torch.rand(3, 6).round(), lambda: torch.ones(3, 6)])
def test_input_that_the_net_makes_is_read(make):
    with binary(net := Own(lambda x, net: make() @ net.weight)) as report:
        net(None)
    assert [row.levels for row in report.rows] == [[1]]


class RMSNorm(nn.Module):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt()


#: functions of real numbers x, spikes s and a module, and what is then named
NAMED = {
    "gate": (lambda x, s, net: x * x.sigmoid(), "mul"),
    "in place": (lambda x, s, net: x.clone().mul_(x), "mul_"),
    "divided": (lambda x, s, net: x / (1 + x.abs()), "div"),
    "fused": (lambda x, s, net: torch.addcmul(s, x, x), "addcmul"),
    "glu": (lambda x, s, net: F.glu(x), "glu"),
    "outer, of spikes": (lambda x, s, net: s[..., None] * net.weight, "mul"),
    "by columns": (lambda x, s, net: s[:, :1] * net.weight[0], "mul"),
    "summed": (lambda x, s, net: (s * net.weight[0]).sum(-1), "sum"),
    "averaged": (lambda x, s, net: (x * net.weight[0]).view(-1, 3).mean(1), "mean"),
    "sparse": (lambda x, s, net: s.to_sparse_csr() @ net.weight, "mm of torch.sparse_csr"),
    "bilinear": (lambda x, s, net: F.bilinear(s, s, net.weight[None]), "_trilinear"),
    "by weights": (lambda x, s, net: (x * net.weight[0] + net.weight[1]).sum(-1), None),
    "by one": (lambda x, s, net: (x * net.weight[0, 0]).sum(-1), None),
    "by a mask": (lambda x, s, net: (x * net.mask[0]).sum(-1), None),
    "by spikes": (lambda x, s, net: (x * (1 - s)).sum(-1), None),
    "by a number": (lambda x, s, net: 0.5 * x / 3, None),
    "norm": (lambda x, s, net: net.own(x), None),
    "neuron": (lambda x, s, net: net.node(x), None),
}


@pytest.mark.parametrize("name", NAMED)
def test_products_of_single_values_are_named_where_no_norm_or_neuron_has_them(name):
    function, named = NAMED[name]
    net, s = Own(lambda x, net: function(net.first(x), x, net)), counts(5, 6, most=1).float()
    net.first, net.own, net.node = nn.Linear(6, 6), RMSNorm(), neuron.QIFNode()
    want = net(s).detach()
    functional.reset_net(net)
    with binary(net) as report:
        got = net(s)
    torch.testing.assert_close(got, want)
    operations = [row.operation for row in report.not_spiking]
    assert [*dict.fromkeys(operations)][-1:] == ([f"{named}, not counted"] if named else [])
    assert report.rows[0].levels == [1] and ("not spike-driven" in str(report)) == bool(named)


# ---- nets ----

IMAGES = torch.rand(2, 3, 3, 10, 10, generator=torch.Generator().manual_seed(0)).double()


def conv_net(**options):
    """Seeded; the first convolution reads images."""
    torch.manual_seed(0)
    neurons = [ALIFNode(v_threshold=0.1, v_reset=None, backend="torch", **options) for _ in "12"]
    net = nn.Sequential(
        *(layer.Conv2d(3, 8, 3, padding=1), layer.BatchNorm2d(8), neurons[0]),
        *(layer.MaxPool2d(2), layer.Conv2d(8, 8, 3), layer.BatchNorm2d(8), neurons[1]),
        *(layer.Flatten(), layer.Linear(8 * 9, 4)),
    )
    functional.set_step_mode(net, "m")
    return net.double()


def run(net, x):
    with fresh_state(net):
        return net(x)


@pytest.mark.parametrize("training", [False, True])
def test_net_of_counts(training):
    """The running statistics move once."""
    net, same = (conv_net(levels=4).train(training) for _ in range(2))
    with Watch() as watch, binary(net) as report:
        got = run(net, IMAGES)
    torch.testing.assert_close(got, run(same, IMAGES), rtol=1e-10, atol=1e-10)
    for (name, have), want in zip(net.named_buffers(), same.buffers(), strict=True):
        assert torch.allclose(have, want, rtol=1e-10) and not vars(have), name
    rows = [(row.layer, row.levels) for row in report.rows]
    assert rows == [("0", [INF]), ("3", [4]), ("4", [4]), ("8", [4])] and watch.read == {0.0, 1.0}
    assert "not spike-driven: 3 (max_pool2d_with_indices)" in str(report)


def test_net_of_spikes(tmp_path):
    """Their largest is a spike."""
    with binary(net := conv_net(), samples=2) as report:
        run(net, IMAGES)
    assert [row.layer for row in report.rows] == ["0", "4", "8"]
    assert not report.not_spiking and "spike-driven but for the first input" in str(report)
    report.to_csv(tmp_path / "energy.csv")
    with (tmp_path / "energy.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["layer"] for row in rows] == ["0", "4", "8", "sum"]
    *parts, total = rows
    for name in ("additions", "macs", "energy_nj"):
        values = [float(row[name]) for row in parts]
        assert values == [pytest.approx(getattr(row, name) / 2) for row in report.rows]
        assert float(total[name]) == pytest.approx(sum(values)), name
    assert float(total["energy_nj"]) == pytest.approx(report.energy_nj)
    assert "costs of one sample of 2; " in str(report)
    head, _, *lines = report.to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert [dict(zip(cells[0], line, strict=True)) for line in cells[1:]] == rows


def test_steps_one_by_one_are_summed_in_the_same_rows():
    net = conv_net(levels=4).eval()
    with binary(net) as whole:
        want = run(net, IMAGES)
    functional.set_step_mode(net, "s")
    with binary(net) as steps, fresh_state(net):
        got = torch.stack([net(x) for x in IMAGES])
    torch.testing.assert_close(got, want)
    for have, row in zip(steps.rows, whole.rows, strict=True):
        assert (have.layer, have.levels, have.ones) == (row.layer, row.levels, row.ones)
        assert (have.additions, have.macs) == (row.additions, row.macs)


def test_accelerated_net_has_the_same_report():
    net, x = conv_net(levels=4).float().eval(), IMAGES.float()
    with binary(net) as plain:
        want = run(net, x)
    accelerate(net)
    spikes = net[:3](x.requires_grad_())  # which say how they were made
    with binary(net) as report:
        assert torch.equal(run(net, x), want)
    assert report == plain
    with binary(net[4]) as report:
        net[4](spikes)
    assert report.rows[0].levels == [4]


def test_what_keeps_a_net_from_being_spike_driven_is_listed():
    net = nn.Sequential(
        *(nn.Linear(4, 4), Call(multi_spike), Call(lambda x: 20 * x + 1)),  # above 15
        *(nn.Linear(4, 4), Call(multi_spike)),
        *(Call(lambda x: x + 0.1 * x.cos()), nn.Linear(4, 4), nn.Softmax(-1)),
        Call(lambda x, w: torch.stack([torch.mv(w, row) for row in x]), 4, 4),
    )
    with binary(net) as report:
        nn.Linear(4, 4)(net(UP_TO_15 * 10))  # of another net
    reads = {row.layer: row.cells()[2] for row in report.not_spiking}
    assert reads == dict.fromkeys("3678", "real numbers")
    assert report.rows[-1].operation == "mv, not counted"


def test_what_is_not_counted_is_listed_even_if_it_reads_the_input():
    with binary(net := nn.LSTM(4, 4)) as report:
        net(torch.eye(4))
    assert report.not_spiking == report.rows and "not spike-driven: " in str(report)


def test_attention_of_torch_is_taken_apart():
    """Its fused forms would be whole."""
    layers = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(layers, Call(lambda x: F.scaled_dot_product_attention(x, x, x))).eval()
    x = counts(2, 5, 8).float()
    with binary(net) as report:
        got = net(x)
    torch.testing.assert_close(got, net(x))
    kinds = [(row.layer, row.operation.replace("_safe", "")) for row in report.rows]
    attention = ["bmm", "_softmax", "bmm"]
    assert kinds[:5] == [("0.self_attn", kind) for kind in ("mm", *attention, "addmm")]
    assert kinds[7:] == [("1", kind) for kind in attention]  # after two linear layers
    assert report.not_spiking == report.rows[1:] and report.rows[0].levels == [4]


@pytest.mark.parametrize("how", ["autocast", "inference_mode", "compile"])
def test_under(how):
    net = nn.Sequential(nn.Linear(4, 8), Call(multi_spike), nn.Linear(8, 2))
    x = torch.randn(5, 4) * 3
    called = torch.compile(net, backend="eager") if how == "compile" else net
    with torch.autocast("cpu", torch.bfloat16, how == "autocast"):
        want = net(x)
        with binary(net) as report, torch.inference_mode(how == "inference_mode"):
            got = called(x)
    assert got.dtype == want.dtype
    bound = 3e-2 if how == "autocast" else 1e-6
    torch.testing.assert_close(got, want.detach(), rtol=bound, atol=bound)
    assert [(row.layer, row.levels) for row in report.rows] == [("0", [INF]), ("2", [4])]


def test_scripted_module_counts_as_its_parent_as_it_takes_no_hooks():
    with binary(net := nn.Sequential(torch.jit.script(nn.Linear(4, 4)))) as report:
        net(torch.eye(4))
    assert [(row.layer, row.additions) for row in report.rows] == [("net", 16)]


class Attention(nn.Module):
    """Two products in one layer, of counts up to 4 that are counted up to 2."""

    def __init__(self):
        super().__init__()
        self.node = ALIFNode(init_tau=None, levels=4, step_mode="m")

    def forward(self, x):
        q = self.node(x).transpose(-1, -2).contiguous()
        return self.node(x) @ (q @ x.gt(0.5).to(x.dtype))


def test_products_are_told_apart_in_their_layer_and_name_what_neurons_may_give():
    x = counts(2, 3, 4, 4, most=2)
    with binary(net := Attention(), samples=6) as report:
        net(x), net(x)
    first, second, _ = report._cells()
    assert first[:3] == ("net", "bmm 1", "counts up to 2 of 4 and spikes")
    assert second[:2] == ("net", "bmm 2") and second[2].startswith("counts up to 2 of 4 and ")
    assert len({row.additions for row in report.rows}) == 2  # of both calls together


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda s: torch.cat([s.clone(), s]).unflatten(0, (2, -1))[0], 4),
        (lambda s: nn.functional.max_pool1d(s, 1), 4),
        (lambda s: s.add_(s.gt(1)), None),
        (lambda s: s + s, None),
    ],
)
def test_what_a_neuron_may_give_goes_with_its_values_alone(change, most):
    node = ALIFNode(init_tau=None, levels=4, step_mode="m")
    net = nn.Sequential(node, Call(change), nn.Linear(4, 3).double())
    with binary(net) as report:
        net(counts(2, 3, 4, most=2))
    assert report.rows[-1].most == [most]


def test_nothing_stays_after_an_error():
    net = nn.Sequential(nn.Linear(4, 4), Call(lambda x: x.no_such_name))
    with pytest.raises(AttributeError), binary(net):
        net(torch.eye(4))
    with pytest.raises(ValueError, match="samples"), binary(net, samples=1.5):
        pass
    with binary(net) as report:
        pass
    assert "nothing ran" in str(report)
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    assert net[0](torch.eye(4)).requires_grad


def test_energy_is_that_of_spikingjelly():
    """Without norms, neurons and votes; its sums for the bytes of memory come by as additions."""
    counter = pytest.importorskip("spikingjelly.activation_based.op_counter")
    net, x = zoo.build("mnist_net", neuron.LIFNode)
    others = [nn.modules.batchnorm._BatchNorm, neuron.BaseNode, layer.VotingLayer]
    config = counter.SimpleEnergyConfig(extra_ignore_modules=others)
    estimate = counter.estimate_simple_energy(net.eval(), (x,), config=config)
    additions, macs = counter.ACCounter({}, others), counter.MACCounter({}, others)
    functional.reset_net(net)
    with counter.DispatchCounterMode([additions, macs]), torch.no_grad():
        run(net, x)
    with binary(net) as report:
        run(net, x)
    assert sum(row.macs for row in report.rows) == macs.get_total() == estimate.counts["mac"]
    assert sum(row.additions for row in report.rows) == additions.get_total()
    assert report.energy_nj == pytest.approx(estimate.energy_compute_pj / 1000, rel=2e-3)
