"""A norm's own forward in training, on a CPU: torch's to rounding, and nowhere less exact."""

import copy

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.nets import test_published_zoo as zoo
from tests.nets.alike import accelerated
from tests.nets.invariant import assert_made_again

pytest.importorskip("numba", reason="needs numba: pip install numba")

from sj_taid import accelerate
from sj_taid.ops.step.cpu import norm as loops

LARGE = 8, 6, 30, 31
#: inputs [M, C, *] that the own norm takes
INPUTS = {
    "images": lambda: torch.randn(LARGE),
    "far from 0": lambda: torch.randn(LARGE) + 1e4,
    "huge": lambda: torch.randn(LARGE) * 1e18,
    "tiny": lambda: torch.randn(LARGE) * 1e-30,
    "an outlier first": lambda: torch.randn(LARGE).index_fill_(0, torch.tensor(0), 3e3),
    "constant": lambda: torch.full(LARGE, 0.3),
    "a channel": lambda: torch.randn(7, 1, 71, 71),
    "many channels": lambda: torch.randn(5, 900, 3, 3),
    "few neighbours": lambda: torch.randn(40, 300, 4),
    "at an odd address": lambda: torch.randn(8 * 6 * 30 * 31 + 1)[1:].view(LARGE),
}


def norms(x, **options):
    """A norm of such an input, and the same accelerated."""
    norm = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1], **options)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 2.0)
    fast = copy.deepcopy(norm)
    accelerated(nn.ModuleList([fast, neuron.LIFNode(step_mode="m")]))
    return norm, fast


def step(norm, x, factors):
    """What two steps in training give: outputs, gradients, running statistics."""
    found = []
    for k in range(2):
        leaf = (x.to(factors.dtype) * (1 + k)).requires_grad_()
        y = norm(leaf.view_as(leaf))
        found += [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], factors)]
    return [t.detach().clone() for t in (*found, *norm.buffers())]


def is_own(y):
    return y._source.is_own


@pytest.mark.parametrize("name", INPUTS)
def test_own_norm_is_no_further_from_float64_than_torchs(name):
    for affine, tracked, momentum in [(True, True, 0.1), (True, True, None), (False, False, 0.1)]:
        x = INPUTS[name]()
        options = {"affine": affine, "track_running_stats": tracked, "momentum": momentum}
        norm, fast = norms(x, **options)
        exact, factors = copy.deepcopy(norm).double(), torch.randn(x.shape)
        found = [
            step(module, x, factors.to(dtype))
            for module, dtype in ((norm, x.dtype), (fast, x.dtype), (exact, torch.double))
        ]
        assert is_own(fast(x.detach().requires_grad_()))
        for torchs, own, right in zip(*found, strict=True):
            assert own.stride() == torchs.stride() and own.dtype == torchs.dtype
            # Torch's error, or that of some roundings of the largest value.
            far, error = ((t.double() - right).abs().max() for t in (torchs, own))
            assert error <= 1.5 * far + 1e-6 * right.abs().max() + 1e-12, (affine, momentum)


def as_dual(norm, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x.cos()))).tangent


def with_grad(norm, x, grad):
    y = norm(x)
    return torch.autograd.grad(y, [x, *norm.parameters()], grad(y))


