"""swap_neurons and to_lif: equal outputs on SpikingJelly's own nets, everything else kept."""

import copy
import importlib.util
import math
from unittest import mock

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import (
    parametric_lif_net,
    sew_resnet,
    spiking_resnet,
    spiking_vgg,
)
from torch import nn

from sj_taid import ALIFNode, _compat, swap_neurons, to_lif

needs_2 = pytest.mark.skipif(
    not _compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 has no such module; 2.x does"
)

IMAGES = (2, 2, 3, 32, 32)


def options(kind=neuron.LIFNode):
    # A low threshold, so that spikes reach the last layer of an untrained net.
    return {
        "spiking_neuron": kind,
        "surrogate_function": surrogate.ATan(),
        "detach_reset": True,
        "v_threshold": 0.3,
    }


def narrow_vgg(kind):
    # Its classifier is fixed at 120 million weights, too slow for a test: make it narrower.
    widths = {512 * 7 * 7: 16 * 7 * 7, 4096: 32}

    class Narrow(layer.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(widths.get(inputs, inputs), widths.get(outputs, outputs))

    with mock.patch.object(layer, "Linear", Narrow):
        net = spiking_vgg.SpikingVGG(
            [8, "M", 16, "M"],
            batch_norm=True,
            norm_layer=layer.BatchNorm2d,
            num_classes=10,
            **options(kind),
        )
    for linear in (module for module in net.modules() if isinstance(module, Narrow)):
        nn.init.normal_(linear.weight, std=0.2)  # its own 0.01 silences a classifier this narrow
    return net


def spikformer(kind):
    from spikingjelly.activation_based.model.spikformer import Spikformer

    return Spikformer(
        T=2,
        img_size_h=32,
        img_size_w=32,
        patch_size=4,
        num_classes=10,
        embed_dims=32,
        num_heads=2,
        depths=1,
        **options(kind),
    )


# name -> (a function of the neuron's class, the shape of an input)
ZOO = {
    "spiking_resnet": (
        lambda kind: spiking_resnet.SpikingResNet(
            spiking_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, **options(kind)
        ),
        IMAGES,
    ),
    "sew_resnet": (
        lambda kind: sew_resnet.SEWResNet(
            sew_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, cnf="ADD", **options(kind)
        ),
        IMAGES,
    ),
    "spiking_vgg": (narrow_vgg, IMAGES),
    "parametric_lif_net": (
        lambda kind: parametric_lif_net.MNISTNet(8, **options(kind)),
        (2, 2, 1, 28, 28),
    ),
}
if importlib.util.find_spec("spikingjelly.activation_based.model.spikformer"):
    ZOO["spikformer"] = (spikformer, IMAGES)


def build(name, kind):
    make, shape = ZOO[name]
    net = make(kind)
    functional.set_step_mode(net, "m")
    return net, torch.randn(shape)


def run(net, x):
    functional.reset_net(net)
    torch.manual_seed(0)  # the masks of dropout
    return net(x)


@pytest.mark.parametrize("kind", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode])
@pytest.mark.parametrize("name", ZOO)
def test_zoo_net_has_equal_outputs_and_trains(name, kind):
    net, x = build(name, kind)
    before = run(net, x).detach()
    before_eval = run(net.eval(), x).detach()
    assert before.abs().sum() > 0, "the net is silent, so equal outputs would prove nothing"

    report = swap_neurons(net)

    assert len(report.swapped) >= 4 and not report.kept
    assert not any(type(module) is kind for module in net.modules())
    assert torch.equal(run(net, x), before_eval)
    after = run(net.train(), x)
    assert torch.equal(after, before)

    after.square().sum().backward()
    for path, parameter in net.named_parameters():
        if kind is neuron.IFNode and path.endswith(".w"):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
    torch.optim.SGD(net.parameters(), lr=1e-2).step()
    assert run(net, x).isfinite().all()


