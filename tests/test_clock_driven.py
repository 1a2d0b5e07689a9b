"""Old nets: the names, defaults and equations of SpikingJelly 0.0.0.0.12 on both versions."""

import copy
import importlib
import inspect
import pickle
from functools import partial

import pytest
import torch
from spikingjelly import activation_based as today
from torch import nn

import sj_taid
import sj_taid.clock_driven as shim
from sj_taid import ALIFNode, _compat
from sj_taid._compat import FUNCTIONAL_STATES

# Not by import statements, which linters sort in front of sj_taid.clock_driven.
base, encoding, functional, layer, model, neuron, surrogate = (
    importlib.import_module(f"spikingjelly.clock_driven.{name}")
    for name in ("base", "encoding", "functional", "layer", "model", "neuron", "surrogate")
)
cext_neuron = importlib.import_module("spikingjelly.cext.neuron")

MULTI_STEP = (neuron.MultiStepIFNode, neuron.MultiStepLIFNode, neuron.MultiStepParametricLIFNode)
SINGLE_STEP = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)
CEXT = (
    cext_neuron.MultiStepIFNode,
    cext_neuron.MultiStepLIFNode,
    cext_neuron.MultiStepParametricLIFNode,
)


@pytest.mark.parametrize(
    ("old", "names"),
    {
        base: "MemoryModule",
        encoding: "LatencyEncoder PoissonEncoder StatefulEncoder WeightedPhaseEncoder",
        functional: "first_spike_index kaiming_normal_conv_linear_weight kernel_dot_product "
        "multi_step_forward redundant_one_hot reset_net seq_to_ann_forward set_threshold_margin "
        "spike_similar_loss temporal_efficient_training_cross_entropy",
        layer: "Dropout Dropout2d DropConnectLinear ElementWiseRecurrentContainer "
        "LinearRecurrentContainer MultiStepContainer NeuNorm PrintShapeModule SeqToANNContainer "
        "SynapseFilter",
        neuron: "EIFNode LIAFNode QIFNode",
        surrogate: "ATan Erf NonzeroSignLogAbs PiecewiseExp PiecewiseQuadratic QPseudoSpike S2NN "
        "Sigmoid SoftSign SquarewaveFourierSeries atan heaviside sigmoid",
    }.items(),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_name_is_todays(old, names):
    module = importlib.import_module(old.__name__.replace("clock_driven", "activation_based"))
    assert all(getattr(old, name) is getattr(module, name) for name in names.split())


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        *((kind, {"step_mode": "s"}) for kind in SINGLE_STEP),
        *((kind, {"step_mode": "m"}) for kind in MULTI_STEP),
        *((kind, {"step_mode": "m", "surrogate": "ATan", "alpha": 2.0}) for kind in CEXT),
    ],
)
def test_neuron_has_the_defaults_of_then(kind, defaults):
    node = kind()
    expected = {"surrogate": "Sigmoid", "alpha": 4.0, "v_threshold": 1.0, "v_reset": 0.0}
    expected |= {"detach_reset": False} | defaults
    found = {name: getattr(node, name) for name in expected if hasattr(node, name)}
    function = node.surrogate_function
    assert found | {"surrogate": type(function).__name__, "alpha": function.alpha} == expected
    if isinstance(node, neuron.LIFNode):
        assert node.tau == (100.0 if kind in CEXT else 2.0) and node.decay_input
    if isinstance(node, neuron.ParametricLIFNode):
        assert node.w.item() == 0.0 and node.decay_input  # 1/tau = 1/2


@pytest.mark.parametrize("kind", MULTI_STEP)
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("decay_input", [False, True])
def test_neuron_computes_the_documented_equations(kind, v_reset, detach_reset, decay_input):
    leaky = kind is not neuron.MultiStepIFNode
    options = {"v_reset": v_reset, "detach_reset": detach_reset}
    tau = {neuron.MultiStepLIFNode: "tau", neuron.MultiStepParametricLIFNode: "init_tau"}
    if leaky:
        options |= {tau[kind]: 3.0, "decay_input": decay_input}
    node = kind(surrogate_function=surrogate.ATan(), **options)
    x_seq = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)) * 2.0
    x_seq.requires_grad_()

    v, spikes, rest = torch.full((4, 3), v_reset or 0.0), [], v_reset or 0.0
    for x in x_seq:
        if not leaky:
            v = v + x
        elif decay_input:
            v = v + (x - (v - rest)) / 3.0
        else:
            v = v - (v - rest) / 3.0 + x
        spike = surrogate.ATan()(v - 1.0)
        s = spike.detach() if detach_reset else spike
        v = v - s if v_reset is None else (1.0 - s) * v + s * v_reset
        spikes.append(spike)
    expected = torch.stack(spikes)
    weights = torch.linspace(0.5, 1.5, expected.numel()).view_as(expected)
    (gradient,) = torch.autograd.grad((expected * weights).sum() + v.sum(), x_seq)

    out = node(x_seq)
    assert torch.equal(out, expected)
    (found,) = torch.autograd.grad((out * weights).sum() + node.v.sum(), x_seq)
    torch.testing.assert_close(found, gradient)
    node.reset()
    assert node.v == rest
    node.store_v_seq = True
    node(x_seq)
    assert torch.equal(node.v_seq[-1], node.v)