def untracked(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False
    return norm


#: what is done with a norm and x: gives outputs, gradients, or what hooks were given
USES = {
    "twice": lambda n, x: n(n(x)),
    "in place": lambda n, x: n(x).relu_(),
    "frozen bias": lambda n, x: (n.bias.requires_grad_(False), n(x))[1],
    "no bias": lambda n, x: (setattr(n, "bias", None), n(x))[1],
    "no weight": lambda n, x: (setattr(n, "weight", None), n(x))[1],
    "checkpoint": lambda n, x: checkpoint(n, x, use_reentrant=False),
    "autocast": lambda n, x: torch.autocast("cpu", torch.bfloat16)(n)(x),
    "vmap": lambda n, x: torch.func.vmap(untracked(n))(x.expand(2, *LARGE)),
    "forward mode": as_dual,
    "strided": lambda n, x: n(x.repeat(1, 1, 1, 2)[..., ::2]),
    "expanded": lambda n, x: n(x[:1].expand(LARGE)),
    "a sum": lambda n, x: with_grad(n, x, lambda y: torch.ones(()).expand(LARGE)),
    "a gradient in another order": lambda n, x: with_grad(
        n, x, lambda y: x.detach().cos().contiguous(memory_format=torch.channels_last)
    ),
    "batched gradients": lambda n, x: torch.autograd.grad(
        n(x), [x, *n.parameters()], torch.stack([x, x.cos()]).detach(), is_grads_batched=True
    ),
}


@pytest.mark.parametrize("name", USES)
def test_an_own_norm_is_used_as_torchs(name):
    x, found = torch.randn(LARGE), []
    for norm in norms(x):
        leaf = x.clone().requires_grad_()
        given = USES[name](norm, leaf)
        y, *others = given if isinstance(given, tuple) else (given,)
        results = [y, *(o for other in others for o in (other if type(other) is list else [other]))]
        wanted = [t for t in (leaf, *norm.parameters()) if t.requires_grad]
        if y.requires_grad:
            (y * x.cos()).sum().backward()
            results += [t.grad for t in wanted]
        found.append([None if t is None else t.detach() + 0 for t in (*results, *norm.buffers())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def read_changed(norm, x, tensor):
    y = norm(x)
    with torch.no_grad():
        tensor.add_(1)
    y.sum().backward()


#: what torch refuses
REFUSED = {
    "x changed": lambda n, x: read_changed(n, z := x * 1, z),
    "the weight changed": lambda n, x: read_changed(n, x, n.weight),
    "backward twice": lambda n, x: [y.sum().backward() for y in [n(x)] * 2],
    "no running mean": lambda n, x: (setattr(n, "running_mean", None), n(x)),
    "an eps of 0": lambda n, x: (setattr(n, "eps", 0.0), n(x)),
    "a weight in float64": lambda n, x: (
        setattr(n, "weight", nn.Parameter(n.weight.double())),
        n(x),
    ),
    "a weight of another size": lambda n, x: (setattr(n.weight, "data", torch.ones(5)), n(x)),
    "statistics of another size": lambda n, x: (setattr(n, "running_mean", torch.ones(5)), n(x)),
    "an axis too few": lambda n, x: n(x.flatten(2)),
    "another number of channels": lambda n, x: n(x.flatten(0, 1).unsqueeze(0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_raises_torchs_error(name):
    x, errors = torch.randn(LARGE), []
    for norm in norms(x):
        with pytest.raises((RuntimeError, ValueError)) as error:
            REFUSED[name](norm, x.clone().requires_grad_())
        errors.append((type(error.value), str(error.value).partition(" is at version")[0]))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["Spikformer", "SpikingUNet", "SEWResNet"])
def test_published_net_trains_alike_on_own_norms(name, monkeypatch):
    ran, run = [], loops._run
    monkeypatch.setattr(loops, "LEAST", 0)
    monkeypatch.setattr(loops, "LEAST_INNER", 1)
    monkeypatch.setattr(loops, "_run", lambda *a, **options: (ran.append(a), run(*a, **options))[1])
    zoo.test_published_net_trains_alike(name, "training")
    assert ran


def test_a_report_says_that_an_own_norm_rounds():
    x = torch.rand(2, 4, *LARGE[1:])
    apart = "computed apart: read by sigmoid"
    for given, note in ((x, f"equal outputs to rounding; {apart}"), (x[..., :9], apart)):
        net = nn.Sequential(layer.BatchNorm2d(6, step_mode="m"), nn.Sigmoid())
        net.append(neuron.LIFNode(step_mode="m"))
        report = accelerate(net, given.clone().requires_grad_())
        assert report.rows[0].note == note


def test_second_derivatives_are_torchs():
    x, found = torch.randn(LARGE), []
    for norm in norms(x):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *norm.parameters()]
        grad = torch.autograd.grad(norm(leaf).square().sum(), leaf, create_graph=True)[0]
        found.append(torch.autograd.grad((grad * x.cos()).sum(), inputs[:2]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_threads_change_no_bit():
    x, before = torch.randn(LARGE), torch.get_num_threads()
    _, fast = norms(x)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            net = copy.deepcopy(fast)
            results.append([net(x.clone().requires_grad_()).detach(), *net.buffers()])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (3, 1, 4, 5)])
def test_what_is_not_finite_shows_as_in_torchs(place, value):
    x = torch.randn(LARGE)
    x[place] = value
    found = []
    for norm in norms(x):
        y = norm(x.clone().requires_grad_())
        found.append([y.detach(), norm.running_mean, norm.running_var])
    for torchs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("folds", [True, False])
def test_an_own_output_is_made_again_to_the_bit(folds, affine):
    x = torch.randn(LARGE)
    fast = layer.BatchNorm2d(6, affine=affine, step_mode="m" if folds else "s")
    accelerated(nn.ModuleList([fast, neuron.LIFNode(step_mode="m")]))
    for p in fast.parameters():
        nn.init.uniform_(p, 0.5, 2.0)
    y = fast((x.unflatten(0, (4, 2)) if folds else x).requires_grad_())
    assert is_own(y) and y._recipe.of(y) is not None
    assert_made_again(y)


def test_the_sign_of_zero_is_made_again():
    _, fast = norms(torch.ones(LARGE))
    fast.bias = None
    nn.init.constant_(fast.weight, -1.0)
    y = fast(torch.ones(LARGE, requires_grad=True))
    recipe = y._recipe.of(y)
    assert torch.equal(recipe.make(*recipe.saved).signbit(), y.detach().signbit())


def with_strided_weight(norm):
    norm.weight = nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    return norm


#: what the own norm leaves to torch's: how the norm and its input change
LEFT = {
    "channels last": lambda n, x: (n, x.contiguous(memory_format=torch.channels_last)),
    "small": lambda n, x: (n, x[..., :20, :20].contiguous()),
    "few neighbours": lambda n, x: (n, x.reshape(-1, 6, 3, 1)),
    "a strided weight": lambda n, x: (with_strided_weight(n), x),
    "half precision": lambda n, x: (n, x.bfloat16()),
    "float64": lambda n, x: (n.double(), x.double()),
    "evaluation": lambda n, x: (n.eval(), x),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torchs_norm_is_its_to_the_bit(name):
    found = []
    x = torch.randn(LARGE)
    for norm in norms(x):
        norm, leaf = LEFT[name](norm, x.clone())
        found.append([norm(leaf.requires_grad_()).detach(), *norm.buffers()])
    assert all(map(torch.equal, *found))
    assert LEFT["small"](None, x)[1].numel() < loops.LEAST <= x.numel()


@pytest.mark.parametrize("size", [4, 31])  # of the last axis: for torch's norm, and the own one
@pytest.mark.parametrize("momentum", [0.1, None, torch.tensor(0.1)])
@pytest.mark.parametrize("counter", [torch.tensor(0), None, torch.tensor(2.5)])
def test_what_moves_statistics_is_read_as_it_is_now(counter, momentum, size):
    x, found = torch.randn(*LARGE[:3], size), []
    for norm in norms(x):
        norm.momentum, norm.num_batches_tracked = copy.deepcopy((momentum, counter))
        for _ in range(3):
            y = norm(x.clone().requires_grad_())
            if isinstance(momentum, torch.Tensor):
                norm.momentum.mul_(2)
            norm.eps *= 100
        found.append([y.detach(), *norm.buffers()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
