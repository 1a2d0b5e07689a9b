"""ALIFNode as a SpikingJelly neuron: modes, state, parameters, precision, errors."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, accelerate
from sj_taid.functional import alif_multi_step
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.helpers import HALF, default_dtype

OPTIONS = [
    {},
    {"v_reset": None, "detach_reset": True},
    {"v_reset": -0.25, "decay_input": False},
    {"channels": 5},
    {"surrogate_function": MultiLevelSpikeCount(4), "v_reset": None, "decay_input": False},
]


def inputs(T=6):
    return torch.randn(T, 3, 5, 4) + 0.6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alif_node_gives_equal_bits_in_every_step_mode(options):
    node, x_seq = ALIFNode(init_tau=1.7, v_threshold=0.6, backend="torch", **options), inputs()
    steps, voltages = zip(*((node(x), node.v) for x in x_seq), strict=True)
    functional.reset_net(node)
    functional.set_step_mode(node, "m")
    node.store_v_seq = True
    sequence = node(x_seq)
    assert 0.05 < sequence.mean() / node.levels < 0.95
    assert torch.equal(node.v_seq, torch.stack(voltages))

    start = node.v_reset or 0.0
    (explicit,), (v_explicit,) = node.multi_step_functional_forward((x_seq,), (start,))
    spikes, states = [], (start,)
    for x in x_seq:
        (spike,), states = node.single_step_functional_forward((x,), states)
        spikes.append(spike)
    for found in (torch.stack(steps), explicit, torch.stack(spikes)):
        assert torch.equal(found, sequence)
    for v in (voltages[-1], v_explicit, states[0]):
        assert torch.equal(v, node.v)


@pytest.mark.filterwarnings("ignore:.*set_step_mode")  # of accelerate in step mode "s"
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(("mode", "normalize"), [("s", False), ("m", True)])
def test_a_neuron_without_state_counts_each_input_alone(mode, normalize, accelerated):
    node = ALIFNode(levels=6, init_tau=None, v_threshold=0.5, normalize=normalize, step_mode=mode)
    if accelerated:
        accelerate(node)
    assert [*node.state_dict()] == ["v_threshold"] and node.tau is None
    for shape in ((4, 2, 5), (3, 7, 6)):  # another batch needs no reset
        x = (3 * torch.randn(shape)).requires_grad_()
        inside = (x / 0.5).clamp(0, 6)
        expected = inside + (inside.round() - inside).detach()
        expected = expected / 6 if normalize else expected
        got, factors = node(x), torch.randn(shape)
        assert torch.equal(got + 0, expected) and node.v == 0.0
        grads = (torch.autograd.grad(y, x, factors)[0] for y in (got, expected))
        torch.testing.assert_close(*grads)
        explicit, states = node.multi_step_functional_forward((x,), (0.0,))
        assert torch.equal(explicit[0] + 0, expected) and states == (0.0,)
    node(x).sum().backward()
    assert node.v_threshold.grad < 0
    assert "tau=None" in repr(node) and ("normalize=True" in repr(node)) == normalize


def test_replicas_share_gradients_but_not_states():
    """What DataParallel does on several GPUs, by hand: replicas hold tensors for parameters."""
    node, x_seq = ALIFNode(channels=5, v_threshold=0.3, step_mode="m"), inputs()
    expected, halves = torch.autograd.grad(node(x_seq).sum(), [*node.parameters()]), []
    v = node.v
    node.reset()
    for half in x_seq.chunk(2, dim=1):
        replica = node._replicate_for_data_parallel()
        for name, parameter in node.named_parameters():
            setattr(replica, name, parameter * 1.0)
        replica(half).sum().backward()
        halves.append(replica.v)
    assert node.v == 0.0 and torch.equal(torch.cat(halves), v)
    torch.testing.assert_close([p.grad for p in node.parameters()], [*expected])


def test_state_dict_holds_parameters_and_loads_plifs():
    plif = neuron.ParametricLIFNode(init_tau=3.5)
    node = ALIFNode()
    node(inputs()[0])
    assert set(node.state_dict()) == {"w", "v_threshold"}
    missing = node.load_state_dict(plif.state_dict(), strict=False).missing_keys
    assert missing == ["v_threshold"]
    assert node.tau.item() == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("channels", "options"), [(None, {}), (5, {}), (5, {"levels": 4, "v_reset": None})]
)
def test_parameters_learn_unless_they_are_frozen(channels, options):
    options |= {"init_tau": 4.0, "v_threshold": 0.7, "channels": channels}
    node, x = ALIFNode(**options), 2 * inputs()[0]
    assert node.w.shape == node.v_threshold.shape == (() if channels is None else (5,))
    torch.testing.assert_close(node.tau, torch.full_like(node.w, 4.0))
    torch.testing.assert_close(node.w, torch.full_like(node.w, -math.log(3.0)))
    node(x).square().sum().backward()
    for parameter in (node.w, node.v_threshold):
        assert parameter.grad.isfinite().all() and parameter.grad.ne(0).all()
    node = ALIFNode(learn_tau=False, learn_threshold=False, **options)
    node(x.requires_grad_()).sum().backward()
    assert node.w.grad is None and node.v_threshold.grad is None
    assert x.grad.abs().sum() > 0


def test_min_v_threshold_lets_the_threshold_recover():
    """At the bound a silent input does not fire, and the gradient leads up alone."""
    node = ALIFNode(channels=5, v_threshold=0.3, min_v_threshold=0.1)
    with torch.no_grad():
        node.v_threshold.copy_(torch.tensor([-1.0, -1.0, 0.1, 1.0, 1.0]))
    assert torch.equal(node.effective_v_threshold, node.v_threshold.clamp(min=0.1))
    assert node(torch.zeros(4, 5)).sum() == 0
    node.effective_v_threshold.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert node.v_threshold.grad.tolist() == [0.0, -1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("channels", "learned", "bound", "warned"),
    [
        (None, 0.05, 0.1, "1.v_threshold=0.05 was loaded, below min_v_threshold=0.1 of this net"),
        (3, -1.0, 0.7, "1.v_threshold=-1 was loaded, below min_v_threshold=0.7 of this net"),
        (None, 0.7, 0.7, None),  # which float32 rounds down
        (None, 0.05, None, None),
    ],
)
def test_a_load_warns_of_a_threshold_below_the_bound(channels, learned, bound, warned):
    node = ALIFNode(step_mode="m", channels=channels, min_v_threshold=bound)
    net = nn.Sequential(nn.Identity(), node)
    accelerate(net)
    state = copy.deepcopy(net.state_dict())
    state["1.v_threshold"].view(-1)[:1] = learned  # of one channel
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.load_state_dict(state)
    assert [str(w.message).partition(", which")[0] for w in caught] == [warned] * bool(warned)
    torch.testing.assert_close(net.state_dict(), state)


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call")  # float16
@pytest.mark.parametrize("dtype", HALF)
def test_half_keeps_float32_parameters_and_state(dtype):
    with default_dtype(dtype):
        net = nn.Sequential(nn.Linear(4, 4), ALIFNode(step_mode="m"))
    spikes = net(inputs().to(dtype))
    assert spikes.dtype == dtype
    node = net[1]
    assert node.w.dtype == node.v_threshold.dtype == node.v.dtype == torch.float32
    net.to(dtype)  # with a live state
    assert node.v.dtype == torch.float32
    assert net.double()[1].w.dtype == torch.float64
    net.to(dtype)
    assert node.w.dtype == node.v_threshold.dtype == node.v.dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_within_a_graph_are_independent(compiled):
    node = ALIFNode(step_mode="m")
    if compiled:
        node.compile(backend="eager", dynamic=False)
    x_seq = inputs()
    node(x_seq)
    twins = copy.deepcopy(node), pickle.loads(pickle.dumps(node))
    assert all(twin.w is not node.w and not twin.v.requires_grad for twin in twins)
    spikes = [each(x_seq) for each in (*twins, node)]
    assert torch.equal(spikes[0], spikes[2]) and torch.equal(spikes[1], spikes[2])


@pytest.mark.filterwarnings("ignore:.* is not fused.* with hooks")
def test_a_hook_on_the_surrogate_is_called_whenever_it_came():
    node, x_seq = ALIFNode(step_mode="m", surrogate_function=surrogate.ATan()), inputs()
    spikes, seen = node(x_seq), []
    handle = node.surrogate_function.register_forward_hook(lambda *_: seen.append(1))
    for calls in (len(x_seq), 0):
        functional.reset_net(node)
        assert torch.equal(node(x_seq), spikes) and len(seen) == calls
        handle.remove()
        seen.clear()


def test_repr_shows_parameters_and_options():
    text = repr(ALIFNode(init_tau=3.0, v_threshold=0.5, channels=2))
    for part in ("tau=3..3", "v_threshold=0.5..0.5", "backend=auto", "channels=2"):
        assert part in text
    assert "tau=?, v_threshold=?" in repr(ALIFNode(channels=3).to("meta"))
    assert "levels=4" in repr(ALIFNode(levels=4, v_reset=None))


def test_alif_node_takes_integers_and_numpy_numbers():
    node = ALIFNode(init_tau=2, v_threshold=1, v_reset=0, step_mode="m")
    x_seq = inputs()
    assert torch.equal(node(x_seq), neuron.ParametricLIFNode(init_tau=2.0, step_mode="m")(x_seq))
    node = ALIFNode(init_tau=np.float32(4), channels=np.int64(3))
    assert node.tau.tolist() == pytest.approx([4.0] * 3) and type(node.channels) is int
    assert ALIFNode(init_tau=9.9e37).tau.isfinite()


def test_alif_node_refuses_a_backend_by_position():
    """As PLIF of 0.0.0.0.14 takes it."""
    with pytest.raises(ValueError, match="store_v_seq must be True or False, but it is 'torch'"):
        ALIFNode(2.0, True, 1.0, 0.0, surrogate.ATan(), False, "m", "torch")


COUNTS = {"levels": 4, "v_reset": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"init_tau": tau}, "init_tau must be .* greater than 1 and less than 1e38")
            for tau in (1.0, 1e300, math.nan, "2")
        ),
        ({"backend": "cudnn"}, "'cudnn' is unknown: expected one of 'auto', 'torch'"),
        ({"channels": 0}, "channels must be an integer >= 1"),
        ({"levels": 0}, "levels must be an integer >= 1"),
        ({"v_threshold": 0.1, "min_v_threshold": 0.2}, "not >= min_v_threshold=0.2"),
        ({"v_threshold": math.nan}, "v_threshold must be a number, but it is nan"),
        ({"min_v_threshold": "a"}, "min_v_threshold must be a number, but it is 'a'"),
        ({"surrogate_function": surrogate.ATan}, r"a function, such as surrogate\.ATan\(\)"),
        ({"v_reset": -math.inf}, "v_reset must be a finite number or None, but it is -inf"),
        ({"init_tau": None}, r"without state .* gives counts alone: take levels"),
        ({"normalize": True}, "normalize=True divides counts: take levels="),
        (COUNTS | {"levels": 16}, "counts to 14 at most, which four bits hold, not to 16"),
        (COUNTS | {"v_reset": 0.0}, "soft reset.*but v_reset=0.0.*take v_reset=None"),
        (COUNTS | {"surrogate_function": surrogate.ATan()}, "leave one of the two out"),
        (COUNTS | {"v_threshold": 0.0}, "v_threshold must be more than 0, but it is 0.0"),
    ],
)
def test_alif_node_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ALIFNode(**options)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x_seq": torch.ones(4, 2).bool()}, TypeError, "floating-point tensor.* torch.bool"),
        ({"x_seq": [[1.0]]}, TypeError, "floating-point tensor.* list"),
        ({"x_seq": torch.ones(0, 3)}, ValueError, r"x_seq must be \[T, N, \*\] with T >= 1"),
        ({"x_seq": torch.ones(1)}, ValueError, r"\[N, \*\] is x\.unsqueeze\(0\)"),
        ({"w": torch.zeros(7)}, ValueError, r" is \[7\] and the input's \[6, 3, 5, 4\]"),
        (
            {"x_seq": torch.ones(4, 5), "w": torch.zeros(5)},
            ValueError,
            r" is \[5\] and the input's",
        ),
        ({"v_threshold": torch.zeros(5, 4)}, ValueError, "a scalar or one value per channel"),
        ({"v_threshold": torch.tensor(1)}, TypeError, "v_threshold must be .* torch.int64"),
        ({"v": None}, TypeError, "v must be a tensor or a number.* None"),
        ({"w": torch.zeros((), device="meta")}, ValueError, r"w is on meta.*net\.to\(device\)"),
    ],
)
def test_a_call_refuses_bad_arguments(changed, error, message):
    good = {"x_seq": inputs(), "v": 0.0, "w": torch.tensor(0.0), "v_threshold": torch.tensor(1.0)}
    with pytest.raises(error, match=message):
        alif_multi_step(**good | changed)
    if changed.keys() == {"x_seq"}:
        with pytest.raises(error, match=message):
            ALIFNode(step_mode="m")(changed["x_seq"])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_surrogate_may_be_a_function_where_another_neurons_is_a_module(backend):
    """What is noted of a class is of all its neurons."""
    x_seq, functions = inputs().requires_grad_(), [surrogate.ATan() for _ in range(2)]
    functions.insert(1, lambda x: surrogate.ATan.spiking_function(x, 2.0))
    found = []
    for function in functions:
        node = ALIFNode(surrogate_function=function, backend=backend)
        found.append(torch.autograd.grad(node(x_seq).sum(), x_seq)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])
