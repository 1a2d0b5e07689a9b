"""swap_neurons and to_lif: equal outputs on SpikingJelly's own nets, everything else kept."""

import math

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from sj_taid import ALIFNode, swap_neurons, to_lif
from sj_taid._internal import compat
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.helpers import default_dtype
from tests.zoo import ZOO, build

needs_2 = pytest.mark.skipif(
    not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 has no such module; 2.x does"
)

LIF, PLIF = neuron.LIFNode, neuron.ParametricLIFNode
NETS = {"sew_resnet": LIF, "spikformer": PLIF, "mnist_net": neuron.IFNode}


def run(net, x):
    functional.reset_net(net)
    torch.manual_seed(0)  # the masks of dropout
    return net(x)


@pytest.mark.parametrize("name", sorted(NETS.keys() & {*ZOO}))
def test_swap_zoo_net_has_equal_outputs_and_trains(name):
    kind = NETS[name]
    net, x = build(name, kind)
    before, before_eval = run(net, x).detach(), run(net.eval(), x).detach()
    assert before.abs().sum() > 0, "the net is silent, so equal outputs would prove nothing"
    report = swap_neurons(net)
    assert len(report.rows) >= 4 and all(row.done for row in report.rows)
    assert not any(type(module) is kind for module in net.modules())
    assert torch.equal(run(net, x), before_eval)
    after = run(net.train(), x)
    assert torch.equal(after, before)
    functional.reset_net(net)
    plain = to_lif(net)
    assert not any(isinstance(module, ALIFNode) for module in plain.modules())
    assert torch.equal(run(plain, x), before)
    after.square().sum().backward()
    for path, parameter in net.named_parameters():
        if kind is neuron.IFNode and path.endswith(".w"):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("v_reset", [-0.25, None])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", [4.0 / 3.0, 16.0, 50.0, 128.0, math.inf])
def test_swap_any_tau_gives_equal_spikes_and_close_voltages(tau, decay_input, v_reset):
    options = {"v_threshold": 0.7, "v_reset": v_reset, "step_mode": "m"}
    is_if = tau == math.inf
    node = neuron.IFNode(**options) if is_if else neuron.LIFNode(tau, decay_input, **options)
    net, kind = nn.Sequential(node), type(node)
    x = torch.randn(8, 16, 64) + 0.5
    spikes, v = net(x), node.v
    net[0].reset()
    (row,) = swap_neurons(net).rows
    # These inputs meet no threshold to the last bit, so rounding moves no spike.
    assert torch.equal(net(x), spikes)
    exact = tau in (16.0, math.inf)  # no float32 w has the sigmoid 1/128
    equal = "equal outputs" if exact else "equal outputs to rounding"
    equal += ", w frozen: no leak" if is_if else ""
    assert row.note.startswith(f"{equal}, v_threshold >= ")
    bound = 0.0 if exact else 1e-5
    torch.testing.assert_close(net[0].v, v, rtol=bound, atol=bound)
    back = to_lif(net)  # in the middle of a sequence
    assert type(back[0]) is kind and (torch.equal(back(x), net(x)) or not exact)
    if tau == 4.0 / 3.0:  # where -log(tau - 1) rounds to a neighbour of 3/4
        assert net[0].w.sigmoid().item() == 0.75


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({}, [True, True, False]),
        ({"learn_threshold": False}, [True, True, False]),
        ({"learn_tau": False}, [False, False, False]),
    ],
)
def test_swap_freezes_parameters_and_says_how_many_an_optimizer_made_before_lacks(options, learned):
    net = nn.Sequential(LIF(), PLIF(), PLIF())
    net[2].w.requires_grad_(False)
    held = {*torch.optim.SGD(net.parameters()).param_groups[0]["params"]}
    report = swap_neurons(net, **options)
    assert [node.w.requires_grad for node in net] == learned
    assert all(node.v_threshold.requires_grad != ("learn_threshold" in options) for node in net)
    lacks = sum(p.requires_grad and p not in held for p in net.parameters())
    assert report.new_parameters == lacks
    line = f"{lacks} learned parameters are new: make the optimizer after the swap"
    assert line in str(report) and "are new" not in str(swap_neurons(net))


