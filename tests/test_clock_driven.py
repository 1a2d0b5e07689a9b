"""Old nets, in the idioms of published ones, on both versions of SpikingJelly."""

import copy
import importlib
import pickle
from functools import partial

import pytest
import torch
from spikingjelly import activation_based as today
from torch import nn

import sj_taid
import sj_taid.clock_driven as shim
from sj_taid import ALIFNode
from sj_taid._internal.compat import FUNCTIONAL_STATES
from tests.nets.alike import robust

# Not by import statements, which linters sort in front of sj_taid.clock_driven.
encoding, functional, layer, model, neuron, surrogate = (
    importlib.import_module(f"spikingjelly.clock_driven.{name}")
    for name in ("encoding", "functional", "layer", "model", "neuron", "surrogate")
)
cext_neuron = importlib.import_module("spikingjelly.cext.neuron")


def old_net():
    """Names, arguments and calls as in Spikformer's, SEW-ResNet's and tdBN's repositories."""
    return nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
        neuron.MultiStepParametricLIFNode(init_tau=3.0, detach_reset=True, backend="torch"),
        layer.SeqToANNContainer(nn.Conv2d(2, 2, 3)),
        layer.MultiStepThresholdDependentBatchNorm2d(1.0, 1.0, 2),
        neuron.MultiStepLIFNode(surrogate_function=surrogate.ATan(), lava_s_cale=64),
        layer.MultiStepDropout2d(0.2),
        cext_neuron.MultiStepParametricLIFNode(init_tau=2.0, surrogate_function="Sigmoid"),
    )


#: the keys of a checkpoint that 0.0.0.0.12 wrote of it
KEYS = [
    *("0.0.weight", "0.0.bias"),
    *(f"0.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    *("0.1.num_batches_tracked", "1.w", "2.0.weight", "2.0.bias", "3.weight", "3.bias"),
    *("3.running_mean", "3.running_var", "3.num_batches_tracked", "6.w"),
]


def test_an_old_net_trains_loads_its_checkpoint_and_is_accelerated_and_swapped():
    net, x_seq = robust(lambda: (old_net().eval(), torch.rand(4, 2, 1, 8, 8) * 3))
    state = {key: torch.full_like(value, 2) for key, value in net.state_dict().items()}
    assert [*state] == KEYS
    state["6.w"] = state["6.w"].reshape(1)  # cext's was of shape [1]
    copy.deepcopy(net).load_state_dict(state)
    before = net(x_seq)
    functional.reset_net(net)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x_seq), before)
    fast = copy.deepcopy(net)
    assert str(sj_taid.accelerate(fast)).startswith("3 of 3 neurons on the fused operator")
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x_seq), before)
    sj_taid.unaccelerate(fast)
    assert [type(m) for m in fast] == [type(m) for m in net]
    assert [row.done for row in sj_taid.swap_neurons(net).rows] == 3 * ["ALIFNode"]
    assert isinstance(net[1], neuron.BaseNode) and type(net[1]) is ALIFNode
    torch.testing.assert_close(net(x_seq), before)


@pytest.mark.parametrize("name", ("IFNode", "LIFNode", "ParametricLIFNode"))
def test_neurons_have_the_defaults_of_then(name):
    many = f"MultiStep{name}"
    single, multi = getattr(neuron, name)(), getattr(neuron, many)()
    cext = getattr(cext_neuron, many)()
    assert [node.step_mode for node in (single, multi, cext)] == ["s", "m", "m"]
    assert isinstance(multi, type(single)) and isinstance(multi, getattr(today.neuron, name))
    for node, kind, alpha, tau in ((multi, "Sigmoid", 4.0, 2.0), (cext, "ATan", 2.0, 100.0)):
        assert (node.v_threshold, node.v_reset, node.detach_reset) == (1.0, 0.0, False)
        assert type(node.surrogate_function).__name__ == kind
        assert node.surrogate_function.alpha == alpha
        assert getattr(node, "decay_input", True)
        assert getattr(node, "tau", tau) == tau and getattr(node, "w", 0.0) == 0.0
    if name != "IFNode":
        with pytest.raises(TypeError, match=r"decay_input must be True or False, but it is 1\.0"):
            getattr(neuron, name)(2.0, 1.0, 0.0)  # as before decay_input stood there
    erf = getattr(cext_neuron, many)(surrogate_function="Erf", alpha=3.0).surrogate_function
    assert type(erf) is surrogate.Erf and erf.alpha == 3.0


