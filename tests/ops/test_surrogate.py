"""The closed-form derivatives against SpikingJelly's own backward, on the installed version."""

import inspect
import itertools
import math
import re

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn

from sj_taid.ops.surrogate import (
    DERIVATIVES,
    MultiLevelSpikeCount,
    by_name,
    derivative_of,
    unsupported,
)
from tests.helpers import TOLERANCE

# Parameters other than the defaults, by the name of the constructor's argument. alpha is a float32
# number, to which 0.0.0.0.14's LogTailedReLU rounds it.
OTHER: dict[str, object] = {"alpha": 2.75, "beta": 0.4, "w": 0.75, "c": 0.2, "leak": 0.1, "k": 1.5}
OTHER |= {"grad_window": (-0.5, 3.25)}


def modules():
    for kind, changed in itertools.product(DERIVATIVES, (False, True)):
        arguments = {k: v for k, v in OTHER.items() if k in inspect.signature(kind).parameters}
        needed = {"max_spike_count": 4} if kind is MultiLevelSpikeCount else {}
        yield kind(**needed | arguments) if changed else kind(**needed)


def points(module, dtype):
    """A grid that holds zero, every edge of a piecewise derivative and its two neighbours."""
    numbers = [getattr(module, p) for p in DERIVATIVES[type(module)].parameters]
    edges = [0.0, 1.0, *numbers, *(f / n for f, n in itertools.product((0.5, 1), numbers) if n)]
    edges = torch.tensor(edges, dtype=dtype)
    edges = torch.cat([edges, 0.0 - edges])  # never -0.0, which no H - V_th is
    inf = torch.tensor(math.inf, dtype=dtype)
    near = [edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf)]
    return torch.cat([torch.linspace(-4, 4, 801, dtype=dtype), *near])


def spikingjelly_derivative(module, x):
    if isinstance(module, surrogate.NonzeroSignLogAbs):
        # 0.0.0.0.14 passes its arguments as one tuple and raises, but the formula is public.
        return module.backward(torch.ones_like(x), x, module.alpha)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).sum(), x)[0]


@pytest.mark.parametrize(
    "module", list(modules()), ids=lambda m: f"{type(m).__name__}({m.extra_repr()})"
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_derivative_equals_spikingjellys(module, dtype):
    x = points(module, dtype)
    expected = spikingjelly_derivative(module, x)
    name, a, b, _ = derivative_of(module)
    if dtype == torch.float32:
        # The kernels hold the constants in float32: the edges must not move by it.
        a, b = torch.tensor([a, b], dtype=dtype).tolist()
    got = torch.tensor([by_name(name).python(v, a, b) for v in x.tolist()], dtype=dtype)
    tolerance = TOLERANCE[dtype]["value"]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_derivatives_have_names_of_their_own(monkeypatch):
    monkeypatch.setitem(DERIVATIVES, type("ATan", (Steeper,), {}), DERIVATIVES[surrogate.ATan])
    with pytest.raises(ValueError, match="2 classes of DERIVATIVES have the name 'ATan'"):
        by_name("ATan")


class Steeper(surrogate.ATan):
    """A subclass, whose backward may be anything."""


def hooked(register):
    getattr(function := surrogate.ATan(), register)(lambda *_: None)
    return function


@pytest.mark.parametrize(
    ("surrogate_function", "reason"),
    [
        (Steeper(), "the surrogate Steeper is not in"),
        (surrogate.SquarewaveFourierSeries(), "the surrogate SquarewaveFourierSeries is not in"),
        (torch.relu, "is not in"),
        (surrogate.Sigmoid(spiking=False), "spiking=False"),
        (MultiLevelSpikeCount(4, spiking=False), "spiking=False"),
        (hooked("register_forward_hook"), "hooks, which no kernel"),
        (hooked("register_forward_pre_hook"), "hooks, which no kernel"),
        (hooked("register_full_backward_hook"), "hooks, which no kernel"),
        (hooked("register_full_backward_pre_hook"), "hooks, which no kernel"),
        (surrogate.Sigmoid(alpha=nn.Parameter(torch.tensor(4.0))), "alpha .* Parameter"),
        (surrogate.Sigmoid(alpha=torch.tensor(4.0)), "alpha .* Tensor"),
    ],
)
def test_unsupported_says_why_not(surrogate_function, reason):
    assert re.search(reason, unsupported(surrogate_function))