@pytest.mark.parametrize("name", ZOO)
def test_trained_zoo_net_has_equal_outputs_as_lif(name):
    net, x = build(name, neuron.LIFNode)
    swap_neurons(net)
    thresholds = [m.v_threshold for m in net.modules() if isinstance(m, ALIFNode)]
    with torch.no_grad():
        for threshold in thresholds:
            threshold.mul_(1.1)
    before = run(net, x)
    assert before.abs().sum() > 0, "the net is silent, so equal outputs would prove nothing"

    functional.reset_net(net)
    plain = to_lif(net)

    assert not any(isinstance(module, ALIFNode) for module in plain.modules())
    assert any(type(module) is neuron.LIFNode for module in plain.modules())
    assert torch.equal(run(plain, x), before)
    assert any(isinstance(module, ALIFNode) for module in net.modules())


@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", [1.25, 4.0 / 3.0, 2.0, 3.0, 4.0, 50.0])
def test_any_tau_gives_equal_spikes_and_close_voltages(tau, decay_input, v_reset):
    node = neuron.LIFNode(tau, decay_input, 0.7, v_reset, step_mode="m")
    net = nn.Sequential(node)
    x = torch.randn(8, 16, 64) + 0.5
    spikes, v = net(x), node.v
    net[0].reset()

    report = swap_neurons(net)

    # These inputs meet no threshold to the last bit, so rounding moves no spike.
    assert torch.equal(net(x), spikes)
    if tau in (2.0, 4.0):
        assert report.rows[0].note == "equal outputs"
        assert torch.equal(net[0].v, v)
    else:
        assert report.rows[0].note == "equal outputs to rounding"
        torch.testing.assert_close(net[0].v, v, rtol=1e-5, atol=1e-5)


def test_w_is_the_nearest_float32():
    # -log(tau - 1) rounds to a sigmoid one unit in the last place away from 3/4.
    net = nn.Sequential(neuron.LIFNode(4.0 / 3.0))
    swap_neurons(net)
    assert net[0].w.sigmoid().item() == 0.75
    assert torch.tensor(-math.log(1.0 / 3.0)).sigmoid().item() != 0.75


