"""What an accelerated net must do as the plain one does: outputs, gradients, buffers, states.

Both round, and behind a fused norm differently. So nets are compared that a nudge of their neurons'
inputs leaves the same spikes, within what float32 costs the plain net itself.
"""

import copy
import itertools

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sj_taid
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.nets.summary import watch_step

NUDGE = 4e-6
#: 0.0.0.0.14's neurons give no gradient in evaluation
EVALUATION = torch.enable_grad if FUNCTIONAL_STATES else torch.no_grad


def results(net, x, between=functional.reset_net, context=torch.enable_grad, run=lambda net: net):
    """By name, what two steps make: outputs, gradients, buffers, voltages and what was seen.

    ``run`` gives the module that runs for ``net``, as a replica of it.
    """
    found = {}
    for step in range(2):
        torch.manual_seed(step)  # of dropout and cotangents
        x_seq = (x * (1 - 0.1 * step)).requires_grad_()
        net.zero_grad()
        seen = net.seen = []
        module = run(net)
        with context():
            outputs = [y for y in tree_leaves(module(x_seq)) if isinstance(y, Tensor)]
        lost = [y.double() * torch.randn(y.shape, dtype=torch.float64) for y in outputs]
        loss = sum(y.sum() for y in lost)
        if loss.requires_grad:
            loss.backward()
        named = {f"output {i}": y for i, y in enumerate(outputs)} | {"grad of x": x_seq.grad}
        named |= {f"grad of {name}": p.grad for name, p in net.named_parameters()}
        named |= dict(module.named_buffers())
        named |= {
            f"seen {i}": value() if callable(value) else value for i, value in enumerate(seen)
        }
        for name, node in module.named_modules():
            if isinstance(node, neuron.BaseNode):
                named[f"{name}.v"] = torch.as_tensor(node.v)
        copies = {n: t.detach().clone() for n, t in named.items() if t is not None}
        found |= {f"step {step}, {name}": tensor for name, tensor in copies.items()}
        seen.clear()
        between(net)
    return found


def accelerated(net, x=None):
    """The net itself, accelerated."""
    sj_taid.accelerate(net, x)
    return net


def assert_same(plain, run, rtol=1e-4, atol=1e-4):
    """``run`` gives of an accelerated copy of a net what it gives of the plain net; the copy."""
    fast = accelerated(copy.deepcopy(plain))
    expected, got = run(plain), run(fast)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    return fast


def weighed(y):
    """A sum of ``y`` in which each value counts differently."""
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()


def count_fused(net, x):
    """How many norms of an accelerated net neurons read as one operation, in a step."""
    return sum(any(read.values()) for read in watch_step(net, x).readers.values())


def spikes(net, x, nudge=0.0, passes=None, **options):
    """The spikes of each neuron in ``passes(net, x)``, whose inputs are moved by ``nudge``.

    Without ``passes`` in :func:`results` with ``options``.
    """
    net, seen = copy.deepcopy(net), []
    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_pre_hook(
                lambda _, args: (args[0] + nudge * args[0].detach().abs().max().clamp(1.0),)
            )
            module.register_forward_hook(lambda _, args, y: seen.append(y.detach().round().char()))
    if passes:
        passes(net, x)
    else:
        results(net, x, **options | {"context": torch.no_grad})
    return seen


def is_fragile(net, x, **options):
    """Whether rounding may change a spike."""
    expected = spikes(net, x, **options)
    others = (spikes(net, x, nudge, **options) for nudge in (NUDGE, -NUDGE))
    exact = (spikes(copy.deepcopy(net).double(), x.double(), **options) for _ in range(1))
    return not all(
        len(other) == len(expected) and all(map(torch.equal, other, expected))
        for other in itertools.chain(others, exact)
    )


def robust(make, seeds=100, **options):
    """The first net and input that ``make()`` draws of which rounding changes no spike.

    ``options`` are those of :func:`spikes`.
    """
    for seed in range(seeds):
        torch.manual_seed(seed)
        net, x = make()
        if not is_fragile(net, x, **options):
            return net, x
    raise AssertionError(
        f"each of {seeds} draws has a voltage that rounding moves over a threshold"
    )


def differences(got, plain, exact):
    """What of :func:`results` is farther from the plain net's than it is from float64's."""
    if got.keys() != plain.keys():
        yield f"only one net has {', '.join(sorted(got.keys() ^ plain.keys()))}"
    grads = [t.abs().max() for n, t in exact.items() if "grad" in n and t.numel()]
    floor = 1e-6 * float(max(grads, default=1.0))
    for name in got.keys() & plain.keys():
        have, want, best = got[name], plain[name], exact[name].double()
        if have.shape != want.shape or have.dtype != want.dtype:
            yield f"{name}: {have.dtype} {[*have.shape]}, expected {want.dtype} {[*want.shape]}"
        elif want.numel():
            error = float((have.double() - want.double()).abs().max())
            rounding = float((want.double() - best).abs().max())
            bound = 20 * rounding + 1e-5 * float(best.abs().max()) + floor
            if not error <= bound:  # NaN is a difference
                yield f"{name}: error {error:.3g} > {bound:.3g}"


def assert_alike(got, plain, exact):
    found = sorted(differences(got, plain, exact))
    assert not found, "\n".join(found)