def test_swap_and_to_lif_keep_options_hooks_and_optimisers():
    options = {
        "decay_input": False,
        "v_reset": -0.1,
        "surrogate_function": surrogate.PiecewiseQuadratic(alpha=3.0),
        "detach_reset": True,
        "step_mode": "m",
        "store_v_seq": True,
    }
    node = neuron.ParametricLIFNode(init_tau=4.0, v_threshold=0.6, **options).eval()
    node.set_reset_value("v", 0.25)
    node.reset()
    node.gain = 2.0  # which a net may read
    w, net, calls = node.w, nn.Sequential(nn.Identity(), node), []
    handle = node.register_forward_hook(lambda *args: calls.append("forward"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    swap_neurons(net, min_v_threshold=0.1, backend="torch")
    alif = net[1]
    assert {name: getattr(alif, name) for name in options} == options
    assert (alif.v, alif.min_v_threshold, alif.backend) == (0.25, 0.1, "torch")
    assert vars(alif).keys() - vars(ALIFNode()).keys() == {"gain", "_taid_name"}
    assert alif.w is w is optimizer.param_groups[0]["params"][0]
    x_seq = torch.rand(3, 2)
    alif(x_seq)
    assert calls == ["forward"] and alif.v_seq.shape == (3, 2)
    handle.remove()
    alif.reset()
    with torch.no_grad():
        alif.v_threshold.fill_(0.05)  # below its bound: 0.1 is in force
    plain = to_lif(alif)
    assert type(plain) is neuron.LIFNode and not alif.training and not plain.training
    assert (plain.tau, plain.v, plain.v_threshold) == (4.0, 0.25, pytest.approx(0.1))
    assert vars(plain).keys() - vars(neuron.LIFNode()).keys() == {"gain"}
    copied = plain.surrogate_function
    assert copied is not options["surrogate_function"] and copied.alpha == 3.0
    assert {n: getattr(plain, n) for n in options} == options | {"surrogate_function": copied}
    assert torch.equal(plain(x_seq), alif(x_seq)) and calls == ["forward"]
    alif.reset()
    assert alif.v == 0.25


@pytest.mark.parametrize(
    ("v_threshold", "v_reset", "options", "bound"),
    [
        (1.0, 0.0, {}, 0.01),
        (0.5, -0.5, {}, -0.49),
        (2.0, None, {}, 0.02),
        (1.0, 0.0, {"min_v_threshold": None}, None),
        (1.0, 0.0, {"learn_threshold": False}, None),
        (-1.0, 0.0, {}, None),  # as it already was
    ],
)
def test_swap_keeps_thresholds_above_the_reset(v_threshold, v_reset, options, bound):
    net = nn.Sequential(neuron.LIFNode(v_threshold=v_threshold, v_reset=v_reset))
    (row,) = swap_neurons(net, **options).rows
    assert net[0].min_v_threshold == pytest.approx(bound)
    assert row.note.endswith("equal outputs" if bound is None else f", v_threshold >= {bound}")
    with torch.no_grad():
        net[0].v_threshold.fill_(-3.0)
    assert net[0](torch.zeros(1, 1)).item() == (0.0 if bound else 1.0)


def test_whatever_holds_a_neuron_has_its_alif():
    class Net(nn.Module):
        shared = neuron.LIFNode()

        def forward(self, x):
            return self.called(x)

    net = Net()
    net.node = node = net.shared
    net.called, held = (lambda x: node(x)), {"set": {node}, "tuple": (node, [node])}
    functional.reset_net(net)
    swap_neurons(net)
    assert type(node) is ALIFNode and net.node is net.shared is node and node in held["set"]
    net(torch.rand(2, 3)).sum().backward()
    assert node.w.grad is not None
    functional.reset_net(net)
    assert node.v == 0.0 and swap_neurons(node).rows[0].note.startswith("already ALIF")


def test_a_net_compiled_before_runs_what_was_swapped_in():
    torch.compiler.reset()
    net, x = nn.Sequential(nn.Linear(2, 3), neuron.LIFNode()), torch.rand(4, 2)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    functional.reset_net(net)
    swap_neurons(compiled)
    compiled(x).sum().backward()
    assert net[1].v_threshold.grad is not None


class SlowLIF(neuron.LIFNode):
    slow_tau = 4.0

    def __init__(self):
        super().__init__(tau=4.0)


def subclass(**methods):
    return type("Own", (neuron.LIFNode,), methods)()


def with_(node, **values):
    """A neuron with attributes of these values."""
    for name, value in values.items():
        setattr(node, name, value)
    return node


def remembering(node, name):
    """A neuron with another memory."""
    node.register_memory(name, 0)
    return node


KEPT = {
    "a subclass of LIFNode": subclass(forward=lambda self, x: x),
    "it has its own penalty, scale, which": with_(
        subclass(penalty=lambda self: 0.0), scale=nn.ReLU()
    ),
    "it has its own seen, which ALIF": remembering(LIF(), "seen"),
    "its w has the shape [3, 1, 1]": with_(PLIF(), w=nn.Parameter(torch.zeros(3, 1, 1))),
    "it is parametrized": register_parametrization(PLIF(), "w", nn.Identity()),
    "not a LIF, PLIF or IF": neuron.EIFNode(),
    "already ALIF; its backend stays auto": ALIFNode(),
    "declined by filter": neuron.IFNode(),
    "its threshold is a tensor": with_(LIF(), v_threshold=torch.ones(3)),
    "its tau is 1.0": with_(LIF(), tau=1.0),
    "it has its own forward, mask, which": with_(
        LIF(), forward=abs, mask=nn.Parameter(torch.ones(2))
    ),
    "its tau is nan": with_(LIF(), tau=math.nan),
    "its threshold is infinite": LIF(v_threshold=math.inf),
}
if compat.FUNCTIONAL_STATES:
    precision = (torch.float16, "fp32", "fp32")
    KEPT["it has a precision policy"] = with_(LIF(), _neuron_precision=precision)


def test_swap_reports_what_it_keeps_with_the_reason():
    net = nn.Sequential(*KEPT.values(), SlowLIF())
    report = swap_neurons(net, filter=lambda path, node: node is not KEPT["declined by filter"])
    *kept, swapped = report.rows
    for row, (reason, node) in zip(kept, KEPT.items(), strict=True):
        assert row.note.startswith(reason) and not row.done and net[int(row.layer)] is node
    assert swapped.done and type(net[-1]) is ALIFNode and net[-1].tau == 4.0
    assert str(report).startswith(f"1 swapped, {len(KEPT)} left alone\n")
    assert all(reason in str(report) for reason in KEPT)
    swap_neurons(alone := LIF())  # it has no parent
    assert type(alone) is ALIFNode


def test_swap_leaves_the_net_as_it_was_after_an_error():
    net = nn.Sequential(neuron.ParametricLIFNode(), neuron.LIFNode(v_threshold=0.1))
    with pytest.raises(ValueError, match=r"the neuron '1': .*min_v_threshold"):
        swap_neurons(net, min_v_threshold=0.5, learn_tau=False)
    assert type(net[0]) is neuron.ParametricLIFNode and net[0].w.requires_grad


def test_swap_takes_dtype_and_device_of_the_neighbours():
    for linear in (nn.Linear(2, 2).double(), nn.LazyLinear(2, dtype=torch.float64)):
        net = nn.Sequential(linear, LIF(tau=3.0, v_threshold=0.3), neuron.IFNode())
        swap_neurons(net)
        assert net[2].w.sigmoid().item() == 0.0
        assert net[1].w.dtype == net[1].v_threshold.dtype == torch.float64
        assert net[1].w.sigmoid().item() == pytest.approx(1.0 / 3.0, rel=1e-15)
        assert net[1].v_threshold.item() == 0.3
    net = nn.Sequential(nn.Linear(2, 2), plif := PLIF(v_threshold=0.3), LIF(3.0))
    with default_dtype(torch.float64):
        swap_neurons(net)
    assert net[1].w is plif.w and {p.dtype for p in net.parameters()} == {torch.float32}
    net = nn.Sequential(nn.Linear(2, 2, device="meta"), LIF(), nn.Linear(2, 2), LIF())
    swap_neurons(net)
    assert net[1].w.device.type == "meta" and net[3].w.device.type == "cpu"
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 2), LIF(tau=3.0))
        assert "equal outputs" in swap_neurons(net).rows[0].note and net[1].w.is_meta
    net = nn.Sequential(nn.Linear(2, 2).half(), PLIF().half())
    assert "float32, not torch.float16" in swap_neurons(net).rows[0].note
    assert net[1].w.dtype == torch.float32