def test_everything_else_is_kept():
    surrogate_function = surrogate.PiecewiseQuadratic()
    node = neuron.ParametricLIFNode(
        init_tau=3.0,
        decay_input=False,
        v_threshold=0.6,
        v_reset=-0.1,
        surrogate_function=surrogate_function,
        detach_reset=True,
        step_mode="m",
        store_v_seq=True,
    )
    node.set_reset_value("v", 0.25)
    node.reset()
    node.eval()
    w = node.w
    net = nn.Sequential(nn.Identity(), node)
    calls = []
    handle = node.register_forward_hook(lambda *args: calls.append("forward"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    swap_neurons(net, min_v_threshold=0.1, backend="torch")

    alif = net[1]
    assert isinstance(alif, ALIFNode)
    assert alif.surrogate_function is surrogate_function
    assert (alif.decay_input, alif.v_reset, alif.detach_reset) == (False, -0.1, True)
    assert (alif.step_mode, alif.store_v_seq, alif.training) == ("m", True, False)
    assert (alif.v, alif.min_v_threshold, alif.backend) == (0.25, 0.1, "torch")
    assert alif.w is w, "an optimiser made before the swap must still hold w"
    assert optimizer.param_groups[0]["params"][0] is alif.w
    alif(torch.rand(3, 2))
    assert calls == ["forward"] and alif.v_seq.shape == (3, 2)
    handle.remove()
    alif.reset()
    alif(torch.rand(3, 2))
    assert calls == ["forward"]
    alif.reset()
    assert alif.v == 0.25


def test_voltage_is_kept_in_the_middle_of_a_sequence():
    net = nn.Sequential(neuron.LIFNode(v_threshold=0.8))
    unswapped = copy.deepcopy(net)
    x = torch.rand(4, 5)
    net(x), unswapped(x)
    swap_neurons(net)
    assert torch.equal(net(x), unswapped(x))


def test_shared_module_stays_one_module():
    node = neuron.LIFNode()
    block = nn.Sequential(nn.Linear(3, 3), node)
    net = nn.ModuleDict({"a": block, "b": nn.Sequential(node, nn.Linear(3, 3), node), "c": block})

    report = swap_neurons(net)

    assert net["a"][1] is net["b"][0] is net["b"][2] is net["c"][1]
    assert isinstance(net["a"][1], ALIFNode)
    assert report.rows[0].names == ("a.1", "b.0", "b.2", "c.1")
    assert len(report.rows) == 1


def test_a_swapped_neuron_that_still_runs_warns():
    net = nn.Sequential(neuron.LIFNode())
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("moved with the neuron"))
    old = net[0]
    net.layers = [old]
    swap_neurons(net)
    with pytest.warns(UserWarning, match="a LIFNode runs that swap_neurons.*list") as caught:
        net.layers[0](torch.rand(2, 3))
    assert caught[0].filename == __file__ and not calls


class NoisyLIF(neuron.LIFNode):
    pass


def test_what_is_left_alone_is_reported_with_the_reason():
    threshold = neuron.LIFNode()
    threshold.v_threshold = torch.tensor(1.0)
    untau = neuron.LIFNode()
    untau.tau = 1.0
    net = nn.ModuleDict(
        {
            "subclass": NoisyLIF(),
            "other": neuron.EIFNode(),
            "alif": ALIFNode(),
            "declined": neuron.LIFNode(),
            "threshold": threshold,
            "untau": untau,
            "swapped": neuron.LIFNode(),
        }
    )
    kept = dict(net.items())

    report = swap_neurons(net, filter=lambda path, node: path != "declined")

    reasons = {row.names[0]: row.note for row in report.kept}
    assert "subclass of LIFNode" in reasons["subclass"]
    assert "not a LIF, PLIF or IF" in reasons["other"]
    assert reasons["alif"].startswith("already ALIF; its backend stays auto")
    assert reasons["declined"] == "declined by filter"
    assert "tensor" in reasons["threshold"]
    assert "tau is 1.0" in reasons["untau"]
    assert [row.names for row in report.swapped] == [("swapped",)]
    assert all(net[name] is kept[name] for name in reasons)
    table = str(report)
    assert table.startswith("1 neurons swapped, 6 kept\n") and "declined by filter" in table


@needs_2
def test_precision_policy_is_left_alone():
    net = nn.Sequential(neuron.LIFNode())
    net[0]._neuron_precision = (torch.float16, "fp32", "fp32")
    assert "precision" in swap_neurons(net).kept[0].note


def test_root_cannot_be_replaced():
    report = swap_neurons(neuron.LIFNode())
    assert "nn.Sequential" in report.kept[0].note
    assert "0 neurons" in str(swap_neurons(nn.Linear(1, 1)))


def test_an_error_leaves_the_net_as_it_was():
    net = nn.Sequential(neuron.LIFNode(v_threshold=1.0), neuron.LIFNode(v_threshold=0.1))
    with pytest.raises(ValueError, match=r"the neuron '1': .*min_v_threshold"):
        swap_neurons(net, min_v_threshold=0.5)
    assert all(type(node) is neuron.LIFNode for node in net)
    with pytest.raises(ValueError, match="'torhc' is unknown"):
        swap_neurons(net, backend="torhc")


def test_frozen_parameters():
    net = nn.Sequential(neuron.LIFNode(), neuron.ParametricLIFNode(), neuron.ParametricLIFNode())
    net[2].w.requires_grad_(False)
    swap_neurons(net, learn_threshold=False)
    assert [node.w.requires_grad for node in net] == [True, True, False]
    assert not any(node.v_threshold.requires_grad for node in net)
    net = nn.Sequential(neuron.LIFNode(), neuron.ParametricLIFNode())
    swap_neurons(net, learn_tau=False)
    assert not any(node.w.requires_grad for node in net)


def test_reset_net_finds_the_new_neurons():
    net = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(), nn.Sequential(neuron.LIFNode()))
    old = list(net.modules())  # keeps SpikingJelly's cached references alive
    functional.reset_net(net)
    functional.reset_net(net[2])
    swap_neurons(net)
    net(torch.rand(1, 2))
    functional.reset_net(net[2])
    assert net[2][0].v == 0.0 and isinstance(net[1].v, torch.Tensor)
    functional.reset_net(net)
    assert net[1].v == 0.0
    del old


