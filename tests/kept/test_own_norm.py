"""A norm's own forward in training, on a CPU: torch's to rounding, and nowhere less exact."""

import copy

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from tests.nets.alike import accelerated
from tests.nets.invariant import assert_made_again

pytest.importorskip("numba", reason="needs numba: pip install numba")

from sj_taid.ops.step.cpu.norm import LEAST

LARGE = 8, 6, 30, 31
#: inputs [M, C, *] that the own norm takes
INPUTS = {
    "images": lambda: torch.randn(LARGE),
    "far from 0": lambda: torch.randn(LARGE) + 1e4,
    "an outlier first": lambda: torch.randn(LARGE).index_fill_(0, torch.tensor(0), 3e3),
    "constant": lambda: torch.full(LARGE, 0.3),
    "a channel": lambda: torch.randn(7, 1, 71, 71),
    "many channels": lambda: torch.randn(40, 900),
    "few samples": lambda: torch.randn(1, 3, 120, 120),
    "sequence": lambda: torch.randn(9, 40, 130),
    "video": lambda: torch.randn(2, 5, 3, 40, 41),
    "part of a tensor": lambda: torch.randn(9, 6, 30, 31)[1:],
}
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norms(x, **options):
    """A norm of such an input, and the same accelerated."""
    norm = KINDS[x.dim()](x.shape[1], **options)
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
    return y._recipe._is_own


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
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            net = copy.deepcopy(fast)
            results.append([net(x.clone().requires_grad_()).detach(), *net.buffers()])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
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


#: what the own norm leaves to torch's: how the norm and its input change
LEFT = {
    "channels last": lambda n, x: (n, x.contiguous(memory_format=torch.channels_last)),
    "small": lambda n, x: (n, x[..., :20, :20].contiguous()),
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
    assert LEFT["small"](None, x)[1].numel() < LEAST <= x.numel()


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_a_norm_of_another_number_of_channels_is_refused_by_torch(name):
    x = torch.randn(LARGE)
    _, fast = norms(x)
    getattr(fast, name).data = torch.ones(5)
    with pytest.raises(RuntimeError, match="should contain 6 elements"):
        fast(x.requires_grad_())


def test_momentum_and_eps_are_read_as_they_are_now():
    x, found = torch.randn(LARGE), []
    for norm in norms(x):
        norm.momentum = torch.tensor(0.1)
        for _ in range(3):
            y = norm(x.clone().requires_grad_())
            norm.momentum.mul_(2)
            norm.eps *= 100
        found.append([y.detach(), *norm.buffers()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