@pytest.mark.parametrize("kind", [LIF, ALIFNode])
def test_to_lif_copies_a_net_that_keeps_what_it_computes(kind):
    net = nn.Sequential(nn.Linear(3, 4), kind(store_v_seq=True, step_mode="m"))
    hidden = net.hidden = net[0](torch.rand(2, 5, 3))
    net.features = {"all": [hidden]}
    net[1](hidden)
    assert hidden.grad_fn is not None and net[1].v.grad_fn is not None
    plain = to_lif(net)
    assert plain.features["all"][0] is plain.hidden
    for kept, copied in ((hidden, plain.hidden), (net[1].v, plain[1].v)):
        assert torch.equal(copied, kept) and copied.grad_fn is None
    assert plain[0].weight is not net[0].weight


def test_to_lif_names_thresholds_at_the_reset():
    net = nn.ModuleDict({"low": ALIFNode(v_threshold=-0.5), "fine": ALIFNode()})
    with pytest.warns(UserWarning, match="^layers low: .* at or below.*without any") as caught:
        to_lif(net)
    assert [warning.filename for warning in caught] == [__file__]


@needs_2
@pytest.mark.parametrize("tau", [4.0 / 3.0, 1.7])
def test_integer_lif_is_swapped_and_back(tau):
    fires = MultiLevelSpikeCount(3, grad_window=(-0.5, 3.0))
    net = nn.Sequential(neuron.ILIFNode(tau, 0.6, fires, True, "m"))
    x_seq = 2 * torch.randn(5, 3, 7)
    expected = run(net, x_seq)
    report = swap_neurons(net)
    assert net[0].levels == 3 and net[0].min_v_threshold == 0.006
    equal = " to rounding" if tau == 1.7 else ""
    assert report.rows[0].note == f"equal outputs{equal}, v_threshold >= 0.006"
    back = to_lif(net)
    assert type(back[0]) is neuron.ILIFNode and back[0].detach_reset
    assert back[0].surrogate_function.grad_max == 3.0 and back[0].tau == pytest.approx(tau)
    for other in (net, back):
        assert torch.equal(run(other, x_seq), expected)