def test_dtype_and_device_follow_the_neighbours():
    net = nn.Sequential(nn.Linear(2, 2).double(), neuron.LIFNode(tau=3.0))
    swap_neurons(net)
    assert net[1].w.dtype == net[1].v_threshold.dtype == torch.float64
    assert net[1].w.sigmoid().item() == pytest.approx(1.0 / 3.0, rel=1e-15)

    net = nn.Sequential(
        nn.Linear(2, 2, device="meta"), neuron.LIFNode(), nn.Linear(2, 2), neuron.IFNode()
    )
    swap_neurons(net)
    assert net[1].w.device.type == "meta" and net[3].w.device.type == "cpu"

    net = nn.Sequential(nn.Linear(2, 2).half(), neuron.ParametricLIFNode().half())
    report = swap_neurons(net)
    assert net[1].w.dtype == torch.float32
    assert "float32, not torch.float16" in report.rows[0].note


@pytest.mark.parametrize("mode", ["s", "m"])
def test_channels_are_inferred_without_touching_the_net(mode):
    net = nn.Sequential(
        layer.Conv2d(1, 3, 3),
        layer.BatchNorm2d(3),
        neuron.ParametricLIFNode(init_tau=3.0),
        layer.Flatten(),
        layer.Linear(3 * 4 * 4, 7),
        neuron.LIFNode(),
    )
    functional.set_step_mode(net, mode)
    x = torch.rand(2, 1, 6, 6) if mode == "s" else torch.rand(4, 2, 1, 6, 6)
    statistics = net[1].running_mean.clone()
    unswapped = copy.deepcopy(net)

    swap_neurons(net, channels="infer", example_input=x)

    assert torch.equal(net[1].running_mean, statistics) and net[1].training
    assert net[2].w.shape == net[2].v_threshold.shape == (3,)
    assert net[5].w.shape == (7,)
    assert torch.equal(net[2].w, unswapped[2].w.expand(3))
    assert torch.equal(net(x), unswapped(x))


def test_channels_by_mapping_and_function():
    net = nn.Sequential(neuron.LIFNode(), neuron.LIFNode())
    swap_neurons(net, channels={"1": 4})
    assert [node.channels for node in net] == [None, 4]

    net = nn.Sequential(neuron.LIFNode(), neuron.LIFNode())
    swap_neurons(net, channels=lambda path, node: 2 if path == "0" else None)
    assert [node.channels for node in net] == [2, None]

    net = nn.Sequential(neuron.LIFNode())
    with pytest.raises(ValueError, match=r"\['7'\].*\['0'\]"):
        swap_neurons(net, channels={"7": 4})
    with pytest.raises(ValueError, match="needs example_input"):
        swap_neurons(net, channels="infer")
    with pytest.raises(ValueError, match="mapping"):
        swap_neurons(net, channels="all")


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = neuron.LIFNode()
        self.idle = neuron.LIFNode()

    def forward(self, x):
        return self.shared(x).sum() + self.shared(x[:, :2]).sum()


