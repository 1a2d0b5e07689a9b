"""Every operation of a program's text against torch: values, and torch's backward of it."""

import itertools
import math
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from sj_taid.ops.step import read as reading_of
from sj_taid.ops.step.text import EXPRESSIONS
from tests.ops.step import program

NAN, INF = math.nan, math.inf
#: signed zeros, halves for rounding, whole numbers and their neighbours, ends of the range
SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -1.5, -2.5, 2.0, -2.0, 3.0, -3.0, 1e-3, -1e-3),
    *(1.0 + 2**-23, 1.0 - 2**-24, 0.1, 7.0, 15.0, 88.0, 88.5, -87.5, -100.0, 1e-40),
    *(3e38, INF, -INF, NAN),
]  # fmt: skip


def masked(x, y):
    z = x * y
    z[x > 1] = 0
    z[y <= x] *= 2
    return z


def in_place(x, y):
    z = x + y
    z.mul_(y).add_(1)
    z.clamp_(min=-1)
    z.masked_fill_(z > 2, 3.0)
    return z


def where(x, y):
    return torch.where(x > y, 1.0, torch.where(y == 0, x, 0.5))


class _Gradient(torch.autograd.Function):
    """x, whose gradient is a function of what comes back, x and y."""

    @staticmethod
    def forward(ctx, x, y, function):
        ctx.save_for_backward(x, y)
        ctx.function = function
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return ctx.function(grad, *ctx.saved_tensors), None, None


def truth(function):
    return lambda x, y: function(x, y).to(x)


#: of an operation of the text, what of torch becomes it: of x and y, by steps of one state
CASES = {
    "add": [lambda x, y: x + y, lambda x, y: 1 + x + 0.3, in_place],
    "sub": [lambda x, y: x - y, lambda x, y: 1 - x, lambda x, y: torch.rsub(x, y)],
    "mul": [
        *(lambda x, y: x * y, lambda x, y: x * 0.3, masked, lambda x, y: x.square()),
        *(lambda x, y: x**2, lambda x, y: x**3, lambda x, y: x**-2),
    ],
    "scale": [lambda x, y: torch.add(x, y, alpha=0.3), lambda x, y: torch.sub(x, y, alpha=0.7)],
    "div": [
        *(lambda x, y: x / y, lambda x, y: 3 / x, lambda x, y: x / torch.full_like(y, 3)),
        lambda x, y: F.softplus(x, 3.0),
    ],
    "over": [
        *(lambda x, y: x / 3.0, lambda x, y: x / -0.0, lambda x, y: x / 1, lambda x, y: x / 1e-39),
        *(lambda x, y: x / torch.tensor(1.1), lambda x, y: (x - y).div_(1.5)),
        *(lambda x, y: torch.div(x, 4 / 3, rounding_mode="trunc"), lambda x, y: (x / 3).square()),
    ],
    "neg": [lambda x, y: -x],
    "abs": [lambda x, y: x.abs()],
    "ge": [truth(torch.ge), lambda x, y: (x >= 1).float(), lambda x, y: (x >= 0.1).float()],
    "gt": [truth(torch.gt), lambda x, y: (x > 0.1).to(y)],
    "le": [truth(torch.le), lambda x, y: x.clamp(-0.5, 1)],
    "lt": [truth(torch.lt)],
    "eq": [truth(torch.eq), lambda x, y: ((x > 0) == (y > 0)).to(x)],
    "ne": [truth(torch.ne), lambda x, y: ((x > 0) ^ (y > 0)).to(x), lambda x, y: x.bool().float()],
    "and": [truth(torch.logical_and), lambda x, y: ((x > 0) & (y > 0)).float()],
    "or": [truth(torch.logical_or), lambda x, y: ((x > 0) | (y > 0)).float()],
    "not": [lambda x, y: (~(x > 0)).float(), lambda x, y: x.logical_not().float()],
    "float": [lambda x, y: (x > y) * y],
    "where": [where, lambda x, y: x.masked_fill(y > 0, -0.0), masked, in_place],
    "at_least": [lambda x, y: x.clamp(min=0), lambda x, y: x.clamp_min(-0.0), in_place],
    "at_most": [
        lambda x, y: x.clamp(max=1.5), lambda x, y: x.clamp(0, 1),
        lambda x, y: x.clamp(2, 1),
    ],
    "relu": [lambda x, y: x.relu()],
    "minimum": [lambda x, y: torch.minimum(x, y)],
    "maximum": [lambda x, y: torch.maximum(x, y), lambda x, y: torch.max(x, y)],
    "sign": [lambda x, y: x.sign() * y, lambda x, y: x.sgn(), lambda x, y: x.abs()],
    "sqrt": [lambda x, y: x.sqrt(), lambda x, y: x**0.5],
    "rsqrt": [lambda x, y: x.rsqrt(), lambda x, y: x**-0.5],
    "reciprocal": [lambda x, y: x.reciprocal(), lambda x, y: x**-1],
    "pow": [lambda x, y: x**4, lambda x, y: x**1.7, lambda x, y: x**-3, lambda x, y: x**0 + x**1],
    "round": [lambda x, y: x.round(), lambda x, y: x.clamp(0, 4).round()],
    "floor": [lambda x, y: x.floor()],
    "ceil": [lambda x, y: x.ceil()],
    "trunc": [lambda x, y: x.trunc()],
    **{
        name: [lambda x, y, f=getattr(torch, name): f(x)]
        for name in ["exp", "expm1", "log", "log1p", "sin", "cos", "erf", "atan", "sigmoid", "tanh"]
    },
    "sigmoid_backward": [lambda x, y: x.sigmoid() * y],
    "tanh_backward": [lambda x, y: x.tanh() * y],
    "threshold_backward": [lambda x, y: x.relu() * y],
}  # fmt: skip
#: other operations of torch that become several lines
COMPOSED = {
    "addcmul": [
        lambda x, y, f=f, v=v: f(x, y, x + 1, value=v)
        for f in (torch.addcmul, torch.addcdiv)
        for v in (1, 0.3)
    ],
    "relu6": [lambda x, y: F.relu6(x), lambda x, y: F.relu6(x) * y, lambda x, y: F.hardtanh(x)],
    "softplus": [lambda x, y: F.softplus(x), lambda x, y: F.softplus(x, 2.0, 5.0) * y],
    "leaky_relu": [lambda x, y: F.leaky_relu(x), lambda x, y: F.leaky_relu(x, 0.3) * y],
    "hardsigmoid": [lambda x, y: F.hardsigmoid(x), lambda x, y: F.hardsigmoid(x) * y],
    "lerp": [
        *(lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: torch.lerp(x, y, 0.7)),
        *(lambda x, y: torch.lerp(x, y, y), lambda x, y: x.lerp(y, torch.tensor(0.6))),
    ],
    "nan_to_num": [
        *(lambda x, y: x.nan_to_num(), lambda x, y: x.nan_to_num(0.5) * y),
        lambda x, y: x.nan_to_num(0.5, 2.0, -3.0),
    ],
    "isnan": [lambda x, y: torch.where(x.isnan(), y, x), lambda x, y: x.isinf().to(y)],
    "pow": [lambda x, y: 2.0**x, lambda x, y: 0.9**x * y, lambda x, y: 1**x, lambda x, y: x**y],
    "clamp by a tensor": [
        *(lambda x, y: x.clamp(max=y), lambda x, y: torch.clamp(x, min=y)),
        lambda x, y: x.clamp(y * 0.5, y),
    ],
    "div": [lambda x, y: torch.div(x, y, rounding_mode="trunc")],
    "gradients": [  # of what forward does not compute, and of sums of products
        lambda x, y, f=f: _Gradient.apply(x, y, f)
        for f in (
            *(lambda g, x, y: g * x.sigmoid(), lambda g, x, y: g / y, lambda g, x, y: g * x + y),
            *(lambda g, x, y: g * x - y, lambda g, x, y: y - g * x),
            lambda g, x, y: g * x - 0.5 * y,
        )
    ],
}  # fmt: skip