def changed(name, value, **options):
    """An ALIF with a parameter of this value, or of this in one channel of three."""
    node = ALIFNode(**options)
    with torch.no_grad():
        getattr(node, name).view(-1)[0] = value
    return node


OFF = {"levels": 4, "v_reset": None, "decay_input": False}
REFUSED = {
    "1 taus and 2 thresholds": changed("v_threshold", 0.5, channels=3),
    "2 taus and 1 thresholds": changed("w", 1.0, channels=3),
    "tau or threshold is nan": changed("w", math.nan, channels=3),
    "its tau is 1 to": changed("w", 40.0),
    "tau is infinite, so that": changed("w", -128.0),
    "no ILIFNode" if not compat.INTEGER_LIF else "a finite tau": changed("w", -128.0, **OFF),
    "its own seen, which LIF lacks": remembering(ALIFNode(), "seen"),
    "its own reset, which LIF lacks": with_(ALIFNode(), reset=lambda: None),
    "it is on the meta device": ALIFNode().to("meta"),
    "it has no state": ALIFNode(levels=4, init_tau=None),
    "it divides its counts": ALIFNode(levels=4, v_reset=None, normalize=True),
    "a subclass of ALIFNode": type("Other", (ALIFNode,), {})(),
}


def test_to_lif_names_what_it_cannot_express():
    net = nn.Sequential(*REFUSED.values(), ALIFNode(channels=3))
    with pytest.raises(ValueError, match=f"cannot express {len(REFUSED)} of the neurons") as error:
        to_lif(net)
    for row, reason in zip(str(error.value).splitlines()[2:], REFUSED, strict=True):
        assert reason in row


@needs_2
@pytest.mark.parametrize("decay_input", [True, False])
def test_to_lif_of_a_neuron_that_counts(decay_input):
    """With input that is divided too: then all voltages are tau times as large."""
    options = {"levels": 4, "v_reset": None, "v_threshold": 0.4, "step_mode": "m"}
    net = nn.Sequential(nn.Linear(3, 50), ALIFNode(3.0, decay_input, **options))
    net[1].set_reset_value("v", 0.3)
    functional.reset_net(net)
    x, found = 8 * torch.rand(6, 2, 3, dtype=torch.float64), []
    for half in x.split(3):  # the second from the voltages of the first
        for step in (net.double(), plain := to_lif(net)):
            y = step(leaf := half.clone().requires_grad_())
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            found.append((y.detach(), leaf.grad, *(p.grad for p in step[0].parameters())))
            step.zero_grad()
            functional.detach_net(step)
        assert type(plain[1]) is neuron.ILIFNode
        torch.testing.assert_close(found[-2], found[-1], rtol=1e-5, atol=1e-6)
    functional.reset_net(net)
    functional.reset_net(plain)
    torch.testing.assert_close(plain(x), net(x))
    assert len(found[0][0].unique()) > 3


@needs_2
def test_to_lif_lets_nir_export():
    from spikingjelly.activation_based import nir_exchange

    net = nn.Sequential(
        *(layer.Conv2d(1, 4, 3), ALIFNode(v_threshold=0.25), layer.Flatten()),
        *(layer.Linear(4 * 4 * 4, 5), ALIFNode(init_tau=4.0, v_threshold=0.2)),
    )
    functional.set_step_mode(net, "m")
    x = torch.rand(4, 2, 1, 6, 6)
    expected = net(x)
    with pytest.raises(TypeError, match=r"NIR.*sj_taid\.to_lif\(net\)"):
        nir_exchange.export_to_nir(net, x)
    functional.reset_net(net)
    read = nir_exchange.import_from_nir(nir_exchange.export_to_nir(to_lif(net), x))
    functional.set_step_mode(read, "m")
    spikes = read(x)
    assert torch.equal(spikes[0] if isinstance(spikes, tuple) else spikes, expected)