def test_backend_cupy_is_explained_once():
    uses = [neuron.MultiStepLIFNode]
    if FUNCTIONAL_STATES:
        uses += [today.neuron.LIFNode, partial(today.functional.set_backend, nn.Identity())]
    for use in uses:
        shim._check_backend.cache_clear()
        with pytest.warns(UserWarning, match="'cupy' is taken and not used") as caught:
            use(backend="cupy")
            use(backend="cupy")
        assert [warning.filename for warning in caught] == [__file__]
        with pytest.raises(ValueError, match="must be 'torch' or 'cupy', but it is 'lava'"):
            use(backend="lava")


def test_layers_are_todays_in_step_mode_m():
    x_seq = torch.rand(4, 2, 3, 5, 5)
    dropout = layer.MultiStepDropout()
    assert isinstance(dropout, today.layer.Dropout) and dropout.p == 0.5
    assert len(dropout(torch.ones_like(x_seq)).unique(dim=0)) == 1  # one mask for all steps
    norm, plain = layer.MultiStepThresholdDependentBatchNorm2d(0.7, 1, 3), nn.BatchNorm2d(3)
    expected = 0.7 * plain(x_seq.flatten(0, 1)).view_as(x_seq)  # alpha v_th is the gain
    torch.testing.assert_close(norm(x_seq), expected)
    attention = layer.MultiStepTemporalWiseAttention(T=4, reduction=2)
    assert attention(x_seq).shape == x_seq.shape
    assert encoding.PoissonEncoder()(x_seq).unique().tolist() == [0, 1]
    assert layer.SynapseFilter is today.layer.SynapseFilter


def test_nets_take_the_arguments_of_then():
    name, old = "sew_resnet18", model.sew_resnet
    new = importlib.import_module(f"{today.__name__}.model.sew_resnet")
    options = {"num_classes": 5, "surrogate_function": surrogate.ATan(), "cnf": "ADD"}
    plain = getattr(new, name)(spiking_neuron=neuron.LIFNode, **options).eval()
    single = getattr(old, name)(single_step_neuron=neuron.LIFNode, **options).eval()
    options |= {"T": 2, "multi_step_neuron": neuron.MultiStepLIFNode}
    many, x = getattr(old, f"multi_step_{name}")(**options).eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for net in (single, many):
            net.load_state_dict(plain.state_dict())
        steps = torch.stack([plain(x), plain(x)])
        assert torch.equal(torch.stack([single(x), single(x)]), steps)
        torch.testing.assert_close(many(x), steps)  # T steps of an image
    for kind, name in (("spiking_resnet", "spiking_resnet18"), ("spiking_vgg", "spiking_vgg11")):
        assert hasattr(getattr(model, kind), f"multi_step_{name}")


def test_a_name_that_is_gone_raises_pythons_own_error():
    with pytest.raises(ImportError, match="MultiStepEIFNode"):
        from spikingjelly.clock_driven.neuron import MultiStepEIFNode  # noqa: F401
    with pytest.raises(ImportError, match=r"import sj_taid\.clock_driven before"):
        importlib.reload(shim)
    assert not hasattr(encoding, "PeriodicEncoder")  # which gives other spikes today
    assert hasattr(surrogate, "PiecewiseLeakyReLU") != FUNCTIONAL_STATES


# ---- nets of 0.0.0.0.14's activation_based ----


class Leaky(today.neuron.BaseNode):
    """A neuron that passes ``backend`` on by its place."""

    def __init__(self, v_reset=0.0):
        super().__init__(0.5, v_reset, today.neuron.surrogate.ATan(), True, "m", "torch", True)
        self.register_memory("calls", 0)

    def neuronal_charge(self, x):
        self.v = 0.5 * self.v + x
        self.calls += 1


class Stepping(Leaky):
    def single_step_forward(self, x):
        self.v_float_to_tensor(x)
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike

    def neuronal_reset(self, spike):
        soft = self.v_reset is None
        reset = self.jit_soft_reset if soft else self.jit_hard_reset
        self.v = reset(self.v, spike, self.v_threshold if soft else self.v_reset)