def test_channels_that_cannot_be_inferred_are_reported():
    net = TwoPaths()
    net.shared = functional_free(net.shared)
    report = swap_neurons(net, channels="infer", example_input=(torch.rand(4, 3),))
    notes = {row.names[0]: row.note for row in report.kept}
    assert notes == {
        "shared": "it runs on several numbers of channels",
        "idle": "it does not run on example_input, so its channels are unknown",
    }


@pytest.mark.parametrize("store_v_seq", [False, True])
@pytest.mark.parametrize("kind", [neuron.LIFNode, neuron.ParametricLIFNode])
def test_a_net_that_has_run_is_copied_with_its_voltages(kind, store_v_seq):
    net = nn.Sequential(nn.Linear(3, 4), kind(store_v_seq=store_v_seq), nn.Linear(4, 2), ALIFNode())
    functional.set_step_mode(net, "m")
    net(torch.rand(2, 5, 3))
    assert net[1].v.grad_fn is not None
    plain = to_lif(net)
    assert torch.equal(plain[1].v, net[1].v) and plain[1].v.grad_fn is None
    swap_neurons(net, channels="infer", example_input=torch.rand(2, 7, 3))
    assert net[1].channels == 4 and net[1].v.shape == (5, 4)


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.sn = nn.Linear(3, 4), neuron.LIFNode()

    def forward(self, x):
        self.hidden = self.linear(x)
        return self.sn(self.hidden)


def test_a_net_that_keeps_what_it_computes_is_copied():
    net = Keeping()
    net(torch.rand(5, 3))
    hidden = net.hidden
    swap_neurons(net, channels="infer", example_input=torch.rand(7, 3))
    plain = to_lif(net)
    assert net.hidden is hidden and hidden.grad_fn is not None
    assert torch.equal(plain.hidden, hidden) and plain.hidden.grad_fn is None
    assert plain.linear.weight is not net.linear.weight


def test_numbers_of_channels_are_numbers():
    net = nn.Sequential(nn.Linear(3, 4), neuron.LIFNode())
    for channels in ({"1": "4"}, lambda path, node: "4"):
        with pytest.raises(ValueError, match=r"channels must be None or an integer >= 1, .*'4'"):
            swap_neurons(net, channels=channels)


def functional_free(node):
    """A node that starts from rest at every call, so that its batch may change."""
    node.register_forward_pre_hook(lambda module, inputs: module.reset())
    return node


def test_to_lif_keeps_what_a_lif_node_has():
    node = ALIFNode(
        init_tau=4.0,
        decay_input=False,
        v_threshold=0.2,
        v_reset=None,
        surrogate_function=surrogate.ATan(3.0),
        detach_reset=True,
        step_mode="m",
        store_v_seq=True,
        min_v_threshold=0.1,
    ).eval()
    with torch.no_grad():
        node.v_threshold.fill_(0.05)  # below its bound: 0.1 is in force
    plain = to_lif(node)
    assert type(plain) is neuron.LIFNode
    assert (plain.tau, plain.decay_input, plain.v_reset) == (4.0, False, None)
    assert plain.v_threshold == pytest.approx(0.1)
    assert plain.surrogate_function is not node.surrogate_function
    assert plain.surrogate_function.alpha == 3.0
    assert (plain.detach_reset, plain.step_mode, plain.store_v_seq) == (True, "m", True)
    assert not plain.training
    x = torch.randn(5, 2, 3)
    assert torch.equal(plain(x), node(x))


def test_equal_channels_are_expressible_and_others_are_named():
    equal, thresholds, diverged = (ALIFNode(channels=3) for _ in range(3))
    one, deaf = ALIFNode(), ALIFNode()
    with torch.no_grad():
        thresholds.v_threshold[1] = 0.5
        one.w.fill_(40.0)
        deaf.w.fill_(-128.0)
        diverged.w[2] = math.nan
    assert type(to_lif(nn.Sequential(equal))[0]) is neuron.LIFNode
    net = nn.ModuleDict({"equal": equal, "thresholds": thresholds, "one": one, "deaf": deaf})
    net["diverged"] = diverged
    with pytest.raises(ValueError) as error:
        to_lif(net)
    message = str(error.value)
    assert "1 taus and 2 thresholds" in message and "strict=False" in message
    assert "tau or threshold is nan" in message
    assert "tau is 1" in message and "tau is infinite" in message and "equal" not in message
    with pytest.warns(UserWarning, match="2 thresholds"):
        partly = to_lif(net, strict=False)
    assert type(partly["equal"]) is neuron.LIFNode
    assert type(partly["thresholds"]) is ALIFNode