@pytest.mark.parametrize("kind", [*MULTI_STEP, *CEXT])
def test_multi_step_neuron_is_one_of_todays_and_taken(kind):
    single = getattr(neuron, kind.__name__.rpartition("MultiStep")[2])
    plain = getattr(today.neuron, single.__name__)
    net = nn.Sequential(nn.Linear(4, 3), kind(detach_reset=True))
    x_seq = torch.rand(4, 2, 4) * 3.0
    before = net(x_seq)
    functional.reset_net(net)
    assert isinstance(net[1], (single, plain)) and isinstance(net[1], neuron.BaseNode)
    assert _compat.plain_kind(net[1]) is plain and not _compat.added_methods(net[1])
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x_seq), before)
    fast = copy.deepcopy(net)
    assert sj_taid.accelerate(fast).rows[0].done == "fused operator"
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x_seq), before)
    sj_taid.unaccelerate(fast)
    assert type(fast[1]) is kind
    assert sj_taid.swap_neurons(net).changed and type(net[1]) is ALIFNode
    assert isinstance(net[1], neuron.BaseNode)
    torch.testing.assert_close(net(x_seq), before)


def test_surrogate_is_a_module_or_its_name():
    assert neuron.LIFNode(surrogate_function="Erf").surrogate_function.alpha == 2.0
    node = cext_neuron.MultiStepIFNode(surrogate_function="Sigmoid", alpha=3.0)
    assert node.surrogate_function.alpha == 3.0


def test_backend_cupy_is_explained_once():
    shim._check_backend.cache_clear()
    with pytest.warns(UserWarning, match="'cupy' is taken and not used") as caught:
        net = nn.Sequential(neuron.MultiStepLIFNode(backend="cupy"))
        net.append(neuron.MultiStepIFNode(backend="cupy"))
    assert [warning.filename for warning in caught] == [__file__]
    neuron.MultiStepLIFNode(backend="torch", lava_s_cale=64)
    neuron.LIFNode(cupy_fp32_inference=True)
    with pytest.raises(ValueError, match="lava"):
        neuron.MultiStepLIFNode(backend="lava")


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14 has backends")
def test_backend_of_then_is_explained():
    for use in (today.neuron.LIFNode, partial(today.functional.set_backend, nn.Identity())):
        shim._check_backend.cache_clear()
        with pytest.warns(UserWarning, match="'cupy' is taken and not used"):
            use(backend="cupy")


@pytest.mark.parametrize("name", ["Dropout", "Dropout2d"])
def test_multi_step_dropout_is_todays_over_all_steps(name):
    module = getattr(layer, f"MultiStep{name}")()
    assert isinstance(module, getattr(today.layer, name))
    assert module.p == 0.5 and module.step_mode == "m"


@pytest.mark.parametrize(("dims", "shape"), [(1, ()), (1, (5,)), (2, (5, 5)), (3, (5, 5, 2))])
def test_threshold_dependent_norm_is_a_norm_over_time_and_batch(dims, shape):
    norm = getattr(layer, f"MultiStepThresholdDependentBatchNorm{dims}d")(0.7, 1, 3)
    plain = getattr(nn, f"BatchNorm{dims}d")(3)
    assert [*norm.state_dict()] == [*plain.state_dict()]
    x_seq = torch.rand(4, 2, 3, *shape)
    expected = 0.7 * plain(x_seq.flatten(0, 1)).view_as(x_seq)  # alpha v_th is the gain
    torch.testing.assert_close(norm(x_seq), expected)
    assert torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(copy.deepcopy(norm)(x_seq), pickle.loads(pickle.dumps(norm))(x_seq))


def test_temporal_wise_attention_runs():
    attention, x_seq = (
        layer.MultiStepTemporalWiseAttention(T=4, reduction=2),
        torch.rand(4, 2, 3, 5, 5),
    )
    assert attention(x_seq).shape == x_seq.shape


def test_periodic_encoder_gives_a_step_a_call():
    encoder = encoding.PeriodicEncoder(torch.eye(2))
    assert [encoder().tolist() for _ in range(3)] == [[1, 0], [0, 1], [1, 0]]