@pytest.mark.parametrize("kind", [Leaky, Stepping])
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_own_neurons_compute_their_hooks(kind, v_reset):
    options = {"v_reset": v_reset, "v_threshold": 0.5, "step_mode": "m", "store_v_seq": True}
    lif = today.neuron.LIFNode(tau=2.0, decay_input=False, **options)
    node, x_seq = kind(v_reset), torch.rand(5, 2, 3)
    expected = lif(x_seq)
    for node.step_mode in ("s", "m"):
        out = node(x_seq) if node.step_mode == "m" else torch.stack([node(x) for x in x_seq])
        torch.testing.assert_close((out, node.v), (expected, lif.v))
        assert node.calls == len(x_seq)
        if node.step_mode == "m":
            torch.testing.assert_close(node.v_seq, lif.v_seq)
        node.reset()
        assert node.v == 0.0 and node.calls == 0


class Recurrent(today.base.MemoryModule):
    """As LoRaFBSNet's and dendsn's: a memory that is no neuron's, step by step."""

    def __init__(self):
        super().__init__()
        self.register_memory("y", None)

    def single_step_forward(self, x, scale=1.0):
        self.y = x if self.y is None else scale * x + 0.5 * self.y
        return self.y


class Accumulating(Recurrent):
    def multi_step_forward(self, x_seq):
        return sum(self.single_step_forward(x) for x in x_seq)


def test_a_memory_module_runs_its_steps():
    x_seq = torch.rand(3, 2, 4)
    looped, net, added = Recurrent(), Recurrent(), Accumulating()
    functional.set_step_mode(nn.ModuleList([net, added]), "m")
    expected = torch.stack([looped(x) for x in x_seq])
    assert torch.equal(net(x_seq), expected) and not hasattr(net, "v_seq")
    torch.testing.assert_close(added(x_seq), expected.sum(0))
    functional.reset_net(net)
    assert torch.equal(net(x_seq, scale=2.0)[1], 2.0 * x_seq[1] + 0.5 * x_seq[0])


class Charging:
    def neuronal_charge(self, x):
        self.v = self.v + x


@pytest.mark.skipif(not FUNCTIONAL_STATES, reason="0.0.0.0.14 calls the hooks")
@pytest.mark.parametrize("kind", [neuron.LIFNode, today.neuron.IFNode, today.neuron.AdaptBaseNode])
def test_a_hook_that_nobody_calls_raises(kind):
    for kinds, names in (((kind,), vars(Charging)), ((Charging, kind), {})):
        with pytest.raises(TypeError, match=f"Own overrides neuronal_charge.* in {kind.__name__}:"):
            type("Own", kinds, {**names})
    type("Own", (Charging, today.neuron.SimpleBaseNode), {})


def test_an_old_net_of_14_runs_and_is_accelerated():
    options = 2.0, False, 1.0, 0.0, surrogate.ATan(), True, "m", "torch"
    fires, x_seq = today.neuron.ParametricLIFNode(*options), 3 * torch.rand(4, 2, 2, 5, 5)
    net = nn.Sequential(today.layer.Conv2d(2, 2, 3), fires, Leaky())
    functional.set_step_mode(net, "m")
    today.functional.set_backend(net, "torch", instance=today.neuron.LIFNode)
    assert fires.backend == "torch"
    out = net(x_seq)
    functional.reset_net(net)
    assert "1 of 2 neurons on the fused operator" in str(sj_taid.accelerate(net))
    torch.testing.assert_close(net(x_seq), out)


class Own(surrogate.SurrogateFunctionBase):
    def __init__(self, alpha=3.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(surrogate.ATan.spiking_function)


class Many(surrogate.MultiArgsSurrogateFunctionBase):
    def forward(self, x):
        return surrogate.ATan.spiking_function(x, 3.0)


@pytest.mark.parametrize("function", [Own(), Many(spiking=True)])
def test_own_surrogates_run_and_are_reported(function):
    x_seq, grads = torch.full((1, 1, 1), 0.75, requires_grad=True), []
    for fires in (function, surrogate.ATan(3.0)):
        net = nn.Sequential(neuron.MultiStepIFNode(surrogate_function=fires))
        grads += torch.autograd.grad(net(x_seq).sum(), x_seq)
        note = sj_taid.accelerate(net).rows[0].note
        assert note == "equal outputs"
    torch.testing.assert_close(*grads)