@cache
def values(dtype=torch.float32):
    """All pairs of special values, and random ones, with gradients to go with them."""
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL))).t()
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cat([pairs, torch.randn(2, 124, generator=generator) * 3], 1)
    x, y = pairs.view(2, 8, -1).to(dtype)
    return x, y, torch.randn(8, x.shape[1], generator=generator).to(dtype)


def by_torch(function, dtype):
    x, y, upstream = values(dtype)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    ends = function(*leaves), leaves[1] * 1
    kept = [end for end in ends if end.requires_grad]
    grads = torch.autograd.grad(kept, leaves, [upstream] * len(kept), allow_unused=True)
    found = [*ends, *(torch.zeros_like(x) if g is None else g for g in grads)]
    return [t.detach() for t in found]


@cache
def read(function):
    """A function of x and y as a step of the state y, which stays as it is."""
    return reading_of.read(lambda x, s, p: (function(x, *s), [s[0] * 1]), 1, (), (2, 3))


def check(function, run=program.results, rounds=False):
    """Compare a step by its text with torch; gives the operations that it has.

    ``rounds``: whether gradients are torch's to rounding alone, and not of subnormal numbers.
    """
    reading = read(function)
    x, y, upstream = (v.flatten() for v in values())
    given = {"x": x, "s0": y, "g": upstream, "g0": upstream}
    got = run(reading, given, values()[0].shape)
    wanted, best = by_torch(function, torch.float32), by_torch(function, torch.float64)
    is_subnormal = torch.stack(values()[:2]).frexp().exponent.lt(-125).any(0)
    names = "output", "state", "gradient of x", "gradient of y"
    roots, found = (*reading.program.outputs, *reading.program.grads), set()
    for name, root, have, want, exact in zip(names, roots, got, wanted, best, strict=True):
        ops = {reading.program.lines[k][0] for k in reading.program.needed([root])}
        found |= ops
        same = (have == want) & (have.signbit() == want.signbit())
        if ops & reading_of._ROUNDED or (rounds and name.startswith("gradient")):
            bound = 4e-6 * exact.abs() + 20 * (want.double() - exact).abs() + 1e-37
            if "scale" in ops:  # of a sum whose terms may cancel
                bound += 1e-6 * (x.abs() + y.abs() + (x * y).abs()).view_as(bound)
            elif rounds and {"add", "sub"} & ops:
                bound += 1e-6 * (1 + x.abs() + y.abs()).nan_to_num(0, 0, 0).view_as(bound)
            same = (have == want) | ((have.double() - want).abs() <= bound)
            same |= is_subnormal & rounds
        bad = ~(same | have.isnan() & want.isnan()).flatten()
        cases = torch.stack([x, y, upstream, have.flatten(), want.flatten()])[:, bad].t()[:5]
        assert not bad.any(), f"{name}: x, y, upstream, got, expected: {cases.tolist()}"
    return found


@pytest.mark.parametrize("op", EXPRESSIONS)
def test_an_operation_equals_torchs(op):
    assert op in set().union(*map(check, CASES[op]))


@pytest.mark.parametrize("name", COMPOSED)
def test_what_becomes_several_lines_equals_torchs(name):
    for function in COMPOSED[name]:
        check(function)