#: the keys of a checkpoint that 0.0.0.0.12 wrote of ``old_net``
KEYS = [
    *("0.0.weight", "0.0.bias"),
    *(f"0.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    *("0.1.num_batches_tracked", "1.w", "2.0.weight", "2.0.bias", "3.weight", "3.bias"),
    *("3.running_mean", "3.running_var", "3.num_batches_tracked", "6.w"),
]


def old_net():
    return nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
        neuron.MultiStepParametricLIFNode(init_tau=3.0),
        layer.SeqToANNContainer(nn.Conv2d(2, 2, 3)),
        layer.MultiStepThresholdDependentBatchNorm2d(1.0, 1.0, 2),
        neuron.MultiStepLIFNode(),
        layer.MultiStepDropout2d(0.2),
        cext_neuron.MultiStepParametricLIFNode(init_tau=2.0),
    )


def test_checkpoint_of_then_loads():
    state = {key: torch.full_like(value, 2) for key, value in old_net().state_dict().items()}
    assert [*state] == KEYS
    state["6.w"] = state["6.w"].reshape(1)  # cext's was of shape [1]
    net = old_net()
    net.load_state_dict(state)
    assert net[1].w.item() == 2.0 and net[6].w.item() == 2.0


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (model.sew_resnet, "sew_resnet18", {"cnf": "ADD"}),
        (model.spiking_resnet, "spiking_resnet18", {}),
    ],
)
def test_model_is_todays_with_the_arguments_of_then(module, name, options):
    home = importlib.import_module(module.__name__.replace("clock_driven", "activation_based"))
    options = {"num_classes": 5, "surrogate_function": surrogate.ATan(), **options}
    plain = getattr(home, name)(spiking_neuron=neuron.LIFNode, **options).eval()
    single = getattr(module, name)(single_step_neuron=neuron.LIFNode, **options).eval()
    many = getattr(module, f"multi_step_{name}")(
        T=2, multi_step_neuron=neuron.MultiStepLIFNode, **options
    ).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for net in (single, many):
            net.load_state_dict(plain.state_dict())
        steps = torch.stack([plain(x), plain(x)])
        assert torch.equal(torch.stack([single(x), single(x)]), steps)
        out = many(x)
        functional.reset_net(many)
        assert torch.equal(many(torch.stack([x, x])), out)
        torch.testing.assert_close(out, steps)


def test_vgg_has_both_makers():
    assert {"spiking_vgg11_bn", "multi_step_spiking_vgg11_bn"} <= {*vars(model.spiking_vgg)}


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14 computes them as of old")
@pytest.mark.parametrize("name", ["LeakyKReLU", "PiecewiseLeakyReLU", "piecewise_leaky_relu"])
def test_surrogate_that_means_something_else_today_is_absent(name):
    assert hasattr(today.surrogate, name) and not hasattr(surrogate, name)


@pytest.mark.parametrize("name", ["neuron.MultiStepEIFNode", "model.parametric_lif_net", "rnn"])
def test_name_that_is_gone_raises_pythons_own_error(name):
    module, _, last = f"spikingjelly.clock_driven.{name}".rpartition(".")
    with pytest.raises(ImportError, match=last):
        exec(f"from {module} import {last}")
    assert not hasattr(importlib.import_module(module), last)


def test_import_comes_first():
    with pytest.raises(ImportError, match=r"import sj_taid\.clock_driven before"):
        importlib.reload(shim)


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14 calls the hooks")
@pytest.mark.parametrize(
    "kind",
    [neuron.LIFNode, *(getattr(today.neuron, f"{name}Node") for name in ("IF", "AdaptBase"))],
)
@pytest.mark.parametrize("hook", ["neuronal_charge", "neuronal_fire", "neuronal_reset"])
def test_own_lif_with_a_hook_that_nobody_calls_raises(kind, hook):
    what = rf"Own overrides {hook}, which SpikingJelly 2\.x does not call in {kind.__name__}: "
    with pytest.raises(TypeError, match=what):
        type("Own", (kind,), {hook: lambda self, x: None})


# ---- nets of 0.0.0.0.14's activation_based ----


@pytest.mark.parametrize(
    "name", ["AdaptBase", "Base", "EIF", "IF", "Izhikevich", "KLIF", "LIF", "ParametricLIF", "QIF"]
)
def test_neuron_takes_the_backend_of_then(name):
    """By name and by place: behind ``step_mode``, before ``store_v_seq``."""
    kind = getattr(today.neuron, f"{name}Node")
    defaults = [p.default for p in inspect.signature(kind).parameters.values()]
    before = defaults[: -2 if FUNCTIONAL_STATES else -3]  # without step_mode and what follows
    for node in (
        kind(*before, "m", "torch", True),
        kind(*before, "m", "torch", store_v_seq=True),
        kind(*before, step_mode="m", backend="torch", store_v_seq=True),
    ):
        assert node.step_mode == "m" and node.backend == "torch" and node.store_v_seq
    with pytest.raises((ValueError, NotImplementedError)):
        kind(backend="none")


