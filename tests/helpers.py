"""What the numeric tests share: the option grid, nets, and comparisons that raise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import swap_neurons
from sj_taid.ops.alif.norm import Norm
from tests.ops.alif.conformance import TOLERANCE, Case, differences, results, tensors

HALF = (torch.float16, torch.bfloat16)


def grid(
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
    base: Case | None = None,
) -> list[Case]:
    """reset x detach x decay x granularity x dtype."""
    base = base or Case()
    return [
        base.with_(
            v_reset=v_reset,
            detach_reset=detach,
            decay_input=decay,
            channels=base.shape[2] if per_channel else None,
            dtype=dtype,
        )
        for v_reset, detach, decay, per_channel, dtype in itertools.product(
            (0.0, -0.25, None), (False, True), (False, True), (False, True), dtypes
        )
    ]


def trained_norm(**options: Any) -> nn.Module:
    """A batch norm of four channels, with statistics and parameters of its own."""
    made = layer.BatchNorm2d(4, **options)
    with torch.no_grad():
        made.weight.uniform_(0.5, 2.0)
        made.bias.uniform_(-0.3, 0.5)
        made.running_mean.uniform_(-1.0, 1.0)
        made.running_var.uniform_(0.5, 2.0)
    return made


def running_norm(channels: int) -> Norm:
    """A norm by running statistics, as the operators take it."""
    mean = torch.linspace(-0.3, 0.9, channels)
    return Norm(1.6 + mean, mean.roll(1), mean, (1 + mean).square(), False, 0.1, 1e-5)


def swapped(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A net of SpikingJelly's zoo, multi-step, of four classes, whose neurons are ALIF."""
    net = make(
        spiking_neuron=neuron.LIFNode,
        surrogate_function=surrogate.ATan(),
        num_classes=4,
        **options,
    )
    functional.set_step_mode(net, "m")
    swap_neurons(net)
    return net


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Compare two :func:`results` name by name, as :func:`differences` does."""
    found = [*differences(got, expected, scale)]
    assert not found, f"{'; '.join(found)} ({dtype})"


def assert_equals_a_float32_copys(
    multi_step: Callable[..., Any], case: Case, leaves: dict[str, Tensor]
) -> None:
    """Results on half leaves are those on a float32 copy, rounded at the end, bit for bit."""
    got = results(multi_step, case, leaves)
    copied = leaves | {"x": leaves["x"].detach().float().requires_grad_(leaves["x"].requires_grad)}
    expected = results(multi_step, case, copied)
    assert got.keys() == expected.keys()
    for name, have in got.items():
        state = name not in ("spike_seq", "grad_x")
        assert have.dtype == (torch.float32 if state else case.dtype), name
        want = expected[name].to(have.dtype)
        assert have.stride() == want.stride(), name
        assert_same_bits(have, want, name)


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal bits, but for NaN, of which there are many."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan), name
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    have, want = (t.masked_fill(nan, 0).view(bits) for t in (got, expected))
    assert torch.equal(have, want), f"{name}: {int((have != want).sum())} differ"


def assert_not_finite_alike(
    multi_step: Callable[..., Any], reference: Callable[..., Any], case: Case, norm: bool = False
) -> None:
    """From infinite and NaN inputs and voltages the same outputs, and gradients, NaN for NaN.

    With ``norm`` behind :func:`running_norm`, where voltages are equal to rounding.
    """
    if norm:
        multi_step, reference = (
            partial(f, norm=running_norm(case.shape[2])) for f in (multi_step, reference)
        )
    leaves = tensors(case)
    g = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for leaf in (leaves["x"], leaves["v0"]):
            kind = torch.randint(0, 12, leaf.shape, generator=g)
            kind[..., 0] = 3  # a channel stays as it is
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
                leaf.masked_fill_(kind == i, value)
    got, expected = (results(f, case, leaves) for f in (multi_step, reference))
    assert expected["grad_x"].isfinite().any() and expected["grad_x"].isnan().any()
    for name, want in expected.items():
        exact = name in (("spike_seq",) if norm else ("spike_seq", "v", "v_seq"))
        bound = 0.0 if exact else TOLERANCE[want.dtype]["value"]
        torch.testing.assert_close(got[name], want, rtol=bound, atol=bound, equal_nan=True)