def test_if_there_and_back():
    net = nn.Sequential(neuron.IFNode(v_threshold=0.4, v_reset=None, step_mode="m"))
    x = torch.rand(6, 2, 3)
    spikes = net(x)
    net[0].reset()
    report = swap_neurons(net)
    assert "frozen" in report.rows[0].note
    assert torch.equal(net(x), spikes)
    functional.reset_net(net)
    back = to_lif(net)
    assert type(back[0]) is neuron.IFNode and torch.equal(back(x), spikes)


@needs_2
def test_nir_export_reads_back(tmp_path):
    from spikingjelly.activation_based import nir_exchange

    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, step_mode="m"),
        neuron.LIFNode(v_threshold=0.3, step_mode="m"),
        layer.Flatten(step_mode="m"),
        layer.Linear(4 * 4 * 4, 5, step_mode="m"),
        neuron.ParametricLIFNode(init_tau=4.0, v_threshold=0.2, step_mode="m"),
    )
    swap_neurons(net)
    with torch.no_grad():
        net[1].v_threshold.fill_(0.25)
    x = torch.rand(4, 2, 1, 6, 6)
    expected = net(x)
    functional.reset_net(net)
    path = tmp_path / "net.nir"

    graph = nir_exchange.export_to_nir(to_lif(net), x, save_path=path)

    import nir

    lif = [node for node in nir.read(path).nodes.values() if isinstance(node, nir.LIF)]
    assert sorted({float(node.v_threshold.flat[0]) for node in lif}) == pytest.approx([0.2, 0.25])
    assert sorted({float(node.tau.flat[0]) for node in lif}) == pytest.approx([2e-4, 4e-4])
    read = nir_exchange.import_from_nir(graph)
    functional.set_step_mode(read, "m")
    spikes = read(x)
    assert torch.equal(spikes[0] if isinstance(spikes, tuple) else spikes, expected)


@needs_2
@pytest.mark.parametrize("mode", ["s", "m"])
def test_nir_export_of_alif_itself_names_to_lif(mode):
    from spikingjelly.activation_based import nir_exchange

    net = nn.Sequential(layer.Linear(4, 5), ALIFNode())
    functional.set_step_mode(net, mode)
    x = torch.rand(2, 3, 4) if mode == "m" else torch.rand(3, 4)
    net(x)  # with a state
    with pytest.raises(TypeError, match=r"NIR.*sj_taid\.to_lif\(net\)"):
        nir_exchange.export_to_nir(net, x)


@needs_2
def test_operation_counters_and_energy_run_on_the_copy():
    from spikingjelly.activation_based import op_counter

    net, x = build("parametric_lif_net", neuron.LIFNode)
    net.eval()
    before = copy.deepcopy(net)
    swap_neurons(net)
    counts = []
    for model in (before, to_lif(net)):
        counter = op_counter.SynOpCounter()
        with op_counter.DispatchCounterMode([counter]), torch.no_grad():
            run(model, x)
        functional.reset_net(model)
        energy = op_counter.estimate_simple_energy(model, (x,)).energy_total_pj
        counts.append((counter.get_total(), energy))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_to_lif_refuses_a_subclass_of_alif():
    class Other(ALIFNode):
        pass

    with pytest.raises(ValueError, match="subclass of ALIFNode"):
        to_lif(torch.nn.Sequential(Other()))