class Leaky(today.neuron.BaseNode):
    """A neuron as nets of 0.0.0.0.14 define their own."""

    def __init__(self, v_threshold=1.0, v_reset=0.0, backend="torch", store_v_seq=False):
        function = today.neuron.surrogate.ATan()
        super().__init__(v_threshold, v_reset, function, True, "m", backend, store_v_seq)
        self.register_memory("calls", 0)

    def neuronal_charge(self, x):
        self.v = 0.5 * self.v + x
        self.calls += 1


class Stepping(Leaky):
    def single_step_forward(self, x):
        self.v_float_to_tensor(x)
        assert self.v.shape == x.shape
        self.neuronal_charge(2.0 * x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike


class Resetting(Leaky):
    def neuronal_reset(self, spike):
        if self.v_reset is None:
            self.v = self.jit_soft_reset(self.v, spike, self.v_threshold)
        else:
            self.v = self.jit_hard_reset(self.v, spike, self.v_reset)


class Both(Stepping):
    def multi_step_forward(self, x_seq):
        return torch.stack([self.single_step_forward(0.5 * x) for x in x_seq])


class Inherits(Both):
    def single_step_forward(self, x):
        return super().single_step_forward(-x)


def test_own_multi_step_forward_of_then_is_called():
    x_seq = torch.rand(5, 2, 3)
    expected = Leaky()(x_seq)  # 0.5 and 2.0
    assert torch.equal(Both()(x_seq), expected) and torch.equal(Inherits()(-x_seq), expected)


@pytest.mark.parametrize("kind", [Leaky, Stepping, Resetting])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_own_neuron_of_then_computes_its_hooks(kind, v_reset, step_mode):
    node = kind(0.5, v_reset, store_v_seq=True)
    x_seq = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    v, spikes, voltages = torch.full((2, 3), v_reset or 0.0), [], []
    for x in x_seq:
        v = 0.5 * v + x * (2.0 if kind is Stepping else 1.0)
        spikes.append((v >= 0.5).float())
        v = v - 0.5 * spikes[-1] if v_reset is None else torch.where(v >= 0.5, v_reset, v)
        voltages.append(v)
    node.step_mode = step_mode
    for _ in range(2):
        out = node(x_seq) if step_mode == "m" else torch.stack([node(x) for x in x_seq])
        torch.testing.assert_close(out, torch.stack(spikes))
        torch.testing.assert_close(node.v, v)
        assert node.calls == len(x_seq)
        if step_mode == "m":
            torch.testing.assert_close(node.v_seq, torch.stack(voltages))
        node.reset()
        assert node.v == (v_reset or 0.0) and node.calls == 0


@pytest.mark.parametrize("node", [today.neuron.LIFNode, today.neuron.ParametricLIFNode])
def test_net_of_then_runs_and_is_accelerated(node):
    fires = node(detach_reset=True, backend="torch", surrogate_function=surrogate.ATan())
    conv, norm = today.layer.Conv2d(2, 2, 3, bias=False), today.layer.BatchNorm2d(2)
    net = nn.Sequential(conv, norm, fires, Leaky())
    functional.set_step_mode(net, "m")
    today.functional.set_backend(net, "torch", instance=node)
    x_seq = torch.rand(4, 2, 2, 5, 5) * 3.0
    out = net(x_seq)
    functional.reset_net(net)
    report = sj_taid.accelerate(net)
    torch.testing.assert_close(net(x_seq), out)
    assert "1 of 2 neurons on the fused operator, 1 of 1 norms ready to be fused" in str(report)
    assert type(pickle.loads(pickle.dumps(net))[3]) is Leaky


def test_own_surrogate_runs_and_is_reported():
    class Triangle(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.save_for_backward(x)
            return surrogate.heaviside(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.relu(1.0 - ctx.saved_tensors[0].abs()), None

    class Own(surrogate.SurrogateFunctionBase):
        def __init__(self, alpha=1.0, spiking=True):
            super().__init__(alpha, spiking)

        @staticmethod
        def spiking_function(x, alpha):
            return Triangle.apply(x, alpha)

    class Many(surrogate.MultiArgsSurrogateFunctionBase):
        def __init__(self, spiking=True):
            super().__init__(spiking)

        def forward(self, x):
            return Triangle.apply(x, 1.0)

    for function in (Own(), Many()):
        net = nn.Sequential(neuron.MultiStepIFNode(surrogate_function=function))
        x_seq = torch.full((1, 1, 1), 0.75, requires_grad=True)
        net(x_seq).sum().backward()
        assert x_seq.grad.item() == 0.75
        assert "derivative of the surrogate" in sj_taid.accelerate(net).rows[0].note
